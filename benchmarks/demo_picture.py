"""Draws the README's picture: one demo run, what it told and what its loss showed.

python -m benchmarks.demo_picture            # writes docs/demo.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from traindiag import TrainingDiagnostics
from traindiag.demo.band import Band, smooth
from traindiag.demo.run import UNSTABLE_LR, Settings, train
from traindiag.demo.story import Story
from traindiag.rules.default_pack import LOGIT_DAMAGE

PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"
SEED = 5  # the first of the seeds that nothing was tuned on
WARNED, LOSS, HEALTHY = "#c2410c", "#1d4ed8", "#94a3b8"


def draw(story: Story, steps: np.ndarray, ranges: np.ndarray, path: Path) -> None:
    """Loss above, attention logits below, on one axis of steps.

    Args:
        story: The run beside the healthy ones.
        steps: Sampled steps, ``[n]``.
        ranges: Largest logit range at each, ``[n]``.
        path: Where the picture goes.
    """
    band, onset, warning = story.band, story.onset, story.warning
    assert band is not None
    assert onset is not None
    assert warning is not None
    plt.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "demo", "axes.spines.top": False})
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(9, 4.6), height_ratios=(3, 2), layout="constrained"
    )
    x = np.arange(len(story.outcome.losses))
    above.fill_between(x, np.array(band.upper) + band.margin, 1.9, color=HEALTHY, alpha=0.3, lw=0)
    above.plot(x, smooth(story.outcome.losses, band.window), color=LOSS, lw=1.8)
    above.set(ylim=(1.9, 4.2), ylabel="loss, nats per byte")
    above.annotate("this run", (300, 2.78), color=LOSS, ha="center", va="bottom")
    above.annotate(f"below the worst of {len(band.seeds)} healthy runs", (300, 2.1), color="#475569", ha="center")
    below.semilogy(steps, ranges, color=WARNED, lw=1.8, marker=".", ms=4)
    below.axhline(LOGIT_DAMAGE, color="#475569", lw=0.8, ls=":")
    below.annotate("limit", (398, LOGIT_DAMAGE), color="#475569", ha="right", va="bottom")
    below.set(ylabel="largest attention\nlogit range", xlabel="step", xlim=(0, len(x)))
    for axes in (above, below):
        axes.spines.right.set_visible(False)
        axes.axvline(warning.step, color=WARNED, lw=1.2)
        axes.axvline(onset, color=LOSS, lw=1.2)
    above.annotate(f" warned at step {warning.step}", (warning.step, 4.1), color=WARNED, va="top", weight="bold")
    told = f" the loss shows it at step {onset},\n {story.lead} steps later"
    above.annotate(told, (onset, 3.75), color=LOSS, va="top", weight="bold")
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    diagnostics = TrainingDiagnostics(max_overhead=None, terminal=False)
    outcome = train(Settings(lr=UNSTABLE_LR, seed=SEED), [diagnostics])
    series = diagnostics.history["attention/logit_range"]
    story = Story.of(outcome, diagnostics.alerts, Band.load())
    draw(story, series.steps, series.worst().filled(np.nan), arguments.output)
    print("\n".join(f"{label}: {text}" for label, text in story.lines()), f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
