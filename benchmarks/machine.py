"""What a benchmark ran on, for the JSON that it leaves behind."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version

_PACKAGES = ("traindiag", "torch", "lightning", "numpy", "tensorboard")


def machine(*packages: str) -> dict[str, str]:
    """Processor, Python, versions and date; no host name.

    Args:
        packages: Whose versions count beside the usual ones.
    """
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{package: version(package) for package in (*_PACKAGES, *packages)},
    }
