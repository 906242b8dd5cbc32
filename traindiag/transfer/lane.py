"""One lane to the host: pack, reduce, copy without waiting, read one step later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from traindiag.transfer.keys import UNSEEN, decode, encode
from traindiag.transfer.layout import Layout, Slot, negotiate
from traindiag.transfer.ranks import rank, world_size
from traindiag.transfer.screen import Screen
from traindiag.transfer.states import Group, Key, Reduced


@dataclass(frozen=True, slots=True)
class Delivery:
    """What all ranks measured at one step; identical on every rank.

    Args:
        step: The step that was measured.
        header: Header numbers, each summed over ranks.
        states: Reduced states by group key.
        calm: Whether it may have waited, because nothing in it could not wait.
    """

    step: int
    header: Mapping[str, float]
    states: Mapping[Key, Reduced]
    calm: bool = False


class Lane:
    """Sends the states of a step and delivers their reduction when asked one step later.

    Every message has the length of the frozen layout, so ranks can never disagree about a collective: a cell that a
    rank lacks is sent as the identity, a cell that the layout lacks is counted in the header and held back. When the
    header tells that any rank held something back, all ranks agree on a wider layout and send that step again, so
    nothing is lost. Both happen on the same step everywhere because both follow from reduced numbers only.

    A message that tells of nothing urgent may be put on a shelf and received later with others, in order.

    Args:
        device: Where states live.
        header: Names of the header numbers, the same on every rank.
        sums_only: Promise that no group has maxima; saves their collective.
    """

    def __init__(self, device: torch.device, header: Sequence[str] = (), *, sums_only: bool = False) -> None:
        self.device = device
        self.header = ("held_back", *header)
        self.layout: dict[Key, Slot] | None = None
        self._sums_only = sums_only
        self._places: _Places = []
        self._shelf: deque[tuple[int, Tensor, _Places]] = deque()
        self.screen = Screen()
        """What tells whether a message can wait."""
        self._indices: dict[tuple[Key, str], Tensor] = {}
        self._ones: dict[int, Tensor] = {}
        self._sent: _Sent | None = None
        # Metal has no float64; counts above 2^24 lose their last digits there
        self._float = torch.float32 if device.type == "mps" else torch.float64
        self._silent = torch.zeros(len(self.header), dtype=self._float, device=device)

    @property
    def pending(self) -> bool:
        """Whether a step waits to be received."""
        return bool(self._shelf) or self._sent is not None

    @property
    def shelved(self) -> int:
        """Steps on the shelf."""
        return len(self._shelf)

    def shelve(self) -> bool:
        """Puts the step that was sent last on the shelf; False where it has to be received now.

        It has where its numbers stir, its header says anything, or it carries maxima. Waits for other ranks.
        """
        sent = self._sent
        if sent is None or not self._sums_only or not self._is_calm(sent):
            return False
        self._sent = None
        self._shelf.append((sent.step, sent.wait()[0], self._places))
        return True

    def send(self, step: int, groups: Mapping[Key, Group], header: Mapping[str, float]) -> None:
        """Starts the reduction of one step. Returns at once except when the layout has to be agreed on."""
        if self._sent is not None:
            raise RuntimeError(f"step {self._sent.step} must be received before step {step} is sent")
        if self.layout is None:
            self._agree(groups)
        self._sent = self._launch(step, groups, header)

    def ready(self) -> bool:
        """Waits for the next step to be received; whether it is there and asks for no wider layout.

        Then :meth:`receive` starts no collective and may be called from any thread.
        """
        return bool(self._shelf) or (self._sent is not None and float(self._sent.wait()[0][0]) == 0)

    def receive(self, patience: float | None = None) -> Delivery | None:
        """The oldest step on the shelf or else the one that was sent last, or None where there is none.

        Args:
            patience: Seconds to wait for other ranks. After an exception they may never answer: what has not come by
                then is given up, and no new collective is started. None waits as long as the process group does.
        """
        if self._shelf:
            step, sums, places = self._shelf.popleft()
            return Delivery(step, dict.fromkeys(self.header, 0.0), _unpack(places, _array(sums), None), calm=True)
        sent, self._sent = self._sent, None
        if sent is None or (patience is not None and not sent.arrives_within(patience)):
            return None
        sums, keys = sent.wait()
        if sums[0] > 0:  # some rank held cells back: the layout grows and the step goes out again
            if patience is not None and world_size() > 1:
                return None
            self._agree(sent.groups)
            sent.calm = False
            sums, keys = self._launch(sent.step, sent.groups, sent.header).wait()
        header = dict(zip(self.header, sums[: len(self.header)].tolist()))
        states = _unpack(self._places, _array(sums), None if keys is None else keys.numpy())
        return Delivery(sent.step, header, states, calm=self._is_calm(sent))

    def _is_calm(self, sent: _Sent) -> bool:
        if sent.calm is None:
            # nobody asks how a lane with maxima is doing
            sent.calm = self._sums_only and not self.screen.stirs(sent.wait()[0].tolist())
        return sent.calm

    def _agree(self, groups: Mapping[Key, Group]) -> None:
        self.layout = negotiate(self.layout or {}, groups, world_size())
        self._indices.clear()
        self._places, at, key_at = [], len(self.header), 0
        for key, slot in self.layout.items():
            size = len(slot.cells) * (1 + len(slot.sums))
            self._places.append((key, slot, slice(at, at + size), key_at))
            at, key_at = at + size, key_at + len(slot.cells) * len(slot.maxima)
        self.screen.lay_out(
            [
                ("header", len(self.header)),  # zero, unless it has something to say
                *(
                    (":".join((*key, state)), len(slot.cells))
                    for key, slot in self.layout.items()
                    for state in ("seen", *slot.sums)
                ),
            ]
        )

    def _launch(self, step: int, groups: Mapping[Key, Group], header: Mapping[str, float]) -> _Sent:
        layout = self.layout or {}
        fitting = {key: group for key, group in groups.items() if key in layout and layout[key].covers(group)}
        sums = torch.cat([self._head(len(groups) - len(fitting), header), *self._sum_parts(layout, fitting)])
        keys = None
        if not self._sums_only:
            parts = list(self._key_parts(layout, fitting, rank()))
            keys = torch.cat(parts) if parts else None
        return _Sent(step, groups, header, sums, keys)

    def _head(self, held_back: int, header: Mapping[str, float]) -> Tensor:
        """The header on the device; most steps have nothing to say in it."""
        if not held_back and not header:
            return self._silent
        numbers = [float(held_back), *(header.get(name, 0.0) for name in self.header[1:])]
        return torch.tensor(numbers, dtype=self._float).to(self.device, non_blocking=True)

    def _sum_parts(self, layout: Layout, fitting: Mapping[Key, Group]) -> Iterable[Tensor]:
        for key, slot in layout.items():
            group = fitting.get(key)
            n = len(slot.cells)
            if group is None:
                yield torch.zeros(n * (1 + len(slot.sums)), dtype=self._float, device=self.device)
                continue
            index = self._index(key, slot, group)
            if index is None:
                yield self._all_seen(n)
                for name in slot.sums:  # in whatever precision: the header is wide, and joining them widens all
                    state = group.sums[name]
                    yield state if state.device == self.device else self._wide(state)
                continue
            block = torch.zeros(1 + len(slot.sums), n, dtype=self._float, device=self.device)
            block[0, index] = 1
            for row, name in enumerate(slot.sums, start=1):
                block[row, index] = self._wide(group.sums[name])
            yield block.flatten()

    def _key_parts(self, layout: Layout, fitting: Mapping[Key, Group], sender: int) -> Iterable[Tensor]:
        for key, slot in layout.items():
            if not slot.maxima:
                continue
            n = len(slot.cells)
            group = fitting.get(key)
            if group is None:
                yield torch.full((n * len(slot.maxima),), UNSEEN, dtype=torch.int64, device=self.device)
                continue
            index = self._index(key, slot, group)
            states = [group.maxima[name].to(self.device, torch.float32) for name in slot.maxima]
            values = encode(torch.stack(states), sender)
            if index is None:
                yield values.flatten()
                continue
            block = torch.full((len(slot.maxima), n), UNSEEN, dtype=torch.int64, device=self.device)
            block[:, index] = values
            yield block.flatten()

    def _all_seen(self, n: int) -> Tensor:
        if n not in self._ones:
            self._ones[n] = torch.ones(n, dtype=self._float, device=self.device)
        return self._ones[n]

    def _wide(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == self._float and tensor.device == self.device:
            return tensor
        return tensor.to(self.device, self._float, non_blocking=True)

    def _index(self, key: Key, slot: Slot, group: Group) -> Tensor | None:
        """Places of the group's cells in the slot; None when they are the slot's own cells."""
        if group.cells is slot.cells or group.cells.digest == slot.cells.digest:
            return None
        cached = self._indices.get((key, group.cells.digest))
        if cached is None:
            places = [slot.cells.position[c] for c in group.cells.coordinates]
            cached = self._indices[key, group.cells.digest] = torch.tensor(places, device=self.device)
        return cached


_Places = list[tuple[Key, Slot, slice, int]]


def _array(sums: Tensor) -> NDArray[np.float64]:
    return sums.numpy().astype(np.float64, copy=False)


def _unpack(places: _Places, sums: NDArray[np.float64], keys: NDArray[np.int64] | None) -> dict[Key, Reduced]:
    states: dict[Key, Reduced] = {}
    for key, slot, place, key_at in places:
        n = len(slot.cells)
        rows = sums[place].reshape(-1, n)
        seen = rows[0] > 0
        if not seen.any():
            continue
        maxima: dict[str, NDArray[np.float32]] = {}
        ranks: dict[str, NDArray[np.int64]] = {}
        for row, name in enumerate(slot.maxima):
            assert keys is not None
            maxima[name], ranks[name] = decode(keys[key_at + row * n : key_at + (row + 1) * n])
        states[key] = Reduced(slot.cells, seen, dict(zip(slot.sums, rows[1:])), maxima, ranks)
    return states


class _Sent:
    """A message under way. Keeps its groups, in case they must be sent again under a wider layout."""

    def __init__(
        self,
        step: int,
        groups: Mapping[Key, Group],
        header: Mapping[str, float],
        sums: Tensor,
        keys: Tensor | None,
    ) -> None:
        self.step, self.groups, self.header = step, groups, header
        self.calm: bool | None = None
        self._sums = _Transfer(sums, maximum=False)
        self._keys = None if keys is None else _Transfer(keys, maximum=True)

    def arrives_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (self._sums.done() and (self._keys is None or self._keys.done())):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def wait(self) -> tuple[Tensor, Tensor | None]:
        return self._sums.wait(), None if self._keys is None else self._keys.wait()


class _Transfer:
    """One collective and one copy, both without a host wait until :meth:`wait`."""

    def __init__(self, tensor: Tensor, *, maximum: bool) -> None:
        self._work: dist.Work | None = None
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if world_size() > 1:
            self._work = dist.all_reduce(
                tensor, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, async_op=True
            )
        if tensor.is_cuda:
            if self._work is not None:
                self._work.wait()  # on CUDA this orders streams and does not stop the host
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def done(self) -> bool:
        if self._event is not None:
            return bool(self._event.query())  # type: ignore[no-untyped-call]
        return self._work is None or self._work.is_completed()

    def wait(self) -> Tensor:
        """The numbers, on the host; at once when asked again."""
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        self._event = self._work = None
        if self._tensor.device.type != "cpu":
            self._tensor = self._tensor.cpu()
        return self._tensor
