"""How figures look: colours that the colour-blind can tell apart, in both themes, one scale for each meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Theme = Literal["light", "dark"]
Scale = list[list[Any]]

FONT = 'Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

_VIRIDIS = (
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#fde725",
)
_CIVIDIS = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)
_MAKO = ("#0b0405", "#251729", "#382a54", "#40498e", "#366da0", "#3492a8", "#38b2ac", "#7ad1b0", "#b9e6d1", "#def5e5")


def _stops(colours: tuple[str, ...]) -> Scale:
    last = len(colours) - 1
    return [[round(i / last, 4), colour] for i, colour in enumerate(colours)]


SCALES: dict[str, Scale] = {
    "size": _stops(_VIRIDIS),  # bright is large: logits, norms, activations
    "entropy": _stops(_CIVIDIS),  # dark is sharp
    "share": _stops(_MAKO),  # from none to all
}
"""One scale for each meaning, by explicit stops: plotly.js knows few names and replaces the others silently."""


@dataclass(frozen=True)
class Palette:
    """Colours of one theme.

    Args:
        text: Of titles and numbers.
        faint: Of axes and what is said by the way.
        grid: Of grid lines.
        empty: Behind cells that were not measured.
        series: Of lines, in order (Okabe and Ito 2008).
        info: Of notes.
        warning: Of warnings.
        critical: Of critical alerts.
        healthy: Of what was seen and found sound.
        nonfinite: Of NaN and infinity.
        surface: Of the page, for labels that lie over lines.
    """

    text: str
    faint: str
    grid: str
    empty: str
    series: tuple[str, ...]
    info: str
    warning: str
    critical: str
    healthy: str
    nonfinite: str
    surface: str

    def of(self, severity: str) -> str:
        """The colour of a severity."""
        return {"critical": self.critical, "warning": self.warning}.get(severity, self.info)


PALETTES: dict[str, Palette] = {
    "light": Palette(
        text="#1b2430",
        faint="#66717f",
        grid="#e8ebef",
        empty="#eef0f3",
        series=("#0072b2", "#d98c00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5b4fa2", "#444c56"),
        info="#3b82c4",
        warning="#d98200",
        critical="#c8442a",
        healthy="#00855f",
        nonfinite="#d01c8b",
        surface="#ffffff",
    ),
    "dark": Palette(
        text="#e6eaf0",
        faint="#97a3b2",
        grid="#2a323c",
        empty="#232a33",
        series=("#56b4e9", "#f0a93b", "#2fc79b", "#e39cc4", "#f0e442", "#a99bea", "#ff9d80", "#b8c1cc"),
        info="#6fb1ea",
        warning="#f0a93b",
        critical="#ff7a59",
        healthy="#2fc79b",
        nonfinite="#ff5fc0",
        surface="#171c23",
    ),
}

SYMBOLS = {"info": "circle", "warning": "triangle-up", "critical": "diamond"}
"""Severities differ by shape as well as by colour."""


def palette(theme: str) -> Palette:
    """The colours of a theme.

    Raises:
        ValueError: If there is no such theme.
    """
    if theme not in PALETTES:
        raise ValueError(f"theme must be 'light' or 'dark', got {theme!r}")
    return PALETTES[theme]


def axis(colours: Palette, title: str = "", **more: Any) -> dict[str, Any]:
    """An axis with quiet lines."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": colours.faint}, "standoff": 8},
        "gridcolor": colours.grid,
        "linecolor": colours.grid,
        "tickfont": {"size": 11, "color": colours.faint},
        "zeroline": False,
        "automargin": True,
        **more,
    }


def layout(colours: Palette, height: int, **more: Any) -> dict[str, Any]:
    """What all figures have in common; the page lends its background."""
    return {
        "height": height,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": colours.text},
        "margin": {"l": 56, "r": 20, "t": 34, "b": 44},
        "hoverlabel": {
            "font": {"family": FONT, "size": 12, "color": colours.text},
            "bgcolor": colours.surface,
            "bordercolor": colours.grid,
            "align": "left",
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 11, "color": colours.text},
            "bgcolor": "rgba(0,0,0,0)",
        },
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": colours.faint, "activecolor": colours.text},
        **more,
    }
