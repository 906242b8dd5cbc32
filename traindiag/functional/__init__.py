"""Pure maths: tensors in, tensors out."""

from traindiag.functional.output import z_loss

__all__ = ["z_loss"]
