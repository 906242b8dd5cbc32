"""A model that is not ours, trained twice: alone, with the truth taken down, and watched with all families on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.oracle import true_logits
from traindiag.capture.outputs import activation_of
from traindiag.demo.data import Windows, standard_library
from traindiag.engine.diagnostics import Diagnostics
from traindiag.record.series import Series

STEPS = 3
LENGTH = 16

Build = Callable[[], nn.Module]
Loss = Callable[[nn.Module, int], Tensor]


@cache
def text(step: int, size: int = 4, length: int = LENGTH) -> Tensor:
    """Tokens ``[size, length]`` of real text, below 256; the same ones for the same step."""
    windows = Windows(_training_text(), size, length, seed=step)
    return torch.stack([inputs for inputs, _ in windows])  # type: ignore[attr-defined]


@cache
def _training_text() -> Tensor:
    return standard_library()[0][:200_000]


def noise(step: int, *shape: int) -> Tensor:
    """Normal numbers, the same ones for the same step, without the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def classes(step: int, size: int, count: int) -> Tensor:
    """Class labels ``[size]``."""
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(step))


PADDING = torch.ones(4, LENGTH, dtype=torch.long)
"""1 where there is a token: two of the four texts of a batch are shorter."""
PADDING[1, 9:] = PADDING[3, 4:] = 0


@dataclass
class Truth:
    """One step of the run without us, in fp64 and seen another way.

    Args:
        attention: Largest logit of each head, by attention call in order.
        log_z: Mean log Z of each cross-entropy call.
        rms: By module, of what it returned first.
        gradients: Norm by parameter, before clipping; none where there is no gradient.
    """

    attention: list[Tensor] = field(default_factory=list)
    log_z: list[float] = field(default_factory=list)
    rms: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """What a run left behind."""

    model: nn.Module
    losses: list[Tensor]
    rng: Tensor
    truth: list[Truth]


def own_name(name: str) -> str:
    """The name that a module or parameter had before peft wrapped the model."""
    return name.removeprefix("base_model.model.")


@contextmanager
def taking_down(model: nn.Module) -> Iterator[Truth]:
    """The truth of the forward pass inside the block."""
    truth, cross_entropy = Truth(), F.cross_entropy

    def see_loss(input: Tensor, target: Tensor, *args: object, **kwargs: object) -> Tensor:
        tokens = input.detach().double()[target != -100]
        truth.log_z.append(float(tokens.logsumexp(-1).mean()))
        return cross_entropy(input, target, *args, **kwargs)  # type: ignore[arg-type]

    def see_output(name: str, _module: nn.Module, _args: object, output: object) -> None:
        tensor = activation_of(output)
        if tensor is not None:
            truth.rms[name] = float(tensor.detach().double().square().mean().sqrt())

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(partial(see_output, own_name(name)))
            stack.callback(handle.remove)
        stack.callback(setattr, F, "cross_entropy", cross_entropy)
        F.cross_entropy = see_loss
        truth.attention = stack.enter_context(true_logits())
        yield truth


def start(build: Build) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = build().train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def alone(build: Build, loss_of: Loss) -> Run:
    """A few steps of AdamW as most people write them, clipping included."""
    model, optimizer = start(build)
    run = Run(model, [], torch.empty(0), [])
    for step in range(STEPS):
        with taking_down(model) as truth:
            loss = loss_of(model, step)
        loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                truth.gradients[own_name(name)] = float(p.grad.double().norm())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.detach())
        run.truth.append(truth)
    run.rng = torch.get_rng_state()
    return run


def watched(build: Build, loss_of: Loss) -> tuple[Run, Diagnostics]:
    """The same with three lines of ours."""
    model, optimizer = start(build)
    run = Run(model, [], torch.empty(0), [])
    diagnostics = Diagnostics(model, optimizer, strict=True, terminal=False, every_n_steps=1, max_overhead=None)
    for step in range(STEPS):
        with diagnostics.step() as s:
            loss = s.loss(loss_of(model, step))
            loss.backward()
            s.gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.losses.append(loss.detach())
    run.rng = torch.get_rng_state()
    diagnostics.finish()
    return run, diagnostics


class Client:
    """A model and what was seen of its training; every ``assert_`` compares it with the truth."""

    def __init__(self, build: Build, loss_of: Loss) -> None:
        self.alone = alone(build, loss_of)
        self.run, self.diagnostics = watched(build, loss_of)
        self.truth = self.alone.truth
        self.history = self.diagnostics.history
        self.assert_neutral()

    @property
    def trained(self) -> set[str]:
        """Names of the parameters that the optimizer owns."""
        return {name for name, _ in self.diagnostics.watched.parameters["AdamW"]}

    def coverage(self, family: str) -> dict[str, set[str]]:
        """Places by sight."""
        found: dict[str, set[str]] = {}
        for row in self.diagnostics.coverage:
            if row.family == family:
                found.setdefault(row.sight, set()).update(row.places)
        return found

    def of(self, signal: str, parameter: str) -> list[float]:
        """Values of one parameter at the samples in which it was seen."""
        series = self.history[signal]
        (at,) = (i for i, c in enumerate(series.cells) if c.coordinates[-1] == parameter)
        found: list[float] = series.values[series.seen[:, at], at].tolist()
        return found

    def assert_neutral(self) -> None:
        """Bit for bit the run without us, which has learnt something."""
        assert all(a.equal(b) for a, b in zip(self.alone.losses, self.run.losses, strict=True))
        mine, theirs = (dict(r.model.named_parameters()) for r in (self.run, self.alone))
        assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in theirs)
        assert self.alone.rng.equal(self.run.rng)
        assert all(loss.isfinite() for loss in self.run.losses)
        assert not self.run.losses[1].equal(self.run.losses[0])

    def assert_attention(self, layers: Mapping[str, int], sight: str) -> None:
        """These layers with so many heads in the order of their calls, and value <= truth <= bound in each cell."""
        expected = [(name, head) for name, heads in layers.items() for head in range(heads)]
        value, bound = (self.history[f"attention/{n}"] for n in ("max_logit", "max_logit_bound"))
        assert list(value.cells.coordinates) == list(bound.cells.coordinates) == expected
        assert value.seen.all() and len(value) == STEPS
        truth = np.array([torch.cat(t.attention).numpy() for t in self.truth])
        slack = 2e-5 * (1 + np.abs(truth))
        assert value.values.shape == truth.shape
        assert (value.values <= truth + slack).all()
        assert (truth <= bound.values + slack).all()
        if sight == "exact":
            np.testing.assert_allclose(value.values, truth, rtol=1e-5, atol=1e-6)
        for name in ("logit_range", "entropy", "query_norm", "key_norm"):
            series = self.history[f"attention/{name}"]
            assert list(series.cells.coordinates) == expected
            assert np.isfinite(series.values).all() and (series.values > 0).all()
        assert self.coverage("attention") == {sight: set(layers)}

    def assert_no_attention(self) -> None:
        assert not [name for name in self.history if name.startswith("attention/")]
        assert self.coverage("attention") == {"unseen": set()}

    def assert_output(self, site: str) -> None:
        """A cross-entropy at this place, and the log Z of all its tokens."""
        log_z = self.history["output/log_z"]
        assert log_z.cells.labels == (site,)
        truth = [t.log_z for t in self.truth]
        np.testing.assert_allclose(log_z.values, truth, rtol=1e-5)
        assert np.isfinite(self.history["output/target_z_score"].values).all()
        assert self.coverage("output") == {"exact": {site}}

    def assert_activations(self, *blocks: str, stacks: Sequence[str] = ()) -> None:
        """Blocks, in the order of their calls, with the RMS of what they returned; and the stacks that they form."""
        rms = self.history["activation/rms"]
        assert rms.cells.labels == blocks
        truth = [[t.rms[name] for name in blocks] for t in self.truth]
        np.testing.assert_allclose(rms.values, truth, rtol=1e-5)
        assert self.coverage("activation") == {"exact": set(blocks)}
        name = "activation/growth_exponent"
        assert (self.history[name].cells.labels if name in self.history else ()) == tuple(stacks)

    def assert_parameters(self, *, without_gradient: Sequence[str] = (), frozen: Sequence[str] = ()) -> None:
        """Gradient and update cells of every trained parameter, and wiring that is well but for the named ones."""
        graded = self.trained - set(without_gradient)
        assert set(without_gradient) <= self.trained
        norm = self.history["gradient/parameter_norm"]
        truth = [[t.gradients.get(str(c.coordinates[1]), np.nan) for c in norm.cells] for t in self.truth]
        np.testing.assert_allclose(norm.values, truth, rtol=1e-4, atol=1e-12)
        assert seen_places(norm) == seen_places(self.history["gradient/rms"]) == graded
        assert seen_places(self.history["optimizer/update_rms"]) == self.trained
        assert seen_places(self.history["optimizer/rms_t"]) == graded
        assert (self.history["optimizer/skipped"].values == 0).all()

        assert flagged(self.history["wiring/ungraded"]) == set(without_gradient)
        assert flagged(self.history["wiring/unchanged"]) == set()
        owners = self.history["wiring/owners"]
        assert seen_places(owners) == self.trained and (owners.values == 1).all()
        assert set(self.diagnostics.watched.frozen) == set(frozen)
        if frozen:
            still = self.history["wiring/frozen_changed"]
            assert seen_places(still) == set(frozen) and flagged(still) == set()

        unseen = {"unseen": set(without_gradient)} if without_gradient else {}
        assert self.coverage("gradient") == {"exact": graded, **unseen}
        assert self.coverage("optimizer") == {"exact": {"AdamW"}, **unseen}
        assert "unseen" not in self.coverage("wiring")


def seen_places(series: Series) -> set[str]:
    """Last coordinates of the cells that were seen at any time."""
    return {str(c.coordinates[-1]) for c, seen in zip(series.cells, series.seen.any(0)) if seen}


def flagged(series: Series) -> set[str]:
    """Last coordinates of the cells in which a flag held at any time."""
    return {str(c.coordinates[-1]) for c, held in zip(series.cells, (series.values > 0).any(0)) if held}
