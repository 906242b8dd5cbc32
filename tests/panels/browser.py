"""Chromium without a window: what a page holds once its scripts have run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def dom(page: Path, scratch: Path, query: str = "") -> str:
    """The document as it stands after ten virtual seconds, and what was said on the console behind it."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    assert program is not None, f"the report is tested in a browser, and none of {', '.join(_NAMES)} is installed"
    size, patience = "--window-size=1400,2000", "--virtual-time-budget=10000"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", size, patience]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    flags += ["--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [program, *flags, f"--user-data-dir={scratch}", f"file://{page}{query}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout + "\n".join(console)
