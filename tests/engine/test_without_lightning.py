"""The engine where Lightning cannot be imported, and what the callback says there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from traindiag.record.log import read_log

ROOT = Path(__file__).parents[2]

WITHOUT = """
import sys

class Blocked:
    tried = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            self.tried.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

TRAIN = """
import torch
from traindiag import Diagnostics, Threshold
from traindiag.demo.model import GPT, GPTConfig, next_token_loss

torch.set_num_threads(1)
torch.manual_seed(0)
model = GPT(GPTConfig(layers=1, width=16, heads=2, context=16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rules = [Threshold("loss/value", above=0.0, name="always", severity="warning")]
diagnostics = Diagnostics(model, optimizer, {folder!r}, rules=rules, every_n_steps=2, strict=True)
for i in range(6):
    with diagnostics.step() as step:
        tokens = torch.randint(256, (2, 17))
        step.loss(next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])[0]).backward()
        step.gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
diagnostics.finish()
state = diagnostics.state_dict()
again = Diagnostics(model, optimizer, terminal=False)
again.load_state_dict(state)
assert again.step_count == 6
attached = Diagnostics.attach(model, optimizer, terminal=False)
model(tokens[:, :-1]).sum().backward()
optimizer.step()
attached.detach()
assert len(attached.history["gradient/norm_applied"]) == 1
assert not {{"lightning", "pytorch_lightning"}} & set(sys.modules)
assert Blocked.tried == [], Blocked.tried
"""

CALLBACK = """
import traindiag
assert "TrainingDiagnostics" in dir(traindiag)
try:
    traindiag.TrainingDiagnostics
except ImportError as error:
    print(error)
"""


def python(code: str, *, without: tuple[str, ...]) -> str:
    code = WITHOUT.format(packages=set(without)) + code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_whole_run_with_panels_and_alerts(tmp_path: Path) -> None:
    extras = ("lightning", "pytorch_lightning", "lightning_fabric", "transformers", "wandb", "peft")
    python(TRAIN.format(folder=str(tmp_path)), without=extras)
    log = read_log(tmp_path)
    assert not log.problems
    assert log.history["loss/value"].steps.tolist() == [*range(6)]
    assert {0, 2, 4} <= set(log.history["attention/max_logit"].steps.tolist())
    (file,) = tmp_path.rglob("alerts.jsonl")
    assert "always" in [json.loads(line)["rule"] for line in file.read_text().splitlines()]


def test_the_callback_says_what_to_install() -> None:
    told = python(CALLBACK, without=("lightning", "pytorch_lightning"))
    assert "pip install lightning" in told and "traindiag.Diagnostics" in told


def test_the_block_blocks() -> None:
    assert "blocked" in python(
        "try:\n    import lightning\nexcept ModuleNotFoundError:\n    print('blocked')\n", without=("lightning",)
    )
