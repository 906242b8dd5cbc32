"""What a report tells of a run before any figure: what happened, in a few sentences and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from traindiag.alerts.text import number
from traindiag.panels.figures.events import events_of
from traindiag.panels.figures.view import View
from traindiag.panels.report.loss import loss_story
from traindiag.record.log import LogData


@dataclass(frozen=True)
class LossShown:
    """When the loss alone would have told, found by whoever can replay it.

    Args:
        judged: Number of losses.
        shown: Step at which the loss itself showed it, None where it never did.
        how: In words, such as ``is NaN``.
        six_sigma: First step at which a rule of 6 standard deviations spoke.
        six_sigma_times: How often it spoke.
        six_sigma_before: How often it had spoken before the loss showed anything: its false alarms.
    """

    judged: int
    shown: int | None = None
    how: str = ""
    six_sigma: int | None = None
    six_sigma_times: int = 0
    six_sigma_before: int = 0


@dataclass(frozen=True)
class ReportedRun:
    """One run of a report.

    Args:
        name: As it is shown.
        log: What was recorded.
        source: Where it was found.
        loss: What the loss alone would have told; None where there is no loss.
        notes: What could not be read, or has to be known.
    """

    name: str
    log: LogData
    source: str = ""
    loss: LossShown | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Args:
        runs: In the order to be shown.
        title: Of the whole.
        made: When, in words; empty in a report that must not tell.
        version: Of this package.
        hidden: What was left out on request, in words.
    """

    runs: tuple[ReportedRun, ...]
    title: str = "Training diagnostics"
    made: str = ""
    version: str = ""
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How a run is summed up.

    Args:
        state: ``critical``, ``warning``, ``info``, ``quiet`` or ``unseen``.
        headline: One sentence.
        facts: ``(title, value, note, state)`` of each number to show beside it.
        sentences: More to say, the most important first.
    """

    state: str
    headline: str
    facts: tuple[tuple[str, str, str, str], ...]
    sentences: tuple[str, ...] = field(default=())

    @property
    def label(self) -> str:
        """The state in words."""
        words = {"quiet": "nothing found", "info": "notes only", "unseen": "nothing measured"}
        return words.get(self.state, self.state)


def reported(name: str, log: LogData, source: str = "", notes: Sequence[str] = ()) -> ReportedRun:
    """A run with what its loss alone would have told: the rule of 6 standard deviations is replayed over it."""
    return ReportedRun(name, log, source, _shown(log), tuple(notes))


def _shown(log: LogData) -> LossShown | None:
    story = loss_story(log.history.get("loss/value"))
    if story is None:
        return None
    events, _ = events_of(log.alerts)
    jumps = [a.step for e in events for a in e.messages if a.signal == "loss/value" and a.kind != "nonfinite"]
    ways = (
        (story.nonfinite, "became NaN or infinite"),
        (story.risen, "rose and stayed"),
        (min(jumps, default=None), "jumped"),
    )
    step, how = min(((s, words) for s, words in ways if s is not None), key=lambda w: w[0], default=(None, ""))
    spoke = story.six_sigma
    early = sum(s < step for s in spoke) if step is not None else 0
    return LossShown(story.steps, step, how, spoke[0] if spoke else None, len(spoke), early)


def verdict(run: ReportedRun, view: View) -> Verdict:
    """Sums a run up: first warning, when the loss showed it, when a 6-sigma rule spoke, and what was missed."""
    told = [e for e in view.events if e.severity != "info"]
    at = [(step, level, e) for e in told for step, level in e.levels if level != "info"]
    warned, level, first = min(at, key=lambda found: found[0], default=(None, "plain", None))
    said = next((a for a in first.messages if a.step == warned), first.opened) if first is not None else None
    critical = [e for e in told if e.severity == "critical"]
    state = "critical" if critical else "warning" if told else "info" if view.events else "quiet"
    if not view.families:
        state = "unseen"
    loss = run.loss
    shown = loss.shown if loss is not None else None
    facts = [
        (
            "First warning",
            "none" if warned is None else f"step {warned:,}",
            said.title or said.rule if said is not None else "nothing at warning or above",
            level,
        ),
        _loss_fact(loss, shown, warned),
        _sigma_fact(loss, warned),
        _length_fact(view),
    ]
    return Verdict(
        state,
        _headline(state, (critical or told or view.events)[0].title if view.events else "", warned, shown, loss),
        tuple(facts),
        tuple(_sentences(view, loss, warned, shown)),
    )


def _headline(state: str, title: str, warned: int | None, shown: int | None, loss: LossShown | None) -> str:
    if state == "unseen":
        return "Nothing was measured."
    if warned is None and shown is not None and loss is not None:
        return f"Missed: the loss {loss.how} at step {shown:,}, and nothing had warned of it."
    if warned is None:
        return "Nothing at warning or above was found."
    if shown is not None and warned > shown and loss is not None:
        return f"Late: the loss {loss.how} at step {shown:,}, the first warning came at step {warned:,}."
    return f"{title}."


def _loss_fact(loss: LossShown | None, shown: int | None, warned: int | None) -> tuple[str, str, str, str]:
    title = "The loss showed it"
    if loss is None:
        return title, "unknown", "the loss was not measured", "unseen"
    if shown is None:
        return title, "never", f"{loss.judged:,} losses, none of them far above the lowest level", "plain"
    if warned is None:
        return title, f"step {shown:,}", f"it {loss.how}; there was no warning", "critical"
    return title, later(shown - warned), f"step {shown:,}: it {loss.how}", "plain" if shown >= warned else "critical"


def _sigma_fact(loss: LossShown | None, warned: int | None) -> tuple[str, str, str, str]:
    title = "A 6-sigma rule on the loss"
    if loss is None:
        return title, "unknown", "the loss was not measured", "unseen"
    if loss.six_sigma is None:
        why = "" if loss.judged > 128 else "; it needs 129 losses to judge one"
        return title, "never spoke", f"{loss.judged:,} losses replayed{why}", "plain"
    often = "" if loss.six_sigma_times == 1 else f", {loss.six_sigma_times} times in all"
    early = f"; {loss.six_sigma_before} of them before the loss showed anything" if loss.six_sigma_before else ""
    note = f"step {loss.six_sigma:,}{often}{early}"
    return title, f"step {loss.six_sigma:,}" if warned is None else later(loss.six_sigma - warned), note, "plain"


def _length_fact(view: View) -> tuple[str, str, str, str]:
    planned = view.log.run.length
    first = view.first_step
    value = "none" if first < 0 else f"{first:,}-{view.last_step:,}" if first else f"{view.last_step + 1:,}"
    note = "" if planned is None else f"of {planned:,} planned"
    jobs = len(view.log.segments)
    note += f"{', ' if note else ''}{jobs} jobs" if jobs > 1 else ""
    return "Steps in the log", value, note, "plain"


def later(steps: int) -> str:
    """A distance in steps.

    Example:
        >>> later(70), later(1), later(0), later(-3)
        ('70 steps later', '1 step later', 'in the same step', '3 steps earlier')
    """
    if steps == 0:
        return "in the same step"
    return f"{abs(steps):,} step{'s' * (abs(steps) != 1)} {'later' if steps > 0 else 'earlier'}"


def _sentences(view: View, loss: LossShown | None, warned: int | None, shown: int | None) -> list[str]:
    found = []
    if warned is not None and shown is None and loss is not None:
        found.append(
            "Up to the end of this log the loss has not risen: whether the warning was right cannot be told from it."
        )
    if warned is not None and loss is not None and loss.six_sigma is None:
        found.append(
            f"A rule of 6 standard deviations on the loss, replayed over {loss.judged:,} losses, was silent."
        )
    unseen = [f for f in ("attention", "output", "gradient", "optimizer", "activation") if f not in view.families]
    if unseen and view.families:
        found.append(f"Not seen at all, so that silence means nothing there: {', '.join(unseen)}.")
    notes = [e for e in view.events if e.severity == "info"]
    if notes:
        found.append(f"{len(notes)} note{'s' * (len(notes) > 1)} of less weight.")
    return found


def configuration(log: LogData) -> list[tuple[str, str]]:
    """What was trained, as far as it is known, in words."""
    run = log.run
    rows: list[tuple[str, str | None]] = [
        ("run", run.run_id or None),
        ("model", run.model),
        ("parameters", _count(run.parameters)),
        ("trainable", _count(run.trainable_parameters)),
        ("depth, width, heads", _joined(run.depth, run.width, run.heads)),
        ("normalisation", ", ".join(f"{n} {kind}" for kind, n in run.normalisation.items()) or None),
        ("planned steps", _count(run.length)),
        ("warm-up", None if run.warmup is None else f"{run.warmup:,} steps"),
        ("batch", _batch(run.batch_size, run.accumulate, run.world_size)),
        ("clipping", None if run.clip is None else f"{run.clip[0]} {run.clip[1]:g}"),
        ("precision", run.precision),
        ("device", run.device),
        ("seed", None if run.seed is None else str(run.seed)),
        ("weights", None if run.loaded_weights is None else "loaded" if run.loaded_weights else "fresh"),
    ]
    for optimizer in run.optimizers:
        settings = ", ".join(
            f"{key} {_setting(value)}" for key, value in optimizer.settings.items() if value is not False
        )
        peak = "" if optimizer.peak_lr is None else f"; peak rate {number(optimizer.peak_lr)}"
        schedule = f"; {optimizer.schedule}" if optimizer.schedule else ""
        kind = "" if optimizer.kind == optimizer.name else f"{optimizer.kind}: "
        rows.append((f"optimizer {optimizer.name}", f"{kind}{settings}{peak}{schedule}"))
    if run.versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    rows += [(f"silenced rule {name}", reason) for name, reason in run.silenced.items()]
    return [(name, value) for name, value in rows if value]


def settings_of(values: Mapping[str, object]) -> str:
    """Settings to change, in words.

    Example:
        >>> settings_of({"optimizer.lr": 0.03, "model.query_key_norm": True})
        'optimizer.lr = 0.03, model.query_key_norm = True'
    """
    return ", ".join(f"{key} = {_setting(value)}" for key, value in values.items())


def _setting(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_setting(v) for v in value) + ")"
    return str(value)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _joined(*values: int | None) -> str | None:
    return None if all(v is None for v in values) else ", ".join("?" if v is None else f"{v:,}" for v in values)


def _batch(size: int | None, accumulate: int | None, ranks: int) -> str | None:
    if size is None:
        return None
    parts = [f"{size:,}"]
    parts += [f"{accumulate} accumulated"] if accumulate and accumulate > 1 else []
    parts += [f"{ranks} ranks"] if ranks > 1 else []
    return " x ".join(parts)
