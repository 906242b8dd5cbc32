"""The one place that knows how optimizers name their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from traindiag.capture.parameter_sample import ParameterSample
from traindiag.functional.optimizer import SAMPLE, bias_correction, stride_of, strided

Group = Mapping[str, Any]
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class SecondMoment:
    """The second moment of one parameter's gradient, as its optimizer uses it.

    Args:
        values: Its sampled scalars ``[size]``, before bias correction.
        eps: What is added to its root, or the least that the root can be.
        bias: ``(beta2, step)`` of a moment that the optimizer corrects for bias; None for one that it does not.
    """

    values: Tensor
    eps: float
    bias: tuple[float | Tensor, float | Tensor] | None = None

    @property
    def correction(self) -> float | Tensor:
        """What the moment is divided by; a tensor where the optimizer counts its steps on the device."""
        return 1.0 if self.bias is None else bias_correction(*self.bias)


class SecondMoments(NamedTuple):
    """Those of all parameters of a sample.

    Args:
        values: ``[total]``; infinite where there is none, so that no gradient is large against it.
        eps: One number, or ``[n]`` where parameters differ.
        correction: Likewise.
        there: Whether each parameter has one.
    """

    values: Tensor
    eps: float | Tensor
    correction: float | Tensor
    there: list[bool]


def second_moment(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Group, limit: int = SAMPLE
) -> SecondMoment | str:
    """The second moment of ``parameter``, or why there is none.

    Recognised by the names of the state and not by the class, so that third-party optimizers which keep Adam's
    names work: Adam and its kin (``exp_avg_sq``, with AMSGrad ``max_exp_avg_sq``), RMSprop and Adadelta
    (``square_avg``), Adafactor (``row_var`` and ``col_var``, or ``variance``). Momentum alone, sums that never decay
    (Adagrad) and infinity norms (Adamax) are none.

    Args:
        parameter: The parameter.
        state: What its optimizer keeps for it.
        group: Its parameter group.
        limit: Largest number of scalars looked at.
    """
    if not state:
        return "the optimizer keeps no state"
    if "exp_avg_sq" in state:
        return _adam(state, group, limit)
    if "square_avg" in state:
        return _square_average(state, group, limit)
    if any(isinstance(state.get(key), Tensor) for key in ("row_var", "variance")):
        return _adafactor(parameter, state, group, limit)
    return f"the optimizer keeps {', '.join(sorted(map(str, state)))}: no second moment that is known"


def second_moments(optimizer: Optimizer, sample: ParameterSample) -> SecondMoments | None:
    """Second moments of all sampled parameters; None where no parameter has one."""
    found = [m if isinstance(m, SecondMoment) else None for m in _each(optimizer, sample, sample.limit)]
    moments = [m for m in found if m is not None]
    if not moments:
        return None
    first = moments[0]
    # one number for all, where there is one, need not be sent to the device
    eps: float | Tensor = first.eps
    correction = first.correction if _same(moments) else None
    if any(m.eps != first.eps for m in moments):
        eps = sample.column([m.eps if m else 1.0 for m in found])
    if correction is None:
        correction = sample.column([m.correction if m else 1.0 for m in found])
    values = sample.joined([m.values if m else None for m in found], missing=torch.inf)
    return SecondMoments(values, eps, correction, [m is not None for m in found])


def _same(moments: Sequence[SecondMoment]) -> bool:
    """Whether all are corrected alike, as far as the host knows."""
    if any(isinstance(x, Tensor) for m in moments for x in m.bias or ()):
        return False
    return all(m.bias == moments[0].bias for m in moments)


def unseen_second_moments(optimizer: Optimizer, sample: ParameterSample) -> dict[str, list[str]]:
    """Names of the parameters whose second moments are not seen, by reason."""
    reasons: dict[str, list[str]] = {}
    with torch.no_grad():
        for moment, (_, name) in zip(_each(optimizer, sample, limit=1), sample.cells.coordinates):
            if isinstance(moment, str):
                reasons.setdefault(moment, []).append(str(name))
    return reasons


def learning_rates(optimizer: Optimizer, sample: ParameterSample) -> list[float | Tensor]:
    """The learning rate of each parameter; 0 of one that the optimizer does not own."""
    return [group.get("lr", 0.0) for group in sample.groups(optimizer)]


def skipped_itself(optimizer: Optimizer) -> Tensor | None:
    """Whether a fused optimizer skips this step because a scaled gradient overflowed: above 0 then.

    It is known while the optimizer steps, hooks included. None where a loss scaler decides before it calls the
    optimizer.
    """
    found = getattr(optimizer, "found_inf", None)
    return found.detach().reshape(()) if isinstance(found, Tensor) else None


def _each(optimizer: Optimizer, sample: ParameterSample, limit: int) -> list[SecondMoment | str]:
    # get: the state is a defaultdict, and looking a parameter up would change the user's checkpoint
    state = optimizer.state
    pairs = zip(sample.parameters, sample.groups(optimizer))
    return [second_moment(p, state.get(p, _NOTHING), group, limit) for p, group in pairs]


def _adam(state: Mapping[str, Any], group: Group, limit: int) -> SecondMoment | str:
    betas, step = group.get("betas"), state.get("step", group.get("step"))
    values = state["max_exp_avg_sq"] if group.get("amsgrad") and "max_exp_avg_sq" in state else state["exp_avg_sq"]
    if not isinstance(betas, (tuple, list)) or len(betas) < 2 or "eps" not in group:
        return "the optimizer keeps exp_avg_sq without betas and eps"
    if not _plain(values):
        return f"the optimizer keeps exp_avg_sq as {type(values).__name__}"
    if not (group.get("bias_correction", True) and group.get("correct_bias", True)):
        return SecondMoment(strided(values, limit), float(group["eps"]))
    if step is None:
        return "the optimizer keeps exp_avg_sq without a step"
    return SecondMoment(strided(values, limit), float(group["eps"]), (_on_host(betas[1]), _on_host(step)))


def _square_average(state: Mapping[str, Any], group: Group, limit: int) -> SecondMoment | str:
    values = state["square_avg"]
    if "eps" not in group or not _plain(values):
        return "the optimizer keeps square_avg in an unknown form"
    sampled, eps = strided(values, limit), float(group["eps"])
    if "rho" in group:  # Adadelta adds eps under the root
        return SecondMoment(sampled + eps, eps**0.5)
    if group.get("centered") and "grad_avg" in state:
        sampled = sampled - strided(state["grad_avg"], limit).square()
    return SecondMoment(sampled, eps)


def _adafactor(parameter: nn.Parameter, state: Mapping[str, Any], group: Group, limit: int) -> SecondMoment | str:
    eps = group.get("eps", (None,))[0]
    least = float(torch.finfo(parameter.dtype).eps if eps is None else eps)
    if isinstance(variance := state.get("variance"), Tensor):
        return SecondMoment(strided(variance, limit), least)
    row, column = state["row_var"], state["col_var"]
    if isinstance(parameter, DTensor) or not (_plain(row) and _plain(column)):
        return "the factored second moment is sharded"
    mean = row.mean(dim=-2, keepdim=True).clamp(min=least)
    at = torch.arange(0, parameter.numel(), stride_of(parameter.numel(), limit), device=row.device)
    row, column, mean = (torch.take(t.expand(parameter.shape), at) for t in (row, column, mean))
    return SecondMoment(row * column / mean, least)


def _on_host(value: float | Tensor) -> float | Tensor:
    """A number where that needs no wait for the device."""
    return float(value) if not isinstance(value, Tensor) or value.device.type == "cpu" else value


def _plain(value: object) -> bool:
    """Whether the numbers are there as they are, and not quantised or elsewhere."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return False
    part = value.to_local() if isinstance(value, DTensor) else value
    return part.is_floating_point() and not hasattr(part, "__tensor_flatten__")
