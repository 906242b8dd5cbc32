"""Signals of continual evaluation: what a run that turns to other data does to what was learned before."""

from __future__ import annotations

from traindiag.record.signal import Signal

_CONTINUAL = "De Lange, van de Ven, Tuytelaars 2023, arXiv 2205.13452"
_MATRIX = "Lopez-Paz, Ranzato 2017, arXiv 1706.08840"
_SIGMA = "the sign is that of the metric: for a loss the largest counts where the smallest does for an accuracy"

STABILITY: tuple[Signal, ...] = (
    Signal(
        "stability/value",
        ("task",),
        "metric on the fixed held-out samples of a task, where higher is better",
        formula="sum / count over the samples",
        lane="active",
        worst="min",
        source=_CONTINUAL,
    ),
    Signal(
        "stability/loss",
        ("task",),
        "the same where lower is better",
        formula="sum / count over the samples",
        lane="active",
        source=_CONTINUAL,
    ),
    Signal(
        "stability/start",
        ("task",),
        "the metric before the first update of the run: what a run that begins with other data is held against",
        formula="sum / count over the samples",
        lane="active",
        worst="min",
        source=f"{_CONTINUAL}: its first evaluation comes before any update",
    ),
    Signal(
        "stability/baseline",
        ("task",),
        "level of the metric before the last shift",
        formula="mean of up to 20 evaluations in the 200 steps before the shift, at least the last 3",
        lane="active",
        worst="min",
        source="gaps are relative to the same samples before the shift",
    ),
    Signal(
        "stability/noise",
        ("task",),
        "how much two evaluations in a row differ by chance",
        formula="SD of successive differences / sqrt(2), at least 1/(2 sqrt n) of a share or 0.1 % of the level",
        lane="active",
        source="differences take out a slow drift",
    ),
    Signal(
        "stability/shift",
        ("reason",),
        "1 at a step from which on training is another one",
        formula="marked, or found: loss jumped (Page-Hinkley), learning rate up > 2x, optimizer reset, new data",
        lane="fast",
        source="Page 1954; arXiv 2403.08763: a learning rate that rises again costs loss even on the same data",
    ),
    Signal(
        "stability/gap_depth",
        ("task",),
        "how far the metric has fallen below its level before the shift, at most so far",
        formula="max_t (baseline - a_t), or max_t (l_t - baseline) for a loss",
        lane="active",
        source=f"stability gap: {_CONTINUAL}",
    ),
    Signal(
        "stability/gap_residual",
        ("task",),
        "how far it is below that level now; negative where it is better than before",
        formula="mean of the last 20 gaps since the shift",
        lane="active",
        source="what is left of the gap tells forgetting from a passing gap",
    ),
    Signal(
        "stability/recovered",
        ("task",),
        "share of an opened gap that has closed again",
        formula="1 - gap_residual / gap_depth",
        lane="active",
        worst="min",
        source="transient above 0.95, partial above 0.5, forgetting below",
    ),
    Signal(
        "stability/min_acc",
        (),
        f"mean over learned tasks of the worst value since each was learned; {_SIGMA}",
        formula="1/(k-1) sum_i min_n a_i,n",
        lane="active",
        worst="min",
        source=f"{_CONTINUAL}: min-ACC",
    ),
    Signal(
        "stability/wc_acc",
        (),
        "worst-case accuracy: the task being learned now, and the worst of all others",
        formula="a_k / k + (1 - 1/k) min_acc",
        lane="active",
        worst="min",
        source=f"{_CONTINUAL}: WC-ACC",
    ),
    *(
        Signal(
            f"stability/{name}_{window}",
            (),
            f"largest {change} within {window} evaluations, mean over tasks",
            formula=f"mean_i max over m < n < m + {window} of {formula}",
            lane="active",
            worst=worst,  # type: ignore[arg-type]
            source=f"{_CONTINUAL}: {paper}",
        )
        for name, change, formula, worst, paper in (
            ("wf", "fall", "a_i,m - a_i,n", "max", "windowed forgetting"),
            ("wp", "rise", "a_i,n - a_i,m", "min", "windowed plasticity"),
        )
        for window in (10, 100)
    ),
    Signal(
        "stability/forgetting",
        (),
        "mean over learned tasks of the best value at the end of a task less the present one",
        formula="mean_i (max_t a_i,t - a_i,now) over ends of tasks t since i was learned",
        lane="active",
        source="Chaudhry et al. 2018, arXiv 1801.10112",
    ),
    Signal(
        "stability/backward_transfer",
        (),
        "mean over learned tasks of the present value less that when each was just learned; negative: forgetting",
        formula="mean_i (a_i,now - a_i,i)",
        lane="active",
        worst="min",
        source=_MATRIX,
    ),
    Signal(
        "stability/gradient_ratio",
        ("task",),
        "norm of the training gradient against that of an old task; above 5 nothing holds on to the old task",
        formula="|g_new| / |g_old|",
        lane="active",
        positive=True,
        source=f"{_CONTINUAL}: the gradient of stability is near zero at a switch",
    ),
    Signal(
        "stability/gradient_cosine",
        ("task",),
        "whether training pulls against an old task; no alarm by itself: the first fall comes before it is negative",
        formula="<g_new, g_old> / (|g_new| |g_old|)",
        lane="active",
        worst="min",
        source="A-GEM, Chaudhry et al. 2019, arXiv 1812.00420",
    ),
)
