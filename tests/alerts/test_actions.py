"""Which alerts an action is for, and what is told of one that is asked for wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from traindiag import Alert, Call, Raise, SaveCheckpoint, Settings, StopTraining, TrainingAlert

ALERT = Alert(
    "1f", "opened", "gradient/norm-spike", "run", 0, 7, 0.0, None, "warning", "fast", "gradient", "gradient/norm", "",
    30.0, 10.0, "spike", title="The gradient norm jumped",
)  # fmt: skip


class Diagnosed:
    """An alert with a diagnosis, as alerts come to have one."""

    def __init__(self, diagnosis: str) -> None:
        self.diagnosis = diagnosis

    def __getattr__(self, name: str) -> Any:
        return getattr(ALERT, name)


@pytest.mark.parametrize(
    ("conditions", "change", "wanted"),
    [
        ({}, {}, True),
        ({}, {"severity": "info"}, False),
        ({}, {"severity": "critical"}, True),
        ({}, {"status": "escalated"}, True),
        ({}, {"status": "closed"}, False),
        ({"severity": "info"}, {"severity": "info"}, True),
        ({"severity": "critical"}, {}, False),
        ({"clock": "fast"}, {}, True),
        ({"clock": "slow"}, {}, False),
        ({"status": ["closed"]}, {"status": "closed"}, True),
        ({"status": ["closed"]}, {}, False),
        ({"diagnosis": "gradient/*"}, {}, True),
        ({"diagnosis": "Gradient/*"}, {}, False),
        ({"diagnosis": "attention/*"}, {}, False),
    ],
)
def test_conditions(conditions: dict[str, Any], change: dict[str, Any], wanted: bool) -> None:
    alert = replace(ALERT, **change)
    called: list[Alert] = []
    Call(called.append, **conditions)(alert)
    assert called == ([alert] if wanted else [])
    assert Raise(**conditions).wants(alert) is wanted


def test_diagnosis_is_matched_by_its_name_and_by_its_rules() -> None:
    alert: Any = Diagnosed("attention-logit-growth")
    assert StopTraining(diagnosis="attention-*").wants(alert)
    assert StopTraining(diagnosis="gradient/norm-spike").wants(alert)
    assert not StopTraining(diagnosis="output-*").wants(alert)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"severity": "warn"}, "severity must be one of info, warning, critical, got 'warn'. Did you mean 'warning'"),
        ({"clock": "fats"}, "clock must be one of fast, slow, got 'fats'. Did you mean 'fast'"),
        ({"status": ["open"]}, "status must be one of opened, escalated, closed, got 'open'. Did you mean 'opened'"),
        ({"status": "opened"}, "status must be a list of"),
        ({"status": []}, "at least one of"),
        ({"diagnosis": ""}, "diagnosis must be a glob"),
        ({"diagnosis": None}, "diagnosis must be a glob"),
    ],
)
def test_wrong_condition_is_told_when_it_is_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        StopTraining(**arguments)
    assert message in str(error.value)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="Call needs a function of an Alert, got 'print'"):
        Call("print")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SaveCheckpoint: save must be a function of a checkpoint's name, got 'x'"):
        SaveCheckpoint("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got closed"):
        SaveCheckpoint(status=["closed"])
    with pytest.raises(TypeError, match=r"actions such as Raise\(\), got <class .*StopTraining'>"):
        Settings(actions=[StopTraining])  # the parentheses are missing


def test_error_says_what_the_alert_says() -> None:
    error = TrainingAlert(ALERT)
    assert error.alert is ALERT
    assert str(error) == "WARNING step 7: The gradient norm jumped (gradient/norm 30, limit 10)"
