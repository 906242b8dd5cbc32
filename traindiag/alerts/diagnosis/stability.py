"""Failures of a run that turns to other data."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.rules.wording import number

GAP = "Guo et al. 2024, arXiv 2406.14833"
REPLAY = "Ibrahim et al. 2024, arXiv 2403.08763"
CONTINUAL = "De Lange, van de Ven, Tuytelaars 2023, arXiv 2205.13452"

WEAK, STRONG = 0.05, 0.25
"""Share of old data in each batch that was enough for a weak shift (Pile to SlimPajama) and for a strong one (English
to German): arXiv 2403.08763."""

STRONG_DEPTH = 0.20
"""Depth, as a part of the level before, from which a shift counts as strong."""

VANISHED = 5.0
"""Norm of the training gradient against that of an old task, from which nothing holds on to the old one."""

CONFLICT = -0.1


class StabilityGap(Failure):
    """An old task falls when training turns to other data, and is on its way back or likely to be."""

    name = "stability gap"
    family = "stability"
    signals = ("stability/gap_depth",)
    kinds = ("gap",)

    def diagnose(self, case: Case) -> Finding | None:
        remedies = [
            Remedy(
                "Do not stop for it, and do not judge the new phase before it has passed; the loss on the new data "
                "does not show it.",
                when="now",
                source=f"{GAP}: performance falls first and then recovers, while the loss on new data falls all the "
                "time",
            )
        ]
        if _rate_rose(case):
            remedies.append(
                Remedy(
                    "Raise the learning rate less at the beginning of a phase: going back up costs by itself.",
                    when="next run",
                    source=f"{REPLAY}: re-warming raises the loss even on the same data",
                )
            )
        return Finding(
            f"Stability gap{case.at}, likely to pass",
            "At a shift the gradient of what is already learned is near zero, so nothing opposes the first steps "
            "towards the new data; once the old task has suffered, its data in the mixture pulls it back.",
            _gradients(case),
            _ruled_out(case),
            (*remedies, *_strategies()),
        )


class Forgetting(Failure):
    """An old task has fallen when training turned to other data, and is not coming back."""

    name = "forgetting"
    family = "stability"
    signals = ("stability/gap_depth",)
    kinds = ("likely forgetting", "forgetting", "partial")

    def diagnose(self, case: Case) -> Finding | None:
        level = case.now("stability/baseline")
        share = case.verdict.value / abs(level.middle) if level is not None and level.middle else 0.0
        replay = STRONG if share >= STRONG_DEPTH else WEAK
        strength = "strong" if replay == STRONG else "weak"
        shift = case.now("stability/shift")
        where = f" from before step {shift.step}" if shift is not None else " from before the shift"
        other = f"; a {'weak' if replay == STRONG else 'strong'} one needs {WEAK if replay == STRONG else STRONG:.0%}"
        became = {"partial": "partly forgotten", "forgetting": "forgotten"}
        fate = became.get(case.verdict.kind, "likely being forgotten")
        return Finding(
            f"{case.verdict.cell} is {fate}",
            "Nothing in the data holds on to the old task, or too little: its samples are no longer in the mixture, "
            "or their share is too small for a shift of this size.",
            _gradients(case),
            _ruled_out(case),
            (
                Remedy(
                    f"Go back to a checkpoint{where} and mix {replay:.0%} of the old data into each batch, which was "
                    f"enough for a {strength} shift{other}.",
                    {"data.replay": replay},
                    "restart",
                    REPLAY,
                ),
                *_strategies(),
            ),
        )


def _strategies() -> tuple[Remedy, ...]:
    return (
        Remedy(
            "Take a mixture of new data that is close to that of the first phase.",
            source=f"{GAP}: third strategy",
        ),
        Remedy(
            "Train several epochs on a subset of the new data, and not one on all of it; keep the part of the best "
            "quality.",
            source=f"{GAP}: first and second strategy",
        ),
    )


def _rate_rose(case: Case) -> bool:
    shift = case.now("stability/shift")
    return shift is not None and "learning rate" in f"{shift.low_at} {shift.high_at} {case.verdict.evidence}"


def _gradients(case: Case) -> tuple[str, ...]:
    found = []
    ratio, cosine = case.now("stability/gradient_ratio"), case.now("stability/gradient_cosine")
    if ratio is not None and ratio.high > VANISHED:
        found.append(
            f"the training gradient is {number(ratio.high)} times that of {ratio.high_at} (step {ratio.step}): "
            "nothing holds on to it"
        )
    if cosine is not None and cosine.low < CONFLICT:
        found.append(f"it pulls against {cosine.low_at}: cosine {number(cosine.low)} (step {cosine.step})")
    return tuple(found)


def _ruled_out(case: Case) -> tuple[str, ...]:
    noise = case.now("stability/noise")
    if noise is None or not noise.high > 0:
        return ()
    return (
        f"chance: an evaluation varies by {number(noise.high)}, and this is {case.verdict.value / noise.high:.0f} "
        "times that",
    )
