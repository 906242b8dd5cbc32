"""The panel of critic plasticity: can the network still learn something new, and can its values be true?"""

from __future__ import annotations

from traindiag.panels.figures.content import Block
from traindiag.panels.figures.view import View, present

_P = "plasticity/"


def plasticity_blocks(view: View) -> list[Block]:
    blocks = [
        view.together(
            "fau",
            "Active units",
            ((_P + "fau_pooled", "same states", "solid"), (_P + "fau_fresh", "fresh states", "dot")),
            "fraction of active units",
            "Of the states that are looked at, and of the units of a module. A fall means that less of the network "
            "takes part in learning.",
        ),
        view.together(
            "dead",
            "Units that have ceased to work",
            (
                (_P + "dead", "dead", "solid"),
                (_P + "dormant_025", "dormant (0.025)", "dash"),
                (_P + "dormant_100", "dormant (0.1)", "dot"),
            ),
            "share of units",
            "Dead: active on less than 1 % of the states. Dormant: next to nothing of the layer's mean activity.",
        ),
        view.by_place("fau-by-layer", "Active units, layer by layer", _P + "fau", scale="share"),
        view.lines("q-bound", "Values against what any return can be", _P + "q_bound_ratio"),
        view.together(
            "q",
            "Values of the critic",
            ((_P + "q_max_abs", "largest |Q|", "solid"), (_P + "q_mean", "mean Q", "dash")),
            "value",
        ),
        view.together(
            "rank",
            "Rank of the last hidden features",
            (
                (_P + "srank_99", "srank", "solid"),
                (_P + "effective_rank", "effective rank", "dash"),
                (_P + "feature_rank", "feature rank", "dot"),
            ),
            "rank",
            "Directions that the features still use; few of them are left where a representation has collapsed.",
        ),
        view.together(
            "churn",
            "How much outputs move between two looks",
            ((_P + "churn", "greedy actions", "solid"), (_P + "output_change", "outputs", "dash")),
            "share",
            log=None,
        ),
        *(
            view.lines(name, title, _P + name, note=note)
            for name, title, note in (
                ("twin_gap", "How far twins are apart", ""),
                ("weight_norm_ratio", "Growth of the weights", "Norm of the parameters against their first one."),
                ("preactivation_norm", "Size of what enters the activations", ""),
                ("zombie", "Units that have become linear", ""),
                ("saturation", "Saturated units", ""),
                ("explained_variance", "Variance of returns that is explained", ""),
                ("trainability", "Loss on random targets against that of the first weights", ""),
            )
        ),
    ]
    return present(
        blocks + view.others("plasticity", _SHOWN),
        "Nothing was measured of plasticity in this run: no monitor of it was on.",
    )


_SHOWN = {
    "updates", "fau_pooled", "fau_fresh", "dead", "dormant_025", "dormant_100", "fau", "q_bound_ratio", "q_max_abs",
    "q_mean", "srank_99", "effective_rank", "feature_rank", "churn", "output_change", "twin_gap", "weight_norm_ratio",
    "preactivation_norm", "zombie", "saturation", "explained_variance", "trainability",
}  # fmt: skip
