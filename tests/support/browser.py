"""Pages in a browser: headless Chromium, without a network."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NARROWEST = 500
"""Pixels that a headless window is wide at least."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of a Chromium; the test is skipped where there is none, unless CI says that there must be one."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        assert os.environ.get("CGGR_BROWSER") != "required", "no Chromium, and CGGR_BROWSER=required"
        pytest.skip("no Chromium on this machine (Debian's package chromium; .ci/run installs it)")
    return path


def look(browser: str, page: Path, profile: Path, *options: str, size: tuple[int, int] = (1100, 900)) -> str:
    """Open a page with a fresh profile and no name resolution, and return the output."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run",
        "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1", "--hide-scrollbars",
        f"--window-size={size[0]},{size[1]}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def widths(browser: str, page: Path, folder: Path, *, width: int) -> tuple[int, int]:
    """Width of a page's content in a view of the given pixels, and the view's own width."""
    told = """<script>addEventListener("load", () => {
      const view = document.querySelector("iframe").contentWindow;
      document.body.dataset.widths = [view.document.documentElement.scrollWidth, view.innerWidth];
    });</script>"""
    framed = in_frame(page, folder, width=width, height=900, after=told)
    dom = look(browser, framed, folder / f"profile-{width}", "--dump-dom", size=(max(width, NARROWEST), 900))
    found = re.search(r'data-widths="(\d+),(\d+)"', dom)
    assert found is not None
    return int(found[1]), int(found[2])


def picture_of(browser: str, page: Path, folder: Path, *, size: tuple[int, int]) -> Path:
    """Path of a picture of a page in a view of that size, a phone's too."""
    path, (width, height) = folder / f"picture-{size[0]}.png", size
    window = (max(width, NARROWEST), height)
    framed = in_frame(page, folder, width=width, height=height)
    look(browser, framed, folder / f"picture-profile-{width}", f"--screenshot={path}", size=window)
    from PIL import Image

    Image.open(path).crop((0, 0, width, height)).save(path)
    return path


def in_frame(page: Path, folder: Path, *, width: int, height: int, after: str = "") -> Path:
    """A page that shows ``page`` in a frame of that size: a headless window is never narrower than 500 pixels."""
    path = folder / f"framed-{width}.html"
    source = html.escape(page.read_text(encoding="utf-8"))
    style = f"border: 0; width: {width}px; height: {height}px"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin: 0"><iframe style="{style}" '
        f'srcdoc="{source}"></iframe>{after}</body>',
        encoding="utf-8",
    )
    return path
