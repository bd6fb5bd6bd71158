"""A page in a real headless Chromium: what it shows, measured in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "no Chromium on this machine (Debian: apt install chromium)"

MEASURE = """<script>addEventListener("load", () => { const root = document.documentElement;
const out = [...document.querySelectorAll("svg")].flatMap(s => { const b = s.getBoundingClientRect();
  return [...s.querySelectorAll("text")].filter(t => { const r = t.getBoundingClientRect();
    return r.left < b.left - 1 || r.right > b.right + 1; }).map(t => t.textContent); });
const letters = [...document.querySelectorAll("svg text")].map(t =>
  parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b));
const found = JSON.stringify({ inner: innerWidth, smallest: Math.min(99, ...letters), scroll: root.scrollWidth, client: root.clientWidth,
  missing: [...document.images].filter(i => !i.complete || !i.naturalWidth).length, images: document.images.length, out: out,
  ground: getComputedStyle(document.body).backgroundColor });
document.body.dataset.found = found; parent.postMessage(found, "*"); });</script>"""
# Headless windows are at least 500 pixels wide: a narrower page is looked at in a frame.
FRAME = """<!doctype html><html lang="en"><body style="margin:0"><script>
addEventListener("message", event => { document.body.dataset.found = event.data; });</script>
<iframe src="page.html" style="border:0;width:{width}px;height:2000px"></iframe></body></html>"""
SMALLEST = 9  # pixels of letters in a chart that can be read


def check_in_browser(text: str, folder: Path, width: int, scheme: str) -> None:
    """Fail unless the page shows without errors, missing images, sideways scrolling or text outside of its chart.

    Args:
        text: of the page. folder: for files of the browser. width: in pixels. scheme: "light" or "dark".
    """
    page = folder / "page.html"
    page.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    shown = page
    if width < 500:
        shown = folder / "frame.html"
        shown.write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={max(width, 500)},2000",
         f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
         "--virtual-time-budget=3000", "--dump-dom", f"file://{shown}"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    told = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert told["inner"] == width
    assert told["scroll"] <= told["client"], "the page scrolls sideways"
    assert told["smallest"] >= SMALLEST, f"letters of {told['smallest']:.1f} pixels in a chart"
    assert told["images"] > 0
    assert told["missing"] == 0
    assert told["out"] == [], f"words outside of their chart: {told['out']}"
    assert told["ground"] == ("rgb(251, 251, 249)" if scheme == "light" else "rgb(20, 21, 23)")
    assert "CONSOLE" not in done.stderr


def told_in_browser(page: Path, folder: Path, width: int = 1600, scheme: str = "light") -> tuple[Any, list[str]]:
    """What a page tells by console.log("told: " + JSON), as soon as it does: for pages that need time of their own.

    Args:
        page: opened from its file. folder: for files of the browser. width: in pixels. scheme: "light" or "dark".

    Returns:
        told: the value. others: all else that came on the console.
    """
    assert CHROMIUM is not None
    browser = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},2000",
         f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
         "--remote-debugging-port=0", f"file://{page}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )  # fmt: skip
    limit = threading.Timer(60, os.killpg, (browser.pid, signal.SIGKILL))
    limit.start()
    others: list[str] = []
    try:
        assert browser.stderr is not None
        for line in browser.stderr:
            if told := re.search(r'CONSOLE.*"told: (.*)", source: ', line):
                return json.loads(told[1]), others
            if "CONSOLE" in line:
                others.append(line)
        raise AssertionError(f"the page told nothing: {others}")
    finally:
        limit.cancel()
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
