"""What the page is made of: our own few files, and plotly's script as it lies in its Python package."""

from __future__ import annotations

import gzip
import importlib.util
from functools import lru_cache
from importlib import resources
from pathlib import Path

TYPES = {".js": "text/javascript", ".css": "text/css"}
INSTALL = (
    'Charts need plotly. Install it beside TensorBoard and start TensorBoard again: pip install "traindiag[tab]"'
)


@lru_cache(maxsize=1)
def static_files() -> dict[str, bytes]:
    """Every file that may be asked for, by its name: no path is ever made of what a client sends."""
    folder = resources.files("traindiag.tensorboard_plugin") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if Path(file.name).suffix in TYPES}


def plotly_script() -> Path | None:
    """Where plotly's script lies; None where there is no plotly, or none that has it."""
    try:
        spec = importlib.util.find_spec("plotly")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        script = Path(folder) / "package_data" / "plotly.min.js"
        if script.is_file():
            return script
    return None


@lru_cache(maxsize=1)
def packed(script: Path) -> bytes:
    """The script compressed, once for all who ask."""
    return gzip.compress(script.read_bytes(), compresslevel=6, mtime=0)
