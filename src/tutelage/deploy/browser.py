"""A page to try an exported model: one HTML file that holds the model and its runtime, opened by a double click. Loads no torch.

The model runs in onnxruntime-web (onnxruntime_web/, WebAssembly, one thread). page/ holds the page's sources; preprocess.js is
the resize of data/decode.py in JavaScript and gives the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import lzma
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import PIL
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from tutelage.deploy.export_contents import labels_of, preprocess_of, recommended_of
from tutelage.deploy.runtime import ABOUT, EXPORT, LABELS, NAMES, listed
from tutelage.errors import TutelageError, raise_all, shown
from tutelage.files import write_text
from tutelage.json_object import JSON
from tutelage.regular_file import bytes_in
from tutelage.version import __version__

MEGABYTES = 200  # largest model: base 64 adds a third, and a browser's longest text is 512 MB
# ONNX IR version: the newest that onnxruntime-web 1.30 reads; torch.onnx writes 10, onnx.helper of 1.23 writes 14
IR_VERSION = 13
GENERATOR = "Tutelage demo-page"
LOOPBACK = "127.0.0.1"
# Pillow 13 and later run the two passes of a resize in the other order for tall images
TALL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


# keys of preprocess.json that the page needs
NEEDED = ("decode_short_side", "size", "resize", "mean", "std", "input", "output", "unsure_below")


def write_page(folder: Path, out: Path) -> Path:
    """Write out/index.html from an export folder.

    Args:
        folder: as `tutelage export` wrote it. out: a folder, created if missing.

    Returns:
        the path of the page.

    Raises:
        TutelageError: not an export folder, changed or unusable files, too large a model, or `out` cannot be written;
            all faults in one message.
    """
    page, faults, path = "", _faults_of(out), out / "index.html"
    try:
        page = _page(folder)
    except TutelageError as error:
        faults = [error, *faults]
    raise_all(faults)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise _unwritable(out, error.strerror or str(error)) from error
    return path


def _faults_of(out: Path) -> list[TutelageError]:
    """Faults of --out that are known before anything is written."""
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        return [_unwritable(out, f"{nearest} is a file")]
    path = out / "index.html"
    if path.exists() and GENERATOR not in _start_of(path):
        hint = "choose another --out: a new folder, or one with such a page"
        return [TutelageError(f"--out {out}: its index.html was not written by tutelage demo-page", hint)]
    return []


def _start_of(path: Path) -> str:
    """Return how a file begins; an empty text if it cannot be read."""
    with suppress(OSError):
        return bytes_in(path)[:1000].decode(errors="replace")
    return ""


def _unwritable(out: Path, reason: str) -> TutelageError:
    return TutelageError(f"--out {out}: {reason}", "choose another --out, a folder that can be written")


def server_of(port: int) -> ThreadingHTTPServer:
    """Open a server that only this computer can reach; it answers nothing before `serve`.

    Args:
        port: 0 takes any free port.

    Raises:
        TutelageError: the port is in use, or using it is not permitted.
    """
    try:
        return ThreadingHTTPServer((LOOPBACK, port), BaseHTTPRequestHandler)
    except OSError as error:
        hint = f"choose another --port ({port + 1}, or 0 for any free port), or stop the program that uses it"
        raise TutelageError(f"--port {port}: {error.strerror}", hint) from error


def serve(server: ThreadingHTTPServer, page: bytes) -> None:
    """Answer / and /index.html with the page until Ctrl-C."""

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the browser was closed, or dropped the connection
                super().handle()

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").split(":")[0].lower()
            if host not in (LOOPBACK, "localhost"):  # a page of another site asks
                self.send_error(403)
                return
            if self.path.partition("?")[0] not in ("/", "/index.html"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None: ...

    server.RequestHandlerClass = Handler
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def _page(folder: Path) -> str:
    """The HTML of an export folder's page. Raises TutelageError: see write_page."""
    name, export, data = _checked(folder)
    about = _preprocess(folder, data[ABOUT])
    labels = labels_of(data[LABELS], export, about, folder / LABELS)
    package = files("tutelage")
    runtime = package / "deploy" / "onnxruntime_web"
    sources = ("page.css", "preprocess.js", "page.js")
    texts = {name: (package / "deploy" / "page" / name).read_text(encoding="utf-8") for name in sources}
    everything = json.dumps({"labels": labels, "preprocess": about, "tall_first": TALL_FIRST})
    environment = Environment(loader=PackageLoader("tutelage", "deploy/page"), autoescape=True)
    return environment.get_template("index.html.j2").render(
        generator=f"{GENERATOR} {__version__}", title=_title(folder), labels=labels, version=__version__, file=name,
        megabytes=len(data[name]) / 1e6, size=about["size"], resize=about["resize"], unsure_below=about["unsure_below"],
        style=Markup((package / "reporting" / "style.css").read_text(encoding="utf-8") + texts["page.css"]),
        wasm=Markup(_packed(lzma.decompress((runtime / "ort-wasm-simd-threaded.wasm.xz").read_bytes()))),
        model=Markup(_packed(data[name])), about=Markup(everything.replace("<", "\\u003c")),
        runtime=(runtime / "VERSION").read_text(encoding="utf-8").partition(",")[0],
        licence=Markup((runtime / "LICENSE").read_text(encoding="utf-8")),
        ort=Markup(_as_global((runtime / "ort.wasm.bundle.min.mjs").read_text(encoding="utf-8"))),
        preprocess=Markup(texts["preprocess.js"]), script=Markup(texts["page.js"]),
    )  # fmt: skip


def _checked(folder: Path) -> tuple[str, JSON, dict[str, bytes]]:
    """Return the name of the model that export.json recommends, what it says, and the bytes of the files a page needs, their hashes
    checked."""
    export = listed(folder, "--export ")
    name = recommended_of(export, (*NAMES.values(),), folder / EXPORT)
    if (folder / name).is_file() and (large := (folder / name).stat().st_size) > MEGABYTES * 1e6:
        message = f"{name} is {large / 1e6:,.0f} MB, but browsers can open models of at most {MEGABYTES} MB"
        hint = "use a smaller student, or `tutelage predict`, which has no such limit"
        raise TutelageError(f"--export {folder}: {message}", hint)
    data = {one: (folder / one).read_bytes() for one in (name, LABELS, ABOUT) if (folder / one).is_file()}
    odd = [
        f"{one} ({'changed' if one in data else 'missing'})"
        for one in (name, LABELS, ABOUT)
        if one not in data or hashlib.sha256(data[one]).hexdigest() != export["files"].get(one)
    ]
    if odd:
        message = f"--export {folder}: files do not match the hashes in {EXPORT}: {shown(odd)}"
        raise TutelageError(message, "restore them, or export again")
    field, version = data[name][:1], data[name][1:2]  # the first field of an ONNX file is its IR version, one byte
    if field == b"\x08" and version > bytes([IR_VERSION]):
        message = f"{name} has ONNX IR version {version[0]}; onnxruntime-web reads version {IR_VERSION} or less"
        hint = f"export again with tutelage {__version__}, or lower the model's ir_version"
        raise TutelageError(f"--export {folder}: {message}", hint)
    return name, export, data


def _preprocess(folder: Path, data: bytes) -> JSON:
    """Return what the page needs of preprocess.json, checked."""
    about = preprocess_of(data, folder / ABOUT)
    if about.get("task") == "segmentation":
        message = f"{folder} holds a segmentation model, but the page needs a classifier"
        raise TutelageError(message, "use `tutelage predict`, which writes masks")
    if not isinstance(about["size"], int):
        message = f"{folder} holds a model for images of {about['size']} pixels, but the page needs squares"
        raise TutelageError(message, "use `tutelage predict`, or train with a --student-size of one number")
    return {name: about.get(name) for name in NEEDED}


def _title(folder: Path) -> str:
    """The name of the run if the folder is its `export`, else the folder's own name."""
    path = folder.resolve()
    return shown([(path.parent.name if path.name == "export" else path.name) or "model"])


def _packed(data: bytes) -> str:
    """gzip in base 64; equal bytes give equal text."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def _as_global(bundle: str) -> str:
    """Turn the bundle of onnxruntime-web into a script that sets `ort`: inline modules cannot import from each other."""
    body, _, exports = bundle.rpartition("export{")
    pairs = [pair.split(" as ") for pair in exports.partition("}")[0].split(",")]
    return body + "globalThis.ort={" + ",".join(f"{name}:{own}" for own, name in pairs if name != "default") + "};"
