"""The page to try a model: it sees what onnxruntime sees in Python, from a double click, and its resize is Pillow's, bit for bit."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tutelage as package
from browser import CHROMIUM, NO_CHROMIUM, told_in_browser
from conftest import environment, refused
from tutelage.data.decode import decode, fit
from tutelage.deploy import browser
from tutelage.deploy.predict_bundle import predict_file

SIZE, SHORT_SIDE = 32, 48
LABELS = ["<b>red</b> & more", "green", "blue"]
MEAN, STD = [0.5, 0.4, 0.45], [0.25, 0.2, 0.22]

SOURCE = Path(__file__).parents[2] / "src" / "tutelage" / "deploy" / "onnxruntime_web"

DROP = """<script>addEventListener("load", async () => {
const list = new DataTransfer();
for (const [name, data] of FILES) list.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: list }));
const found = () => [...document.querySelectorAll("#results > li")];
while (!found().length || document.querySelector("#results").textContent.includes("waiting")) await new Promise((r) => setTimeout(r, 20));
await Promise.all([...document.images].map((image) => image.decode()));
const root = document.documentElement;
console.log("told: " + JSON.stringify({ scroll: root.scrollWidth, client: root.clientWidth,
  status: document.querySelector("#status").textContent,
  ground: getComputedStyle(document.body).backgroundColor, images: document.images.length, all: found().map((item) => ({
    name: item.querySelector("h2").textContent, bad: item.querySelector(".bad")?.textContent ?? "", unsure: !!item.querySelector(".unsure"),
    classes: [...item.querySelectorAll(".class")].map((c) => c.textContent), time: item.querySelector(".said > p:last-child").textContent,
    values: [...item.querySelectorAll("data")].map((d) => Number(d.value)) })) })); });</script>"""


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file. pixels: (H, W, 3) or (H, W, 4) uint8."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def noise(height: int, width: int, seed: int, colour: int = 0) -> np.ndarray:
    """(height, width, 3) uint8, brighter in one channel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    pixels[..., colour] = pixels[..., colour] // 2 + 128
    return pixels.astype(np.uint8)


def write_export(folder: Path, resize: str, baked: bool) -> Path:
    """A small real export: a convolution, a rectifier, a mean, a linear layer; normalisation and softmax where it is baked."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    kernel = random.normal(0, 0.1, (8, 3, 3, 3))
    kernel[:3] = 0
    kernel[range(3), range(3), 1, 1] = 1  # or no image would be red
    linear = random.normal(0, 0.5, (8, 3))
    linear[:3] += 3 * np.eye(3)
    shape = (1, 3, 1, 1)
    weights = {
        "kernel": kernel, "linear": linear, "bias": random.normal(0, 0.1, 3), "full": np.array(255.0),
        "mean": np.array(MEAN).reshape(shape), "std": np.array(STD).reshape(shape),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x" if baked else "images", "kernel"], ["maps"], strides=[2, 2]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "linear", "bias"], ["logits"]),
    ]
    if baked:
        nodes = [
            helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floats", "full"], ["unit"]),
            helper.make_node("Sub", ["unit", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["x"]),
            *nodes,
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ]
    name, output = ("pixels", "probabilities") if baked else ("images", "logits")
    kind, sides = (TensorProto.UINT8, [SIZE, SIZE, 3]) if baked else (TensorProto.FLOAT, [3, SIZE, SIZE])
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(name, kind, ["batch", *sides])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", len(LABELS)])],
        [numpy_helper.from_array(value.astype(np.float32), weight) for weight, value in weights.items()],
    )  # fmt: skip
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    about = {
        "decode_short_side": SHORT_SIDE, "size": SIZE, "resize": resize, "mean": MEAN, "std": STD,
        "input": {"name": name, "dtype": "uint8" if baked else "float32", "layout": "NHWC" if baked else "NCHW"},
        "output": {"name": output, "kind": "probabilities" if baked else "logits"}, "unsure_below": 0.6,
    }  # fmt: skip
    (folder / "preprocess.json").write_text(json.dumps(about))
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write export.json with the hashes of the files as they are."""
    names = ("model.onnx", "labels.txt", "preprocess.json")
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "export.json").write_text(json.dumps({"files": files, "recommended": "model.onnx"}))


def expected(folder: Path, data: bytes) -> np.ndarray:
    """(C,) probabilities of an image file by onnxruntime in Python."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    about = json.loads((folder / "preprocess.json").read_text())
    pixels = fit(decode(data, about["decode_short_side"])[0], about["size"], about["resize"])[None]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    if about["input"]["dtype"] == "uint8":
        return session.run(None, {"pixels": pixels})[0][0]
    images = (pixels.transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
    powers = np.exp(session.run(None, {"images": images.astype(np.float32)})[0][0])
    return powers / powers.sum()


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("run") / "export", "squash", baked=False)


# In the browser


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize(
    ("width", "scheme", "resize", "baked"), [(500, "dark", "pad", False), (1600, "light", "crop", True)]
)
@pytest.mark.slow
def test_a_dropped_image_is_classified(tmp_path, width, scheme, resize, baked):
    """Images dropped on the page, opened from its file, get the classes and probabilities that onnxruntime gives in Python."""
    folder = write_export(tmp_path / "fruit" / "export", resize, baked)
    glass = np.dstack([noise(40, 40, 3, 1), np.full((40, 40), 255, np.uint8)])
    glass[:20, :, 3] = 0  # what is behind it is white
    files = {
        "red.png": png(noise(70, 90, 0, 0)), "green & tall.png": png(noise(201, 60, 1, 1)), "blue.png": png(noise(20, 30, 2, 2)),
        "glass.png": png(glass), "photo.jpg": png(np.asarray(Image.fromarray(noise(9, 9, 4, 2)).resize((90, 80))), "JPEG"),
    }  # fmt: skip
    bad = {"notes.txt": b"no image", "empty.png": b"", "broken.png": files["red.png"][:60]}
    page = Path(package.demo_page(export=str(folder), out=str(tmp_path / "page")).to_json()["page"])
    text = page.read_text(encoding="utf-8")
    assert "<b>red</b>" not in text
    assert "<title>fruit: try it</title>" in text
    given = json.dumps([(name, base64.b64encode(data).decode()) for name, data in {**files, **bad}.items()])
    page.write_text(text.replace("</body>", DROP.replace("FILES", given) + "</body>"), encoding="utf-8")
    told, others = told_in_browser(page, tmp_path, width, scheme)
    assert others == []
    assert told["scroll"] <= told["client"], "the page scrolls sideways"
    assert told["ground"] == ("rgb(251, 251, 249)" if scheme == "light" else "rgb(20, 21, 23)")
    assert [one["name"] for one in told["all"]] == [*files, *bad]
    assert told["images"] == len(files)
    assert told["status"] == "8 images, 3 of them could not be read."
    found = {one["name"]: one for one in told["all"]}
    for name, data in files.items():
        right = expected(folder, data)
        order = np.argsort(-right)
        assert found[name]["classes"] == [LABELS[i] for i in order], name
        assert np.abs(np.array(found[name]["values"]) - right[order]).max() < 1e-3, name
        assert found[name]["unsure"] == (right.max() < 0.6), name
        assert found[name]["time"].endswith(" ms")
    assert [found[name]["classes"][0] for name in files][:3] == LABELS
    assert found["empty.png"]["bad"] == "the file is empty"
    for name in ("notes.txt", "broken.png"):
        assert found[name]["bad"].startswith("not an image that this browser can read; JPEG, PNG")


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.slow
def test_a_model_that_does_not_fit_its_labels_is_told(tmp_path):
    """A page whose model and class names do not agree says so, and does not guess."""
    folder = write_export(tmp_path / "export", "squash", baked=False)
    (folder / "labels.txt").write_text("red\ngreen\n")
    seal(folder)
    page = browser.write_page(folder, tmp_path / "page")
    given = json.dumps([("red.png", base64.b64encode(png(noise(9, 9, 0))).decode())])
    page.write_text(page.read_text().replace("</body>", DROP.replace("FILES", given) + "</body>"))
    told, others = told_in_browser(page, tmp_path)
    assert others == []
    assert told["status"] == "The model cannot be used: it gives 3 values, and there are 2 class names"
    assert told["all"][0]["bad"] == "the model cannot be used"


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_the_resize_is_pillows(tmp_path):
    """Shrinking and all three ways to make a square give the same bytes in JavaScript as data/decode.py in Python."""
    random, cases = np.random.default_rng(0), []
    sides = [(1, 1), (1, 60), (60, 1), (64, 63), (32, 32), (33, 65), (52, 42), (53, 42), (7, 9), (300, 20), (20, 300)]
    sides += [tuple(int(side) for side in random.integers(1, 120, 2)) for _ in range(50)]
    for number, (height, width) in enumerate(sides):
        for resize in ("squash", "crop", "pad"):
            size = SIZE if number < 11 else int(random.integers(1, 90))
            short = None if number % 3 == 0 else int(random.integers(1, 60))
            pixels = noise(height, width, number)
            right = fit(decode(png(pixels), short)[0], size, resize)
            both = [base64.b64encode(array.tobytes()).decode() for array in (pixels, right)]
            cases.append((height, width, size, resize, short, *both))
    script = (Path(browser.__file__).parent / "page" / "preprocess.js").read_text(encoding="utf-8")
    script += """const bytes = (text) => Uint8ClampedArray.from(atob(text), (c) => c.charCodeAt(0));
    const wrong = CASES.filter(([height, width, size, how, short, given, right]) => {
      const found = fit(shrink({ data: bytes(given), width, height }, short, TALL), size, how, TALL).data;
      return found.length !== bytes(right).length || bytes(right).some((value, i) => value !== found[i]); });
    console.log("told: " + JSON.stringify(wrong.map((one) => one.slice(0, 5))));"""
    script = script.replace("CASES", json.dumps(cases)).replace("TALL", json.dumps(browser.TALL_FIRST))
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><script type="module">{script}</script>', encoding="utf-8")
    assert told_in_browser(page, tmp_path) == ([], [])


# The command


@pytest.mark.slow
def test_the_page_is_alone(export, tutelage, tmp_path):
    """The command writes one file that names no address to fetch from and forbids itself to ask for any; twice, the same bytes."""
    done = tutelage("demo-page", str(export), "--out", str(tmp_path / "page"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"page: {tmp_path / 'page' / 'index.html'}"
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "src=" not in page.partition("</main>")[0]
    assert "Copyright (c) Microsoft Corporation" in page
    assert "sourceMappingURL" not in page
    assert page.count("</script") == 5  # nothing inside ends its own script
    assert browser.write_page(export, tmp_path / "page").read_text(encoding="utf-8") == page


def test_what_runs_it_is_as_fetched():
    """The files of onnxruntime-web in the package are those that its VERSION names, and its licence is beside them."""
    folder = Path(browser.__file__).parent / "onnxruntime_web"
    version, *files = (folder / "VERSION").read_text().splitlines()
    script = (SOURCE / "fetch.sh").read_text()
    for word in version.replace(",", "").split():
        assert not word[0].isdigit() or f"={word}\n" in script
    for line in files:
        digest, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert (folder / "LICENSE").read_text().startswith("MIT License")


def test_serve(export, tmp_path):
    """--serve tells its address, serves the page and nothing else to this computer, and ends well on Ctrl-C."""
    out = tmp_path / "page"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "private.txt").write_text("private")
    words = [sys.executable, "-m", "tutelage", "demo-page", str(export), "--out", str(out), "--serve", "--port", "0"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background of a shell ignores it
    )  # fmt: skip
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            assert answer.read() == (out / "index.html").read_bytes()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}sub/private.txt")
        for host, status in (
            ("localhost:1", 200),
            ("LocalHost", 200),
            ("127.0.0.1", 200),
            ("example.com", 403),
            ("127.0.0.1.example.com:80", 403),
            ("", 403),
        ):
            connection = http.client.HTTPConnection(address.split("/")[2], timeout=10)
            connection.request("GET", "/", headers={"Host": host})
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (status, True), host
        for request in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):  # and closed before the answer
            with socket.create_connection(("127.0.0.1", int(address.split(":")[2].strip("/")))) as early:
                early.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                early.sendall(request)
        assert urllib.request.urlopen(address).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def spoil_hash(folder: Path, tmp_path: Path) -> None:
    (folder / "labels.txt").write_text("red\ngreen\nyellow\n")
    (folder / "preprocess.json").unlink()


def spoil_size(folder: Path, tmp_path: Path) -> None:
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(201_000_000)  # sparse: takes no disk


def spoil_about(folder: Path, tmp_path: Path) -> None:
    text = (folder / "preprocess.json").read_text().replace('"squash"', '"stretch"')
    (folder / "preprocess.json").write_text(text)
    seal(folder)


def spoil_version(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[:1] + bytes([14]) + data[2:])
    seal(folder)


def spoil_export(folder: Path, tmp_path: Path) -> None:
    (folder / "export.json").write_text("{}")


def other_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<title>my own</title>")


def file_as_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_export, ["is not an export folder (export.json: cannot be read)", "tutelage export RUN"]),
        (spoil_hash, ["labels.txt (changed), preprocess.json (missing)", "export again"]),
        (spoil_size, ["model.onnx is 201 MB", "at most 200 MB", "a smaller student"]),
        (spoil_version, ["model.onnx has ONNX IR version 14", "version 13 or less", "export again"]),
        (
            spoil_about,
            ["preprocess.json does not fit its model: resize is 'stretch', not squash, crop or pad", "export again"],
        ),
        (other_page, ["its index.html was not written by tutelage demo-page", "another --out"]),
        (file_as_out, ["/page is a file", "--out"]),
    ],
)
def test_bad_input(
    export: Path, tutelage: Callable[..., Any], tmp_path: Path, spoil: Callable[[Path, Path], None], said: list[str]
):
    """Each fault is told in three parts, with exit code 2, and leaves no page."""
    folder = tmp_path / "export"
    folder.mkdir()
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = tutelage("demo-page", str(folder), "--out", str(tmp_path / "page"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for text in ["error:", *said]:
        assert text in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_all_faults_at_once(export, tutelage, tmp_path):
    """A folder that is not there and an --out that cannot be are told in one message; so is one where nothing can be written."""
    (tmp_path / "file").write_text("")
    done = tutelage("demo-page", str(tmp_path / "none"), "--out", str(tmp_path / "file" / "page"))
    assert done.returncode == 2
    assert "is not an export folder (export.json: No such file or directory)" in done.stderr
    assert "/file is a file" in done.stderr
    if Path("/proc/self").exists():  # no folder can be made there, not even by root
        done = tutelage("demo-page", str(export), "--out", "/proc/page")
        assert done.returncode == 2
        assert "error: --out /proc/page: No such file" in done.stderr


def test_a_port_that_is_taken(export, tutelage, tmp_path):
    """A port that another program holds is told, with another one, before any work; so is one that cannot be."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = tutelage("demo-page", str(export), "--out", str(tmp_path / "page"), "--serve", "--port", str(port))
    assert done.returncode == 2
    assert f"--port {port}: Address already in use" in done.stderr
    assert f"choose another --port ({port + 1}" in done.stderr
    assert not (tmp_path / "page").exists()
    assert "less than or equal to 65535" in tutelage("demo-page", "x", "--out", "y", "--port", "70000").stderr


def changed(**values: object) -> Callable[[Path], None]:
    """A function that gives keys of preprocess.json other values; of None, removes them."""

    def change(folder: Path) -> None:
        about = {**json.loads((folder / "preprocess.json").read_text()), **values}
        kept = {name: value for name, value in about.items() if value is not None}
        (folder / "preprocess.json").write_text(json.dumps(kept))

    return change


def written(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(size=None), "size is None, not 1 to 2048 pixels"),
        (changed(size="large"), "size is 'large'"),
        (changed(size=10**6), "size is 1000000"),
        (changed(mean=[0.5]), "mean is [0.5], not three numbers"),
        (changed(std=[1, 1, 0]), "std is [1, 1, 0], not three numbers above 0"),
        (changed(input=None), "input is None"),
        (changed(input={"name": [1], "dtype": {}, "layout": "NCHW"}), "input is {'name': [1]"),
        (changed(decode_short_side="x"), "decode_short_side is 'x'"),
        (changed(unsure_below="often"), "unsure_below is 'often'"),
        (written("preprocess.json", b"[1]"), "a JSON object is expected"),
        (written("preprocess.json", b"\xff\xfe{"), "it is not valid JSON"),
        (written("preprocess.json", b"[" * 100_000), "it is nested too deeply"),
        (written("labels.txt", b"red\xff\ngreen\nblue\n"), "labels.txt does not fit its model: it is not UTF-8"),
        (written("labels.txt", b"red\n"), "labels.txt"),
    ],
)
def test_contents_that_cannot_be(export, tutelage, tmp_path, change, said):
    """Files whose hashes fit and whose contents do not are one error: of `predict`, of the export's own predict.py, and of the page."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    change(folder)
    seal(folder)
    (tmp_path / "a.png").write_bytes(png(noise(20, 20, 0)))
    words = (str(folder), str(tmp_path / "a.png"), "--out", str(tmp_path / "a.csv"))
    text = refused(tutelage("predict", *words))
    assert said in text
    assert "export again" in text
    if said != "labels.txt":  # how many classes the page's model has, only its export.json says
        assert said in refused(tutelage("demo-page", str(folder), "--out", str(tmp_path / "page")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "export"]


@pytest.mark.parametrize("recommended", [None, ["model.onnx"], "predict.py"])
def test_a_recommendation_that_cannot_be(export, tutelage, tmp_path, recommended):
    """An export.json that recommends no model of the folder is one error."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    about = {**json.loads((folder / "export.json").read_text()), "recommended": recommended}
    (folder / "export.json").write_text(json.dumps(about))
    for words in (("predict", str(folder), str(tmp_path)), ("demo-page", str(folder), "--out", str(tmp_path / "page"))):
        assert f"recommended is {recommended!r}" in refused(tutelage(*words))


def test_the_file_of_the_export_checks_the_same(export, tmp_path, capsys):
    """predict.py of the export, one file, refuses what `tutelage predict` refuses."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    (folder / "predict.py").write_text(predict_file("0"))
    code = runpy.run_path(str(folder / "predict.py"))
    (tmp_path / "a.png").write_bytes(png(noise(20, 20, 0)))
    words = [str(tmp_path / "a.png"), "--out", str(tmp_path / "a.csv")]
    assert code["main"](folder, words) == 0
    changed(mean=[0.5])(folder)
    seal(folder)
    assert code["main"](folder, words) == 2
    assert "mean is [0.5], not three numbers" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        code["main"](folder, [*words, "--threads", "99999999"])
    assert "1 to 1024" in capsys.readouterr().err
