"""The output panel: do the output logits drift, and is it learning that moves them?"""

from __future__ import annotations

from traindiag.panels.figures.content import Block
from traindiag.panels.figures.view import View, present

Z = (("output/log_z", "log Z, mean", "solid"), ("output/log_z_max_abs", "|log Z|, largest", "dash"))
LOGITS = (
    ("output/logit_max", "largest", "solid"),
    ("output/logit_mean", "mean", "dash"),
    ("output/logit_min", "smallest", "solid"),
)


def output_blocks(view: View) -> list[Block]:
    return present(
        [
            view.together("log-z", "Log Z of the output logits", Z, "log Z (nat)", _Z_NOTE),
            view.together("logits", "Output logits", LOGITS, "logit", _LOGIT_NOTE),
            view.lines(
                "target-z-score",
                "How far the target stands out",
                "output/target_z_score",
                note="In standard deviations of its token's logits, free of their shift and scale: it rises while "
                "the model learns. Log Z that moves while this stands still is drift.",
            ),
            view.lines(
                "z-loss", "Z-loss", "output/z_loss", note="What a z-loss of weight one would add to the loss."
            ),
        ],
        "Nothing was seen of output logits in this run: no cross-entropy was recognised.",
    )


_Z_NOTE = "Far from zero as output logits drift, which cross-entropy leaves free."
_LOGIT_NOTE = "Of up to 128 tokens of each cross-entropy call. In a run that diverges they become very negative."
