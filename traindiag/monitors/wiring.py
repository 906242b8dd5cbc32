"""Whether the parts of a run are connected: who owns a tensor, what moves, what must not, and whether ranks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from traindiag.capture.copies import copies
from traindiag.capture.optimizer_state import learning_rates, skipped_itself
from traindiag.capture.parameter_sample import AXES, ParameterSample, Update
from traindiag.capture.torch_private import is_flat_shard
from traindiag.capture.watched import Watched
from traindiag.functional.checksum import checksums
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.parameter_cells import joined_cells, joined_states, kept, reading
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.ranks import world_size
from traindiag.transfer.states import Group, Reduced

_FINGERPRINT = 256
"""Scalars of a tensor that stand for it where only equality is asked for."""

_UPDATE_STATES = ("updates", "graded", "moving", "changed")
"""Per parameter: updates; those with a gradient; those in which some sampled scalar had a gradient other than 0 while
the learning rate was above 0; those in which some sampled scalar changed."""


class WiringMonitor(Monitor):
    """``wiring/ungraded``, ``unchanged``, ``frozen_changed``, ``owners`` and ``replicas_differ``.

    They are looked at in the 1st, 2nd, 10th and 100th step too, whatever the cadence: most faults of wiring are there
    from the start.

    All but ``owners`` (a count) are flags, 1 where the name holds and 0 where it does not. They are told as they are;
    what a rule has to make of them:

    - ``ungraded`` is normal for experts and branches that this step did not use. It means something where it holds at
      every sample.
    - ``unchanged`` needs a gradient other than 0 among the scalars looked at and a learning rate above 0, so a tensor
      with an exactly zero gradient (LoRA's A at the first step, what stands behind a zero-initialised branch,
      embedding rows not met) is not seen rather than unchanged. It also holds where an update is lost in rounding:
      bfloat16 weights under a small learning rate, or the first steps of a warm-up.
    - A gradient that is rounding error moves its tensor (a key bias without rotary embedding), so it raises nothing
      here.
    - ``frozen_changed`` compares with the time before, so it is seen from the second time on. A frozen backbone that
      changes is a fault. A tensor that was thawed in between is not judged.
    - ``owners`` should be 1. A tensor that asks for a gradient and belongs to no optimizer has 0: forgotten, or left
      out on purpose without ``requires_grad=False``.
    - A target network, a teacher or an average of what is trained belongs to no optimizer and changes by design. One
      that stands beside its original, is built like it and is called so (:mod:`~traindiag.capture.copies`) is not
      seen by these two.
    - ``replicas_differ`` is 1 where ranks hold other bits. Where it holds from the first sample on the tensors may be
      different by design (tensor or expert parallel as plain tensors); where it begins later, ranks have drifted
      apart. It is not seen for sharded tensors and with one rank.
    """

    name = "wiring"
    family = "wiring"
    lane = "slow"
    early = True
    signals = tuple(
        BY_NAME[f"wiring/{n}"] for n in ("ungraded", "unchanged", "frozen_changed", "owners", "replicas_differ")
    )

    def __init__(self) -> None:
        self._optimizers: Mapping[str, Optimizer] = {}
        self._everything: dict[str, nn.Parameter] = {}
        self._fingerprints = ParameterSample("", ())
        self._tensors = self._owned = Cells(AXES[1:], ())
        self._comparable: list[bool] = []
        self._owners_known = True
        self._copies: set[int] = set()
        self._named: dict[tuple[str, ...], Cells] = {}
        self._updates: dict[str, Update] = {}
        self._states: dict[str, tuple[Cells, Tensor]] = {}
        self._previous: tuple[list[bool], Tensor] | None = None

    def prepare(self, watched: Watched) -> None:
        """Tensors keep their order, so that a fingerprint can be compared with an earlier one."""
        named = [pair for ps in watched.parameters.values() for pair in ps] + list(watched.frozen.items())
        everything = dict(
            sorted({id(p): (name, p) for name, p in reversed(named)}.values(), key=lambda pair: pair[0])
        )
        if everything.keys() == self._everything.keys() and self._optimizers == watched.optimizers:
            return
        self._optimizers, self._everything, self._previous = watched.optimizers, everything, None
        self._fingerprints = ParameterSample("", list(everything.items()), limit=_FINGERPRINT)
        self._tensors = Cells(AXES[1:], tuple((name,) for _, name in self._fingerprints.cells.coordinates))
        self._comparable = [
            world_size() > 1 and not (isinstance(p, DTensor) or is_flat_shard(p))
            for p in self._fingerprints.parameters
        ]
        # an optimizer over copies or flat shards owns no parameter of the model under its own name
        model = {id(p) for root in watched.roots for p in root.parameters()}
        self._copies = copies(watched.roots, {id(p) for ps in watched.parameters.values() for _, p in ps})
        self._owners_known = any(id(p) in model for ps in watched.parameters.values() for _, p in ps)

    def before_update(self, optimizer: str, update: Update) -> None:
        update.remember()
        self._updates[optimizer] = update

    @torch.no_grad()
    def updated(self, optimizer: str) -> None:
        update = self._updates.pop(optimizer, None)
        if update is None or not update.sample.parameters:
            return
        sample, gradients = update.sample, update.gradients
        rates = learning_rates(update.optimizer, sample)
        learns = sample.column([rate > 0 for rate in rates])
        moving = learns * (update.gradient_squares != 0)  # a NaN is not 0
        changed = (update.change_squares != 0).to(learns.dtype)
        trainable = sample.column([p.requires_grad for p in sample.parameters])
        states = torch.stack([trainable, sample.column(gradients.graded), moving, changed])
        if (skipped := skipped_itself(update.optimizer)) is not None:
            states = torch.where(skipped.to(states.device) > 0, 0.0, states)
        if optimizer in self._states:
            states = states + self._states[optimizer][1]
        self._states[optimizer] = (sample.cells, states)

    @torch.no_grad()
    def collect(self) -> Sequence[Group]:
        states, self._states = self._states, {}
        self._updates.clear()
        groups = []
        if states:
            cells = joined_cells(tuple(cells for cells, _ in states.values()))
            joined = joined_states(s for _, s in states.values())
            groups.append(Group("updates", cells, dict(zip(_UPDATE_STATES, joined))))
        owners = self._owners()
        groups += [self._owner_group(owners), self._tensor_group(owners)]
        return [g for g in groups if len(g.cells)]

    def _owners(self) -> dict[int, int]:
        """Number of optimizers by ``id`` of the parameter, as it is now: training may add tensors and thaw them."""
        owners: dict[int, int] = {}
        for optimizer in self._optimizers.values():
            for key in {id(p) for group in optimizer.param_groups for p in group["params"]}:
                owners[key] = owners.get(key, 0) + 1
        return owners

    def _owner_group(self, owners: Mapping[int, int]) -> Group:
        trainable = {n: owners.get(id(p), 0) for n, p in self._everything.items() if self._asks(p)}
        if not self._owners_known:
            trainable = {}
        names = tuple(trainable)
        if names not in self._named:
            self._named = {names: Cells.along("parameter", names)}
        count = torch.tensor(list(trainable.values()), dtype=torch.float32)
        return Group("owners", self._named[names], maxima={"owners": count.to(self._fingerprints.device)})

    def _asks(self, parameter: nn.Parameter) -> bool:
        return parameter.requires_grad and id(parameter) not in self._copies

    def _tensor_group(self, owners: Mapping[int, int]) -> Group:
        sample = self._fingerprints
        if not sample.parameters:
            return Group("tensors", self._tensors)
        now = checksums(sample.flat(sample.parameters), *sample.places, len(sample.sizes))
        frozen = [not (p.requires_grad and id(p) in owners) and id(p) not in self._copies for p in sample.parameters]
        before, self._previous = self._previous, (frozen, now)
        if before is None:
            compared = changed = sample.column([0.0] * len(frozen))
        else:
            compared = sample.column([a and b for a, b in zip(before[0], frozen)])
            changed = compared * (now != before[1])
        sums = {"compared": compared, "changed": changed, "comparable": sample.column(self._comparable)}
        return Group("tensors", self._tensors, sums, maxima={"bits": now, "negated": -now})

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        found = []
        if (group := states.get("updates")) is not None:
            s = group.sums
            judged = group.seen & (s["updates"] > 0) & ~_hides_gradients(group)
            found.append(reading("wiring/ungraded", group.cells, s["graded"] == 0, judged))
            found.append(reading("wiring/unchanged", group.cells, s["changed"] == 0, group.seen & (s["moving"] > 0)))
        if (group := states.get("owners")) is not None:
            found.append(reading("wiring/owners", group.cells, group.maxima["owners"], group.seen))
        if (group := states.get("tensors")) is not None:
            compared, changed = group.sums["compared"] > 0, group.sums["changed"] > 0
            found.append(reading("wiring/frozen_changed", group.cells, changed, group.seen & compared))
            differ = group.maxima["bits"] != -group.maxima["negated"]
            comparable = group.seen & (group.sums["comparable"] > 0)
            found.append(reading("wiring/replicas_differ", group.cells, differ, comparable))
        return kept(found)


def _hides_gradients(updates: Reduced) -> NDArray[np.bool_]:
    """Parameters of optimizers that learn without showing any gradient: it is gone before we can look."""
    owner = np.array([c[0] for c in updates.cells.coordinates])
    hidden = np.zeros(len(owner), np.bool_)
    for name in np.unique(owner):
        mine = owner == name
        hidden[mine] = not (updates.sums["graded"][mine] > 0).any() and (updates.sums["changed"][mine] > 0).any()
    return hidden
