"""Which runs there are: settings, healthy variants, faults, their controls and their cured twins.

Everything follows from ``protocol.toml``; nothing here trains, and nothing imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained; runs with one recipe differ in their seed only.

    Args:
        family: ``gpt``, ``llama``, ``gpt2``, ``vit``, ``convnet``, ``rnn`` or ``mlp``.
        depth: Blocks or layers.
        width: Size of the residual stream, channels or hidden units.
        steps: Horizon, in optimizer steps.
        batch: Sequences or images a step.
        context: Bytes of a sequence; without meaning for images.
        text: ``source`` or ``prose``; without meaning for images.
        lr: Learning rate after warm-up.
        schedule: ``cosine`` to a tenth, ``constant``, or one that is constant but for ``peak_on``: ``ramp`` to
            ``peak_times`` at the end, ``jump`` to it half-way.
        peak_times: What the learning rate of ``peak_on`` is multiplied by, all along where it is no ramp and no jump.
        peak_on: ``all``, ``attention`` for the layers that make queries and keys, or ``output``.
        warmup: Steps of linear warm-up.
        beta2: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW.
        output_decay: Weight decay of the output layer where it is another one.
        update_clip: Divides a tensor's learning rate by RMS_t where that is above 1 (arXiv 2304.13013).
        clip: Gradient norm; 0 for none.
        z_loss: Weight of the z-loss.
        qk_norm: Normalised queries and keys.
        norm: Normalisation in the blocks.
        init_gain: What the initial weights of all layers but the first and the last are multiplied by.
        activation: ``relu``, ``tanh`` or ``sigmoid`` where a family has a choice.
        quiet: Share of the run, from its beginning, in which gradients are a hundredth of what they are after it.
        fade: What the size of the gradients is multiplied by, little by little, until the end of the run.
        inject: ``corrupt_batch``, ``label_flip``, ``nan`` or ``overflow``.
        inject_at: Its step.
    """

    family: str
    depth: int
    width: int
    steps: int
    batch: int
    lr: float
    warmup: int
    context: int = 0
    text: str = ""
    schedule: str = "cosine"
    peak_times: float = 1.0
    peak_on: str = "all"
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    output_decay: float | None = None
    update_clip: bool = False
    clip: float = 1.0
    z_loss: float = 0.0
    qk_norm: bool = False
    norm: bool = True
    init_gain: float = 1.0
    activation: str = "relu"
    quiet: float = 0.0
    fade: float = 1.0
    inject: str | None = None
    inject_at: int | None = None

    def digest(self) -> str:
        """Tells recipes apart; a stored run of another recipe is trained again."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def with_changes(self, changes: Table) -> Recipe:
        """A recipe in which ``changes`` replace fields.

        Two are no fields: ``lower`` divides what makes the learning rate high, and ``inject_share`` tells the step of
        a fault as a share of the run.
        """
        fields = dict(changes)
        lower = fields.pop("lower", 1.0)
        if "inject_share" in fields:
            fields["inject_at"] = round(fields.pop("inject_share") * self.steps)
        changed = dataclasses.replace(self, **fields)
        return dataclasses.replace(changed, peak_times=changed.peak_times / lower)


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        name: Unique, and good as a file name.
        recipe: How it is trained.
        seed: Of initialisation and data.
        split: ``tuning`` or ``reporting``.
        row: Row of the published table.
        control: Name of its control, its own where it is one.
        reference: Name that the controls of all seeds share.
        kind: Kind of failure, ``none`` where none is expected.
        cure: Name of the remedy that was applied.
        cure_of: Name of the run that it was applied to.
        control_is: Name of the remedy that leads to the control itself.
    """

    name: str
    recipe: Recipe
    seed: int
    split: str
    row: str
    control: str
    reference: str
    kind: str = "none"
    cure: str | None = None
    cure_of: str | None = None
    control_is: str | None = None

    @property
    def configuration(self) -> str:
        """What runs share that differ in their seed only."""
        return re.sub(r"@\d+", "", self.name)


def zoo(protocol: Table, split: str) -> list[Run]:
    """Every run of one split, controls first within their setting.

    Args:
        protocol: The constants.
        split: ``tuning`` or ``reporting``.

    Raises:
        ValueError: If two different runs have one name.
    """
    runs: dict[str, Run] = {}
    for setting in protocol["setting"]:
        if setting["split"] == split:
            for run in _of_setting(protocol, setting):
                if runs.setdefault(run.name, run) != run:
                    raise ValueError(f"two different runs are called {run.name}")
    return list(runs.values())


def _of_setting(protocol: Table, setting: Table) -> Iterator[Run]:
    names = {f.name for f in dataclasses.fields(Recipe)}
    plain = Recipe(**{k: v for k, v in setting.items() if k in names})
    family = protocol["family"][plain.family]
    group = _Group(protocol, setting, family, plain)
    yield from group.references("", {})
    for variant in protocol["healthy"]:
        if plain.family in variant["families"] and setting["horizon"] == variant["horizon"]:
            yield from group.variants(variant["name"], variant["change"])
    for fault in protocol["fault"]:
        if plain.family in fault["families"] and setting["horizon"] == fault["horizon"]:
            yield from group.fault(fault)


@dataclass(frozen=True)
class _Group:
    """The runs of one setting."""

    protocol: Table
    setting: Table
    family: Table
    plain: Recipe

    def references(self, name: str, base: Table) -> Iterator[Run]:
        """Controls of as many seeds as a reference needs."""
        recipe = self.plain.with_changes(self._resolved(base))
        seeds = range(self.protocol["fate"]["reference_seeds"])
        yield from (self._run(f"{self._prefix(name)}control", recipe, seed) for seed in seeds)

    def variants(self, name: str, changes: Table) -> Iterator[Run]:
        """Other configurations of the same setting, on the seeds and batches of its control."""
        for label, change in self._ladder(name, changes):
            recipe = self.plain.with_changes(change)
            if recipe == self.plain:
                continue
            for seed in range(self.protocol["splits"][self.setting["split"]]["variant_seeds"]):
                control = f"{self._prefix('')}control@{self._seed(seed)}"
                yield self._run(f"{self._prefix('')}{label}", recipe, seed, control=control)

    def fault(self, fault: Table) -> Iterator[Run]:
        """Failing runs, their cured twins and, where the fault stands on another base, controls of their own."""
        base = fault.get("base", {})
        prefix = self._prefix(fault.get("base_name", ""))
        if base:
            yield from self.references(fault["base_name"], base)
        on = self.plain.with_changes(self._resolved(base))
        known = {c: self.protocol["cure"][c] for c in fault.get("cures", ())}
        cures = {
            c: cure for c, cure in known.items() if self.plain.family in cure.get("families", [self.plain.family])
        }
        for label, change in self._ladder(fault["name"], fault["change"]):
            recipe = on.with_changes(change)
            for i in range(fault[self.setting["split"]]):
                control = f"{prefix}control@{self._seed(i)}"
                twins = {c: recipe.with_changes(self._resolved(cure["change"])) for c, cure in cures.items()}
                same = next((c for c, twin in twins.items() if twin == on), None)
                run = self._run(f"{prefix}{label}", recipe, i, control=control, kind=fault["kind"], control_is=same)
                yield run
                for cure, twin in twins.items():
                    if twin not in (on, recipe):
                        yield dataclasses.replace(
                            run, name=f"{run.name}+{cure}", recipe=twin, cure=cure, cure_of=run.name, control_is=None
                        )

    def _run(self, name: str, recipe: Recipe, seed: int, control: str = "", **others: Any) -> Run:
        full = f"{name}@{self._seed(seed)}"
        control = control or full
        return Run(
            name=full,
            recipe=recipe,
            seed=self._seed(seed),
            split=self.setting["split"],
            row=self.setting["row"],
            control=control,
            reference=control.partition("@")[0],
            **others,
        )

    def _prefix(self, base: str) -> str:
        return f"{self.setting['name']}.{base}." if base else f"{self.setting['name']}."

    def _seed(self, i: int) -> int:
        return int(self.setting["first_seed"]) + i

    def _resolved(self, changes: Table) -> dict[str, Any]:
        """Values of the form ``family:NAME`` stand in the table of the family."""
        return {k: self._value(v) for k, v in changes.items()}

    def _value(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("family:"):
            return self.family[value.partition(":")[2]]
        return value

    def _ladder(self, name: str, changes: Table) -> Iterator[tuple[str, dict[str, Any]]]:
        """One change for each combination of the values where lists are given."""
        resolved = {k: v if isinstance(v, list) else [v] for k, v in self._resolved(changes).items()}
        rungs = list(itertools.product(*resolved.values()))
        several = [k for k, v in resolved.items() if len(v) > 1]
        for rung in rungs:
            change = dict(zip(resolved, rung))
            label = "".join(f"-{change[k]:g}" for k in several)
            yield name + label, change
