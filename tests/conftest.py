"""Settings that every test shares."""

from __future__ import annotations

import torch
from hypothesis import settings

# Small tensors gain nothing from threads, and one thread adds in the same order on every machine.
torch.set_num_threads(1)

# A first call that imports or compiles takes longer than hypothesis allows an example by default.
settings.register_profile("traindiag", deadline=None)
settings.load_profile("traindiag")
