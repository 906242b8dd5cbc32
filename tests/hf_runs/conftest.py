"""Each run of the Trainer collects garbage first; what the imports left behind need not be walked over every time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _frozen_imports() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions leave ``bf16=True`` of one run in the environment for the next."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
