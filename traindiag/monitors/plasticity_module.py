"""One module whose plasticity is watched: which states are kept of it, and what they show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from traindiag.capture.hidden_layers import look_inside, value_heads
from traindiag.capture.stored_states import StoredStates, batch_size
from traindiag.capture.trainability import trainability
from traindiag.functional.feature_rank import effective_rank, feature_rank, singular_values, srank
from traindiag.functional.plasticity import (
    UnitActivity,
    dead_units,
    dormant_units,
    fraction_active,
    overlap,
    share_of,
    unit_activity,
    zombie_units,
)
from traindiag.functional.values import explained_variance, greedy_churn, member_gap, output_change

BATCH = 256
"""States in one forward pass; the batch of the reference implementation."""

MIN_STATES = 100
"""Below this, one state is more than the 1 % by which dead units are told."""

SPREAD = 16
"""Updates that a set of states is taken from."""

Found = Iterator[tuple[str, tuple[str, ...], Tensor, Tensor | None]]
"""Metric, coordinates after the module, value, and what it is a share of where that may be nothing."""


@dataclass
class _Look:
    """What some states show of a module: its layers by name, which of them are smooth and which only squash the
    output, the last features, and what it returned.
    """

    activity: dict[str, UnitActivity] = field(default_factory=dict)
    smooth: set[str] = field(default_factory=set)
    squashing: set[str] = field(default_factory=set)
    features: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def hidden(self) -> dict[str, UnitActivity]:
        return {name: units for name, units in self.activity.items() if name not in self.squashing}


class PlasticityModule:
    """States and references of one module.

    Args:
        name: Its name.
        module: Itself.
        names: Names of all modules, by module.
        limit: States kept in a set.
        probe: States of the user's own for trends, as positional arguments; None to keep the first ones seen.
        values: Whether it returns values.
        trainability: Whether its first weights are kept, to train copies of them.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        names: Mapping[nn.Module, str],
        *,
        limit: int,
        probe: tuple[Tensor, ...] | None,
        values: bool,
        trainability: bool,
    ) -> None:
        self.name, self.module, self.values = name, module, values
        self.names = {m: names[m] for m in module.modules() if m in names} | {module: name}
        self.limit = limit
        self.device = next(module.parameters()).device
        self.fixed = StoredStates(limit)
        self.fresh = StoredStates(limit)
        self.given = probe is not None
        if probe is not None:
            self.fixed.limit = batch_size(probe)
            self.fixed.take(tuple(t.to(self.device) for t in probe), {}, rows=self.fixed.limit)
        self.settled = self.given
        self.refusal = ""
        self.returns: tuple[tuple[Tensor, ...], Tensor] | None = None
        with torch.no_grad():
            self.first_norm = self._norm()
            self.first_weights = (
                {n: p.detach().cpu().clone() for n, p in module.named_parameters()} if trainability else {}
            )
        self.dead: Tensor | None = None
        self.outputs: list[Tensor] = []

    # -- collecting ------------------------------------------------------------------------------

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, near: bool) -> None:
        """A training call of the module, near to the next look or not; nothing may be raised into it."""
        try:
            rows = -(-self.limit // SPREAD)
            if not self.settled:
                self.fixed.take(args, kwargs, rows)
            if near and not self.fresh.full:
                self.fresh.take(args, kwargs, rows)
        except (TypeError, ValueError) as error:
            self.refusal = f"{self.name}: {error}"

    # -- measuring ---------------------------------------------------------------------------------

    def measure(self, twins: Sequence[nn.Module], *, steps: int, seed: int) -> Found:
        """What its states show now.

        Args:
            twins: Modules that learn the same, whose values on the same fresh states are held against its own.
            steps: For which copies are trained; 0 for none.
            seed: Of what is random in that.

        Raises:
            ValueError: If what it is called with cannot be kept.
        """
        if self.refusal:
            raise ValueError(self.refusal)
        self._follow()
        yield "weight_norm_ratio", (), self._norm() / self.first_norm, None
        if self.returns is not None:
            yield from self._explained()
        if len(self.fixed) >= MIN_STATES:
            yield from self._on_fixed()
            if steps and self.first_weights:
                ratio = trainability(self.module, self.first_weights, self.fixed, steps=steps, seed=seed)
                if ratio is not None:
                    yield "trainability", (), ratio, None
        fresh = self.fresh if len(self.fresh) else self.fixed
        if len(fresh):
            yield from self._on_fresh(fresh, twins)
        self.fresh = StoredStates(self.limit)

    def _on_fixed(self) -> Found:
        self.settled = True
        look = self._look(self.fixed)
        hidden = look.hidden()
        for name, units in look.activity.items():
            if name in look.smooth:
                yield "saturation", (name,), 1 - fraction_active(units), None
        for name, units in hidden.items():
            yield "fau", (name,), fraction_active(units), None
            yield "dead", (name,), share_of(dead_units(units), units), None
            if name not in look.smooth:
                yield "zombie", (name,), share_of(zombie_units(units), units), None
            yield "dormant_025", (name,), share_of(dormant_units(units, 0.025), units), None
            yield "dormant_100", (name,), share_of(dormant_units(units, 0.1), units), None
            yield "preactivation_norm", (name,), units.norm / units.states, None
        if hidden:
            yield "fau_pooled", (), fraction_active(*hidden.values()), None
            dead = torch.cat([dead_units(u) for u in hidden.values()])
            if self.dead is not None and self.dead.shape == dead.shape:
                yield "dead_overlap", (), *overlap(self.dead, dead)
            self.dead = dead
        for name, h in look.features.items():
            if len(h) >= h.shape[1]:
                spectrum = singular_values(h)
                yield "srank_99", (name,), srank(spectrum), None
                yield "effective_rank", (name,), effective_rank(spectrum), None
                yield "feature_rank", (name,), feature_rank(spectrum, len(h)), None
        yield from self._moved(look.outputs)

    def _moved(self, outputs: list[Tensor]) -> Found:
        before, self.outputs = self.outputs, outputs
        if [t.shape for t in before] != [t.shape for t in outputs] or not outputs:
            return
        yield "output_change", (), output_change(torch.cat(before, 1), torch.cat(outputs, 1)), None
        if self.values and outputs[0].shape[1] > 1:
            yield "churn", (), torch.stack([greedy_churn(b, n) for b, n in zip(before, outputs)]).mean(), None

    def _on_fresh(self, fresh: StoredStates, twins: Sequence[nn.Module]) -> Found:
        look = self._look(fresh)
        if (hidden := look.hidden()) and fresh is self.fresh:
            yield "fau_fresh", (), fraction_active(*hidden.values()), None
        if not (self.values and look.outputs):
            return
        q = torch.cat(look.outputs, 1)
        yield "q_max_abs", (), q.abs().max(), None
        yield "q_mean", (), q.mean(), None
        others = [torch.cat(_say(twin, fresh), 1) for twin in twins]
        members = [q, *others] if others else look.outputs
        if len(members) > 1 and len({m.shape for m in members}) == 1:
            yield "twin_gap", (), member_gap(torch.stack(members)), None

    def _look(self, states: StoredStates) -> _Look:
        look = _Look()
        features: dict[str, list[Tensor]] = {}
        outputs: list[list[Tensor]] = []
        for call in states.batches(BATCH):
            size = batch_size(call)
            seen = look_inside(self.module, *call, size, self.names)
            outputs.append(value_heads(seen.output, size))
            look.squashing |= seen.squashed
            for layer in seen.layers:
                units = unit_activity(layer.before, layer.after, layer.active)
                known = look.activity.get(layer.name)
                look.activity[layer.name] = units if known is None else known.plus(units)
                if not layer.rectifies:
                    look.smooth.add(layer.name)
                if layer.name in seen.last and layer.after.ndim == 2:
                    features.setdefault(layer.name, []).append(layer.after)
        look.outputs = [torch.cat(parts) for parts in zip(*outputs)]
        look.features = {name: torch.cat(parts) for name, parts in features.items()}
        return look

    def _explained(self) -> Found:
        assert self.returns is not None
        states, returns = self.returns
        self.returns = None
        kept = StoredStates(len(returns))
        kept.take(states, {}, rows=len(returns))
        values = torch.cat(_say(self.module, kept), 1)
        if values.shape[1] != 1:
            raise ValueError(f"{self.name}: one value for each state was expected, got {values.shape[1]}")
        found = explained_variance(values[:, 0], returns)
        yield "explained_variance", (), found.total - found.residual, found.total

    def _follow(self) -> None:
        """To the device that the module is on now: a model may be moved after diagnostics have begun."""
        device = next(self.module.parameters()).device
        if device == self.device:
            return
        self.device = device
        for states in (self.fixed, self.fresh):
            states.load_state_dict(states.state_dict(), device)
        self.first_norm = self.first_norm.to(device)
        self.dead = None if self.dead is None else self.dead.to(device)
        self.outputs = [t.to(device) for t in self.outputs]
        if self.returns is not None:
            self.returns = tuple(t.to(device) for t in self.returns[0]), self.returns[1].to(device)

    def _norm(self) -> Tensor:
        return torch.stack([p.detach().float().square().sum() for p in self.module.parameters()]).sum().sqrt()

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors on the host."""
        return {
            "fixed": {} if self.given else self.fixed.state_dict(),
            "fresh": self.fresh.state_dict(),
            "settled": self.settled,
            "first_norm": self.first_norm.cpu(),
            "first_weights": dict(self.first_weights),
            "dead": None if self.dead is None else self.dead.cpu(),
            "outputs": [t.cpu() for t in self.outputs],
            "returns": None if self.returns is None else [[t.cpu() for t in self.returns[0]], self.returns[1].cpu()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        if not self.given:
            self.fixed.load_state_dict(state["fixed"], self.device)
            self.settled = bool(state["settled"])
        self.fresh.load_state_dict(state["fresh"], self.device)
        self.first_norm = state["first_norm"].to(self.device)
        if self.first_weights:
            self.first_weights = dict(state["first_weights"]) or self.first_weights
        self.dead = None if state["dead"] is None else state["dead"].to(self.device)
        self.outputs = [t.to(self.device) for t in state["outputs"]]
        if state["returns"] is not None:
            inputs, returns = state["returns"]
            self.returns = tuple(t.to(self.device) for t in inputs), returns.to(self.device)


def _say(module: nn.Module, states: StoredStates) -> list[Tensor]:
    """What a module returns for states, by head."""
    batches = [value_heads(module(*a, **k), batch_size((a, k))) for a, k in states.batches(BATCH)]
    return [torch.cat(parts) for parts in zip(*batches)]
