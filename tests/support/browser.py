"""Pages as a browser shows them: headless Chromium, without a network."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    """Open a page with a fresh profile and every host name unresolvable; what it prints."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run",
        "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1", "--hide-scrollbars",
        f"--window-size={size[0]},{size[1]}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def widths(browser: str, page: Path, folder: Path, *, width: int) -> tuple[int, int]:
    """Width of what a page shows at a window of so many pixels, and that window's own."""
    told = "<script>document.body.dataset.widths = [document.documentElement.scrollWidth, innerWidth]</script></body>"
    measured = folder / f"measured-{width}.html"
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", told), encoding="utf-8")
    dom = look(browser, measured, folder / f"profile-{width}", "--dump-dom", size=(width, 900))
    found = re.search(r'data-widths="(\d+),(\d+)"', dom)
    assert found is not None
    return int(found[1]), int(found[2])
