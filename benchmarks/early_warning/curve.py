"""The picture of docs/early_warning.md: what share of failing runs was warned with at least so much left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.early_warning.score import CLOCKS, LEFT

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 620, 24, 248
_COLOURS = {"slow": "#c2410c", "fast": "#1d4ed8"}
_DASHES = {"material": "", "strict": ' stroke-dasharray="5 4"'}


def picture(row: Mapping[str, Any]) -> str:
    """An SVG of one row: slow and fast, by the material onset (solid) and by the strict one (dashed)."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#475569">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = _x(tick), _y(tick)
        parts += [
            f'<path d="M{_LEFT} {y:g}H{_RIGHT}" stroke="#e2e8f0"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:g}" text-anchor="end">{tick:.0%}</text>',
            f'<text x="{x:g}" y="{_BOTTOM + 18}" text-anchor="middle">{tick:.0%}</text>',
        ]
    label_y = _TOP + 4
    for clock in CLOCKS:
        for which, dash in _DASHES.items():
            at = row.get(clock, {}).get("all", {}).get(which, {})
            if "warned_with_left" not in at:
                continue
            points = _path(at["warned_with_left"])
            parts.append(f'<path d="{points}" fill="none" stroke="{_COLOURS[clock]}" stroke-width="2"{dash}/>')
            parts.append(
                f'<path d="M{_RIGHT - 190} {label_y - 4}h24" stroke="{_COLOURS[clock]}" stroke-width="2"{dash}/>'
                f'<text x="{_RIGHT - 160}" y="{label_y}">{clock}, {which} onset: {at["runs"]} runs</text>'
            )
            label_y += 18
    parts += [
        f'<text x="{(_LEFT + _RIGHT) / 2:g}" y="{_HEIGHT - 10}" text-anchor="middle">'
        "at least this share of the way to the onset left</text>",
        f'<text x="14" y="{(_TOP + _BOTTOM) / 2:g}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(_TOP + _BOTTOM) / 2:g})">failing runs warned</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _path(shares: Sequence[float]) -> str:
    points = [f"{_x(left):.1f} {_y(share):.1f}" for left, share in zip(LEFT, shares, strict=True)]
    return "M" + "L".join(points)


def _x(share: float) -> float:
    return _LEFT + share * (_RIGHT - _LEFT)


def _y(share: float) -> float:
    return _BOTTOM - share * (_BOTTOM - _TOP)
