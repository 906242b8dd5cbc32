"""Output statistics against plain fp64 loops: what counts, what is sampled, and that nothing broken vanishes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from traindiag.functional import output, z_loss
from traindiag.functional.output import OutputStatistics, output_statistics


def truth(logits: Tensor, targets: Tensor | None, ignore: int = -100) -> dict[str, float]:
    """Token by token in numpy, fp64."""
    rows = logits.detach().double().numpy().reshape(-1, logits.shape[-1])
    marks = [None] * len(rows) if targets is None else targets.flatten().tolist()
    kept = [(row, mark) for row, mark in zip(rows, marks, strict=True) if mark != ignore]
    log_z = [row.max() + math.log(np.exp(row - row.max()).sum()) for row, _ in kept]
    scores = [(row[m] - row.mean()) / row.std() for row, m in kept if m is not None and len(set(row.tolist())) > 1]
    aimed = [(row, mark) for row, mark in kept if mark is not None]

    def loss(row: np.ndarray, mark: int, scale: float) -> float:
        row = scale * (row - row.max())
        return math.log(np.exp(row).sum()) - row[mark]

    h = 1e-5
    slopes = [(loss(row, mark, 1 + h) - loss(row, mark, 1 - h)) / (2 * h) for row, mark in aimed]
    return {
        "tokens": len(kept),
        "log_z_sum": sum(log_z),
        "log_z_square_sum": sum(z * z for z in log_z),
        "logit_mean_sum": sum(row.mean() for row, _ in kept),
        "target_z_sum": sum(scores),
        "target_z_tokens": len(scores),
        "overconfidence_sum": sum(slopes),
        "target_tokens": len(aimed),
        "log_z_max_abs": max((abs(z) for z in log_z), default=-math.inf),
        "logit_max": max((row.max() for row, _ in kept), default=-math.inf),
        "logit_max_negated": max((-row.min() for row, _ in kept), default=-math.inf),
    }


def assert_true(found: OutputStatistics, expected: dict[str, float], rtol: float = 1e-4) -> None:
    assert set(found._fields) == set(expected)
    for name, value in expected.items():
        assert getattr(found, name).item() == pytest.approx(value, rel=rtol, abs=2e-3), name


def sample(shape: tuple[int, ...], classes: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=source) * scale
    return logits, torch.randint(max(classes, 1), shape, generator=source)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    classes=st.integers(1, 7),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    known=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_few_tokens_are_all_counted(
    shape: tuple[int, ...], classes: int, ignored: float, known: bool, dtype: torch.dtype, seed: int
) -> None:
    logits, targets = sample(shape, classes, seed)
    logits = logits.to(dtype)
    targets[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < ignored] = -100
    given_targets = targets if known else None
    found = output_statistics(logits, given_targets)
    assert_true(found, truth(logits, given_targets))
    for state in found:
        assert state.dtype == torch.float32 and state.shape == ()


@given(count=st.integers(1, 3000), ignored=st.floats(0, 1), tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_as_many_tokens_that_count_as_may_be_looked_at(count: int, ignored: float, tokens: int, seed: int) -> None:
    """The logits of a token are its number, so that the states tell which ones were taken."""
    targets = torch.zeros(count, dtype=torch.long)
    targets[torch.rand(count, generator=torch.Generator().manual_seed(seed)) < ignored] = 7
    valid = [i for i, t in enumerate(targets.tolist()) if t != 7]
    logits = torch.arange(count, dtype=torch.float32)[:, None].expand(count, 2)
    found = output_statistics(logits, targets, ignore_index=7, tokens=tokens)
    assert found.tokens == min(len(valid), tokens)
    index, counted = output._choose(count, targets != 7, tokens, torch.device("cpu"))
    taken = index[counted].tolist()
    assert len(set(taken)) == len(taken) == min(len(valid), tokens)
    assert set(taken) <= set(valid)
    if taken:
        assert found.logit_max == max(taken) and found.logit_max_negated == -min(taken)
        assert found.logit_mean_sum == pytest.approx(sum(taken), rel=1e-5)
        bounds = [i * len(valid) // len(taken) for i in range(len(taken) + 1)]
        assert all(i in valid[a:b] for i, a, b in zip(taken, bounds[:-1], bounds[1:], strict=True))


def test_tokens_stand_at_many_places_of_their_sequences() -> None:
    """512 sequences of 64: a constant stride of 256 would always meet the same place."""
    index, _ = output._choose(512 * 64, None, 128, torch.device("cpu"))
    assert len({i % 64 for i in index.tolist()}) > 50


def test_a_transposed_view_is_not_copied_and_means_the_same() -> None:
    logits, targets = sample((6, 50), 9)
    transposed = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made._base is None and made is not args[0]:
                largest = max(largest, made.untyped_storage().nbytes() // 4 if made.is_floating_point() else 0)
            return made

    with Watch():
        found = output_statistics(transposed, targets, tokens=10)
    assert found == output_statistics(logits, targets, tokens=10)
    assert 0 < largest <= 10 * 9 * 2


def test_a_large_vocabulary_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = sample((40,), 11)
    whole = output_statistics(logits, targets)
    monkeypatch.setattr(output, "_BLOCK", 30)
    for a, b in zip(output_statistics(logits, targets), whole, strict=True):
        torch.testing.assert_close(a, b)


@given(shift=st.sampled_from([-1000.0, -3.0, 0.5, 200.0]), scale=st.sampled_from([0.01, 0.5, 4.0, 300.0]))
def test_shift_and_scale(shift: float, scale: float) -> None:
    """A constant moves log Z by itself and leaves the z-score; a factor leaves the z-score."""
    logits, targets = sample((64,), 30)
    before = output_statistics(logits, targets)
    moved = output_statistics(logits + shift, targets)
    assert ((moved.log_z_sum - before.log_z_sum) / 64).item() == pytest.approx(shift, rel=1e-4, abs=1e-3)
    assert ((moved.logit_mean_sum - before.logit_mean_sum) / 64).item() == pytest.approx(shift, rel=1e-4, abs=1e-3)
    for other in (moved, output_statistics(logits * scale, targets)):
        assert other.target_z_sum.item() == pytest.approx(before.target_z_sum.item(), rel=1e-3, abs=1e-2)
        assert other.target_z_tokens == before.target_z_tokens == 64


def test_a_learned_target_stands_out() -> None:
    logits, targets = sample((200,), 30)
    learned = logits.scatter_add(1, targets[:, None], torch.full((200, 1), 12.0))
    chance, found = (output_statistics(x, targets) for x in (logits, learned))
    assert abs(chance.target_z_sum / chance.target_z_tokens) < 0.3
    assert found.target_z_sum / found.target_z_tokens > 2


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3])
def test_a_head_that_starts_constant_has_no_z_score(constant: float) -> None:
    logits, targets = torch.full((5, 7), constant), torch.zeros(5, dtype=torch.long)
    found = output_statistics(logits, targets)
    assert found.target_z_tokens == 0 and found.target_z_sum == 0
    assert found.log_z_sum.item() == pytest.approx(5 * (constant + math.log(7)), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 3])
def test_what_is_not_finite_shows(bad: float, where: int) -> None:
    logits, targets = sample((4,), 6)
    logits[2, where] = bad
    found = output_statistics(logits, targets)
    broken = {n for n, v in found._asdict().items() if not math.isfinite(v)}
    always = {"logit_mean_sum", "target_z_sum"}
    if math.isnan(bad):
        assert broken == {
            *always,
            "overconfidence_sum",
            "log_z_sum",
            "log_z_square_sum",
            "log_z_max_abs",
            "logit_max",
            "logit_max_negated",
        }
        assert found.logit_max.isnan() and found.log_z_max_abs.isnan() and found.logit_max_negated.isnan()
    elif bad > 0:
        assert broken == {
            *always,
            "overconfidence_sum",
            "log_z_sum",
            "log_z_square_sum",
            "log_z_max_abs",
            "logit_max",
        }
        assert found.logit_max == math.inf
    else:  # a class that is ruled out: log Z is what it is without it
        assert broken == {*always, "logit_max_negated"}
        assert found.logit_max_negated == math.inf
    assert found.tokens == found.target_z_tokens == 4


def test_what_is_ignored_cannot_break_what_counts() -> None:
    logits, targets = sample((4,), 6)
    logits[2], targets[2] = math.nan, 5
    found = output_statistics(logits, targets, ignore_index=5)
    rest = [0, 1, 3]
    assert_true(found, truth(logits[rest], targets[rest], 5))


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(3, 4), torch.full((3,), -100)),
        (torch.zeros(3, 0), None),
    ],
)
def test_nothing_counted_is_nothing_and_not_nan(logits: Tensor, targets: Tensor | None) -> None:
    found = output_statistics(logits, targets)
    assert [v.item() for v in found] == [0.0] * 8 + [-math.inf] * 3


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("count", [40, 400])
def test_traceable_without_a_graph_break(known: bool, count: int) -> None:
    logits, targets = sample((count,), 20)
    targets[::3] = -100
    arguments = (logits, targets if known else None)
    traced = torch.compile(output_statistics, fullgraph=True, backend="aot_eager", dynamic=False)(*arguments)
    for a, b in zip(traced, output_statistics(*arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_free_of_autocast_gradients_and_the_random_state() -> None:
    logits, targets = sample((300,), 20)
    logits.requires_grad_()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = output_statistics(logits, targets)
    assert torch.equal(state, torch.get_rng_state())
    assert found == output_statistics(logits.detach(), targets)
    assert all(v.grad_fn is None and v.untyped_storage().nbytes() == 4 for v in found)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), None, "logits must be floating numbers, got torch.int64"),
        (torch.tensor(1.0), None, r"expected logits of shape \[\.\.\., classes\]"),
        (torch.zeros(2, 3), torch.zeros(2), "targets must be class indices, got torch.float32"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"targets of shape \(3,\) do not fit"),
    ],
)
@pytest.mark.parametrize("function", [output_statistics, z_loss])
def test_wrong_arguments_are_told(function: Any, logits: Tensor, targets: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(logits, targets)


def test_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        output_statistics(torch.zeros(2, 3), tokens=0)


# -- the penalty -----------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    classes=st.integers(1, 6),
    known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_z_loss_is_the_mean_square(shape: tuple[int, ...], classes: int, known: bool, seed: int) -> None:
    logits, targets = sample(shape, classes, seed)
    targets[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = -1
    expected = truth(logits, targets if known else None, -1)
    found = z_loss(logits, targets if known else None, ignore_index=-1)
    assert found.item() == pytest.approx(
        expected["log_z_square_sum"] / max(expected["tokens"], 1), rel=1e-4, abs=1e-6
    )


def test_z_loss_has_the_gradient_of_its_formula() -> None:
    logits, targets = sample((5,), 4)
    targets[1] = -100
    logits.requires_grad_()
    z_loss(logits, targets).backward()
    rows = logits.detach().double()
    expected = 2 * rows.logsumexp(-1, keepdim=True) * rows.softmax(-1) / 4
    expected[1] = 0
    torch.testing.assert_close(logits.grad, expected.float())


def test_z_loss_brings_log_z_back() -> None:
    head = nn.Linear(3, 5)
    nn.init.constant_(head.bias, 20.0)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = z_loss(head(x)).item()
    for _ in range(300):
        optimizer.zero_grad()
        z_loss(head(x)).backward()
        optimizer.step()
    assert z_loss(head(x)).item() < before / 100
