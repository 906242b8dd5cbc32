"""Alerts as text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traindiag.alerts.alert import Alert, Remedy
from traindiag.alerts.text import duration, escape, markdown, one_line, render
from traindiag.rules.wording import number

ALERT = Alert(
    "1f", "opened", "attention/logit-range", "run", 0, 120, 0.0, 3, "warning", "slow", "attention",
    "attention/logit_range", "blocks.0.attn head 3", 412.0, 1e3, "forecast", (1800.0, 2300.0, 3240.0),
    (10440.0, 13800.0, 19440.0), "Attention logits will pass 1e3", "it grows " * 30, "queries and keys grow",
    ("a key bias",), (Remedy("Lower the peak learning rate from 0.1 to 0.03.", {"lr": 0.03}, "restart", "a paper"),),
)  # fmt: skip


def test_a_block_says_what_where_when_why_and_what_to_do() -> None:
    text = render(ALERT)
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "WARNING  Attention logits will pass 1e3", "blocks.0.attn head 3, rank 3", "412, limit 1e3",
        "in 2300 steps (1800-3240), 3 h 50 min (2.9-5.4 h)", "queries and keys grow", "a key bias",
        "1. Lower the peak learning rate from 0.1 to 0.03. (restart) [a paper]",
    ):  # fmt: skip
        assert words in text
    assert "crosses" not in render(replace(ALERT, steps_to_limit=None, time_to_limit=None))
    assert "(closed)" in render(replace(ALERT, status="closed"))


def test_one_line_is_one_line() -> None:
    said = one_line(replace(ALERT, where="x", title="a\nb\x1b[31m"))
    assert said.startswith(
        "WARNING step 120: a\\nb\\x1b[31m (attention/logit_range 412, limit 1e3; crosses in 2300 steps"
    )
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a|b", "[x](javascript:y)", "`code`", "**b**", "x\n# head", "\u202eabc"]
)
def test_a_hostile_layer_name_is_shown_as_text(name: str) -> None:
    said = markdown(replace(ALERT, where=name, title=f"logits at {name}"))
    plain = markdown(replace(ALERT, where="w", title="logits at w"))
    assert len(said.splitlines()) == len(plain.splitlines())
    assert "<" not in said
    assert "\u202e" not in said
    for mark in ("|", "[x]", "`code", "**b"):
        assert mark not in said.replace(f"\\{mark[0]}", "")


@given(st.text())
def test_escaped_text_has_no_live_markup(text: str) -> None:
    escaped = escape(text)
    assert not set(escaped) & set("<>\n\r")
    for i, c in enumerate(escaped):
        if c in "`*_[]|~":
            assert i
            assert escaped[i - 1] == "\\"


def test_numbers_and_times_are_humane() -> None:
    cases = [0.0, 1e3, 1200.0, 1234.0, 9999.9, 123456.0, 0.00012, 65504.0, float("inf")]
    assert [number(x) for x in cases] == ["0", "1e3", "1.2e3", "1234", "1e4", "1.23e5", "1.2e-4", "6.55e4", "inf"]
    assert [duration(s) for s in (59.6, 3540.0, 3600.0, 86399.0, float("inf"))] == [
        "1 min", "59 min", "1 h", "1 d", "never",
    ]  # fmt: skip
