"""The documentation site: it builds without a warning, fits telephones, and quotes messages that the code can print."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage
from browser import CHROMIUM, NO_CHROMIUM, SMALLEST, told_in_browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LACKING = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
WIDTHS = (400, 1600)

# In every page: when asked, say by how much it is too wide (Furo scrolls `.content`, not the window), and how wide each image is.
ANSWER = """<script>addEventListener("message", event => {
const over = [...document.querySelectorAll("html, .content")].map(one => one.scrollWidth - one.clientWidth);
parent.postMessage({ inner: innerWidth, over: Math.max(...over),
  images: [...document.images].map(one => [one.src.split("/").pop(), one.naturalWidth && one.clientWidth]) }, "*"); });</script>"""
# One page that opens all of them in a frame, one after the other, at each width.
ASK = """<!doctype html><html lang="en"><body><script>
const told = {}, frame = document.body.appendChild(document.createElement("iframe"));
const once = (target, name) => new Promise(done => target.addEventListener(name, done, { once: true }));
(async () => { for (const page of PAGES) {
  frame.src = page; await once(frame, "load"); told[page] = [];
  for (const width of WIDTHS) { frame.style = `border:0;width:${width}px;height:900px`;
    const answer = once(window, "message"); frame.contentWindow.postMessage("", "*"); told[page].push((await answer).data); } }
  console.log("told: " + JSON.stringify(told)); })();
</script></body></html>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    if LACKING:
        pytest.skip(f"not installed: {', '.join(LACKING)} (pip install 'tutelage[docs]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_site_builds_without_a_warning(site):
    """Every page of docs/ is on the site and reached from another one; a broken link or a broken docstring fails the build."""
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists()


@pytest.mark.slow
def test_every_function_is_in_the_api(site):
    """The API page has every function of `import tutelage` and every loss, with the text of its docstring."""
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in tutelage.__all__:
        assert name in ("__version__", "losses") or f'id="tutelage.{name}"' in page
    assert "Turn a few labelled images and a gallery of unlabelled ones into a small trained model." in page
    for name in ("distillation", "feature_distance", "contrastive"):
        assert f'id="tutelage.distillation.losses.{name}"' in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_pages_fit_telephones_and_screens(site, tmp_path):
    """At 400 and 1600 pixels no page scrolls sideways or lacks an image, and the figure's letters can be read."""
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    for page in pages:
        path = site / page
        path.write_text(path.read_text(encoding="utf-8").replace("</body>", ANSWER + "</body>"), encoding="utf-8")
    (site / "frame.html").write_text(ASK.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS)))
    told, others = told_in_browser(site / "frame.html", tmp_path)
    assert others == []
    assert list(told) == pages
    wide = [(page, one) for page in pages for one in told[page] if one["over"] > 0]
    assert wide == []
    assert [one["inner"] for one in told["index.html"]] == list(WIDTHS)
    missing = [(page, name) for page in pages for one in told[page] for name, width in one["images"] if not width]
    assert missing == []
    figure = (DOCS / "figures" / "method.svg").read_text(encoding="utf-8")
    drawn = float(re.findall(r'viewBox="0 0 (\d+)', figure)[0])
    letters = min(map(float, re.findall(r"font-size: ([\d.]+)px", figure)))
    widths = [width for one in told["method.html"] for name, width in one["images"] if name == "method.svg"]
    assert len(widths) == len(WIDTHS)
    assert min(widths) / drawn * letters >= SMALLEST


def commands() -> list[str]:
    """The `tutelage` commands of the pages' sh blocks, continued lines joined."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S)]
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    return sorted(
        {line.strip().partition("  #")[0] for line in lines if re.search(r"(^|-m )tutelage \w", line.strip())}
    )


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_have_these_flags(line):
    """Every command of the pages has flags that exist and values that are allowed."""
    from tutelage.cli import _parsed
    from tutelage.settings import resolve

    words = shlex.split(line)
    function, given = _parsed(words[words.index("tutelage") + 1 :])
    assert function is not None
    assert resolve(function.settings, given)


def sentences() -> str:
    """All texts of the source, one a line, with `…` for what is filled in."""
    texts = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_messages_on_the_pages_are_those_of_the_code():
    """Every error that a page quotes begins like one that the source can print, whatever names and numbers are filled in."""
    known = [
        (len(text.replace("…", "")), re.compile(".+?".join(map(re.escape, text.split("…")))))
        for text in sentences().split("\n")
    ]
    quoted = 0
    for page in sorted(DOCS.rglob("*.md")):
        for block in re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
            joined = re.sub(r"\n(?!error: |hint: )", " ", block)  # long lines are broken on the page
            for line in re.findall(r"^error: (.*)$", joined, flags=re.M):
                quoted += 1
                fits = "match" if line.endswith("...") else "fullmatch"
                found = any(fixed > 0.2 * len(line) and getattr(one, fits)(line) for fixed, one in known)
                assert found, f"{page.name}: {line}"
    assert quoted > 15
