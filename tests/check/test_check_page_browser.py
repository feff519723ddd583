"""The page of a check in a browser: no complaint, no request, nothing wider than the screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.check.page_samples import bundle, failing, passing
from toolchain.bench.page import page
from toolchain.bench.results import BenchReport, ContenderResult, Spread
from toolchain.check.page import POLICY, render
from toolchain.check.report import CheckReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
PHONE, DESKTOP = (390, 1600), (1280, 1600)


class Browser:
    """A browser without a window, with a profile of its own and without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, path: Path, *options: str, size: tuple[int, int] = DESKTOP) -> subprocess.CompletedProcess[str]:
        command = [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *(f"--user-data-dir={self.folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(
                "--enable-logging=stderr",
                f"--log-net-log={self.folder / 'net.json'}",
                f"--window-size={size[0]},{size[1]}",
            ),
            *options,
            path.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    def open(self, html: str) -> tuple[str, list[str], list[str]]:
        """The document once it is loaded, what the console said, and what the page requested but for itself."""
        path = self.folder / "page.html"
        path.write_text(html, encoding="utf-8")
        done = self.run(path, "--dump-dom")
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, console, self.requests()

    def requests(self) -> list[str]:
        """Of pages alone: requests of the browser itself (updates, time) have no origin."""
        events = json.loads((self.folder / "net.json").read_text())["events"]
        found = [e["params"] for e in events if "initiator" in e.get("params", {})]
        return [params["url"] for params in found if params["initiator"] != "not an origin"]

    def screenshot(self, html: str, size: tuple[int, int], *options: str) -> np.ndarray:
        path = self.folder / "page.html"
        path.write_text(html, encoding="utf-8")
        self.run(path, f"--screenshot={self.folder / 'page.png'}", *options, size=size)
        with Image.open(self.folder / "page.png") as image:
            return np.asarray(image.convert("RGB"))


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


@pytest.mark.parametrize("made", [passing, failing])
def test_the_page_loads_without_complaint_or_request(browser: Browser, made: type[CheckReport]) -> None:
    dom, console, requests = browser.open(render(made(), bundle()))
    assert console == []
    assert requests == []
    assert "sha256" in dom
    assert "<script" not in dom


def test_complaints_and_requests_would_be_seen(browser: Browser) -> None:
    loads = '<img src="http://example.invalid/a.png"><script>console.error("boo")</script>'
    html = render(passing(), bundle()).replace("</body>", f"{loads}</body>")
    _, console, requests = browser.open(html.replace(POLICY.replace("'", "&#x27;"), ""))
    assert any("boo" in line for line in console)
    assert requests == ["http://example.invalid/a.png"]
    _, console, requests = browser.open(html)
    assert requests == []  # the page's own policy stops what gets past the escaping
    assert not any('"boo"' in line for line in console)
    assert len(console) >= 2


@pytest.mark.parametrize("width", [PHONE[0], DESKTOP[0]])
def test_the_page_is_as_wide_as_the_screen(browser: Browser, width: int) -> None:
    """With everything unfolded: only tables are wider, and they scroll in boxes of their own."""
    html = render(failing(), bundle()).replace("<details>", "<details open>")
    # In a frame, because a window is 500 pixels wide at least.
    measured = "d.documentElement.clientWidth, d.documentElement.scrollWidth, boxes.filter(wide).length"
    frame = f"""<!doctype html><iframe id="f" width="{width}" height="900" style="border: 0" srcdoc="{escape(html)}">
        </iframe><script>f.onload = () => {{
            const d = f.contentDocument, boxes = [...d.querySelectorAll('.scroll')];
            const wide = box => box.scrollWidth > box.clientWidth;
            document.title = ['widths', {measured}].join(' ');
        }}</script>"""
    dom, _, _ = browser.open(frame)
    match = re.search(r"<title>widths (\d+) (\d+) (\d+)</title>", dom)
    assert match
    assert (int(match[1]), int(match[2])) == (width, width)
    assert (int(match[3]) > 0) == (width == PHONE[0])


def bench_page() -> str:
    """Every contender, with times of the longest kind."""

    def times(ms: float) -> Spread:
        return Spread(ms, ms * 0.9, ms * 1.1)

    names = ("diffbuild", "diffusers", "compile", "openvino")
    stages = {stage: times(11852.3) for stage in ("tokenize_ms", "text_ms", "denoise_ms", "decode_ms", "overhead_ms")}
    result = ContenderResult(
        {"process_ms": 50.0, "imports_ms": 2e4}, stages, times(61234.5), 48123.0, {}, 2180.0, 4100.0
    )
    work = {"prompt": "a red circle", "batch": 1, "size": "1024x1024", "steps": 50, "scheduler": "model"}
    return page(
        BenchReport(
            bundle="bundle",
            recipe="sdxl-fp16-tensorrt",
            workload={**work, "guidance": 5.0},
            repeats=5,
            machine={"cpu": "AMD EPYC 9354 32-Core Processor", "cpu_features": "x86_64-avx512", "cores": 32},
            versions={"diffusers": "0.42.1"},
            contenders=dict.fromkeys(names, result),
            ratios={name: [1.5] for name in names[1:]},
            likeness_db=dict.fromkeys(names[1:], 89.25),
            sweeps={"steps": [{"steps": str(n), "total_ms": 1e3 * n, "images": 1} for n in (5, 10, 20, 40)]},
            pictures=dict.fromkeys(names, np.full((64, 96, 3), 200, np.uint8)),
        )
    )


def test_nothing_of_a_benchmark_is_cut(browser: Browser) -> None:
    """Neither the page nor its table is wider than the screen, on a phone and on a desktop."""
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{escape(bench_page())}"></iframe>'
        for width in (PHONE[0], DESKTOP[0])
    )
    script = """<script>onload = () => {
        const of = f => { const d = f.contentDocument, root = d.documentElement;
            const smallest = Math.min(...[...d.querySelectorAll('td, td span, p, div')].map(
                e => parseFloat(f.contentWindow.getComputedStyle(e).fontSize)));
            return [root.scrollWidth - root.clientWidth, ...[...d.querySelectorAll('.scroll')].map(
                b => b.scrollWidth - b.clientWidth), smallest, d.images[0].naturalWidth]; };
        document.title = 'measured ' + [...document.querySelectorAll('iframe')].map(of).join(';');
    }</script>"""
    dom, console, requests = browser.open(f"<!doctype html>{frames}{script}")
    match = re.search(r"<title>measured ([^<]*)</title>", dom)
    assert match
    for found in match[1].split(";"):
        page_over, table_over, smallest_px, picture = map(float, found.split(","))
        assert (page_over, table_over, picture) == (0, 0, 96)
        assert smallest_px >= 11
    assert (console, requests) == ([], [])


def test_a_click_enlarges_a_picture_and_another_one_ends_that(browser: Browser) -> None:
    frame = f"""<!doctype html><iframe id="f" width="{PHONE[0]}" height="900" style="border: 0"
        srcdoc="{escape(render(failing(), bundle()))}"></iframe><script>f.onload = () => {{
            const image = f.contentDocument.images[1], widths = [image.clientWidth];
            for (let i = 0; i < 2; i++) {{ image.click(); widths.push(image.clientWidth + 'x' + image.clientHeight); }}
            document.title = ['clicked', ...widths].join(' ');
        }}</script>"""
    dom, _, _ = browser.open(frame)
    match = re.search(r"<title>clicked (\d+) (\d+)x(\d+) (\d+)x\d+</title>", dom)
    assert match
    small, width, height, again = map(int, match.groups())
    assert small < PHONE[0] / 3
    assert (width, height, again) == (PHONE[0], 900, small)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_light_and_dark_follow_the_reader(browser: Browser, size: tuple[int, int]) -> None:
    html = render(failing(), bundle())
    light = browser.screenshot(html, size, "--blink-settings=preferredColorScheme=1")
    dark = browser.screenshot(html, size, "--blink-settings=preferredColorScheme=0")
    assert light.shape == dark.shape == (size[1], size[0], 3)
    assert light[2, 2].min() > 240
    assert dark[2, 2].max() < 60
    # There is something to read in both: the ground is not all there is.
    assert light.std() > 20
    assert dark.std() > 20
