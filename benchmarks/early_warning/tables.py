"""What people read of the results: the README's short table, docs/early_warning.md and its picture.

All of it follows from results/early_warning.json; without that file the marked places are empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.early_warning.agree import AGREE
from benchmarks.early_warning.contest import FEATURES
from benchmarks.early_warning.curve import picture
from benchmarks.early_warning.fates import FAILED
from benchmarks.early_warning.judge import ALL_ROWS, RESULT
from benchmarks.early_warning.rivals import LOSS_ALONE
from benchmarks.early_warning.score import CLOCKS, NAMED_WITHIN
from benchmarks.tables import ROOT, between

DOCS = ROOT / "docs" / "early_warning.md"
PICTURE = ROOT / "docs" / "early_warning.svg"
ROWS = ("new families", "new sizes and horizons", "new seeds", ALL_ROWS)
"""In the order of the tables; the first is the headline."""

_FATES = ("healthy", "grey", "slow", *FAILED)

Told = Mapping[str, Any]

_PICTURE = "![Share of failing runs warned with at least a share of the way to the onset left](early_warning.svg)"


def result() -> dict[str, Any] | None:
    """The published result; None where there is none yet."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else None


def readme_with(readme: str, found: Told | None) -> str:
    """The README with its short table."""
    return between(readme, "early warning", short_table(found) if found else "")


def docs_with(docs: str, found: Told | None) -> str:
    """The long document with all tables."""
    parts = {
        "slow": lambda r: f"{ahead_table(r, 'slow')}\n\n{_PICTURE}",
        "fast": lambda r: ahead_table(r, "fast"),
        "injected": injected_table,
        "fates": fates_table,
        "healthy": healthy_table,
        "rivals": rivals_table,
        "matched": matched_table,
        "cures": cures_table,
        "made with": made_with,
    }
    for name, part in parts.items():
        docs = between(docs, name, part(found) if found else "")
    return between(docs, "agree", agree_table(json.loads(AGREE.read_text())) if AGREE.exists() else "")


def write_tables() -> None:
    """Brings everything up to date."""
    found = result()
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text(), found))
    DOCS.write_text(docs_with(DOCS.read_text(), found))
    if found:
        PICTURE.write_text(picture(headline(found)))


def rows_of(found: Told) -> list[tuple[str, Told]]:
    """Rows that there are, in their order; those of other names, such as tuning, last."""
    rows = found["rows"]
    names = [*(r for r in ROWS if r in rows), *(r for r in rows if r not in ROWS)]
    return [(name, rows[name]) for name in names]


def headline(found: Told) -> Told:
    """The first row that there is."""
    return rows_of(found)[0][1]


# -- one table each ----------------------------------------------------------------------------


def short_table(found: Told) -> str:
    """The headline row: slow and fast failures by kind, injected faults, false alarms, and how far others come."""
    name, row = rows_of(found)[0]
    models = "models of families that nothing was tuned on" if name == ROWS[0] else f"the row {name!r}"
    lines = [
        [
            f"{clock}: {_plain(kind)}",
            of_kind["runs"],
            *(_recall(of_kind[which]) for which in ("material", "strict")),
            _lead(of_kind["material"]),
            _share(of_kind["material"]["mean_lead_share"]),
            _right(of_kind["material"], "right_family", "family_known"),
            _right(of_kind["material"], "right_diagnosis", "diagnosis_known"),
        ]
        for clock in CLOCKS
        for kind, of_kind in row.get(clock, {}).items()
    ]
    head = ["failures", "runs", "warned before the loss is 10 % worse", "2.5 % worse", "median lead"]
    told = [
        f"How early, on {models} ([how it is measured, by kind, and other detectors](docs/early_warning.md)):",
        _table([*head, "mean lead share", "right family", "right diagnosis"], lines),
    ]
    if row["injected"]:
        i = row["injected"]["all"]
        told.append(
            f"Injected faults, which nothing precedes: {i['within']} of {i['runs']} told within {NAMED_WITHIN} "
            f"steps, {i['named']} by the right name."
        )
    if row["healthy"]:
        h = row["healthy"]["all"]
        told.append(
            f"Healthy runs of the same families: {h['events']} false warnings in {h['steps']:,} steps "
            f"({h['per_10k']:.2f} per 10,000, at most {h['per_10k_below']:.2f}), on {h['false_runs']} of {h['runs']} "
            f"runs ({h['share']:.1%}, at most {h['share_below']:.1%})."
        )
    return "\n\n".join([*told, *(_nearest(row, clock) for clock in CLOCKS if clock in row)])


def _nearest(row: Told, clock: str) -> str:
    """The rival with the largest lead share at our budget, and what the configuration says without any signal."""
    at_budget = {
        name: rival["budget"][clock]["material"]["mean_lead_share"]
        for name, rival in row["rivals"].items()
        if rival["budget"]["possible"]
    }
    published = [n for n in at_budget if n not in FEATURES and n != LOSS_ALONE.name]
    told = f"{clock.capitalize()} failures, at the same number of false alarms on the tuning split: "
    if published:
        best = max(published, key=lambda name: at_budget[name])
        told += f"the best published detector ({best}) has a mean lead share of {at_budget[best]:.2f}, "
    others = [LOSS_ALONE.name, *FEATURES]
    return told + ", ".join(f"{n} {at_budget[n]:.2f}" for n in others if n in at_budget) + "."


def ahead_table(found: Told, clock: str) -> str:
    """One line a row and kind of one clock."""
    lines = [
        [
            row_name,
            _plain(kind),
            of_kind["runs"],
            *(_recall(of_kind[which]) for which in ("material", "strict", "cured")),
            _lead(of_kind["material"]),
            *(_share(of_kind[which].get("mean_lead_share")) for which in ("material", "strict", "cured")),
            _right(of_kind["material"], "right_family", "family_known"),
            _right(of_kind["material"], "right_diagnosis", "diagnosis_known"),
        ]
        for row_name, row in rows_of(found)
        if row_name != ALL_ROWS
        for kind, of_kind in row.get(clock, {}).items()
    ]
    head = ["row", "kind", "runs", "warned: material", "strict", "cured twin", "median lead"]
    return _table([*head, "mean lead share: material", "strict", "cured twin", "family", "diagnosis"], lines)


def injected_table(found: Told) -> str:
    """Delay and naming."""
    lines = [
        [
            row_name,
            _plain(kind),
            k["runs"],
            k["told"],
            f"{k['within']} ({k['low']:.0%} to {k['high']:.0%})",
            k["named"],
            _number(k["median_delay"]),
            k["before"],
        ]
        for row_name, row in rows_of(found)
        if row_name != ALL_ROWS
        for kind, k in row["injected"].items()
    ]
    within = f"within {NAMED_WITHIN} steps"
    head = ["row", "kind", "runs", "told", f"told {within}", f"named {within}", "median delay", "warned before it"]
    return _table(head, lines)


def healthy_table(found: Told) -> str:
    """False alarms by line, then by rule, then what is neither healthy nor failed."""
    lines = [
        [
            row_name,
            line,
            h["runs"],
            h["configurations"],
            f"{h['steps']:,}",
            h["events"],
            f"{h['per_10k']:.2f} (≤ {h['per_10k_below']:.2f})",
            h["false_runs"],
            f"{h['share']:.1%} (≤ {h['share_below']:.1%})",
        ]
        for row_name, row in rows_of(found)
        for line, h in row["healthy"].items()
    ]
    head = ["row", "runs that stayed healthy", "runs", "configurations", "steps", "false warnings"]
    told = [_table([*head, "per 10,000 steps", "false runs", "share"], lines)]
    rules = [
        [row_name, f"`{rule}`", count]
        for row_name, row in rows_of(found)
        if row_name != ALL_ROWS and row["healthy"]
        for rule, count in row["healthy"]["all"]["by_rule"].items()
    ]
    if rules:
        told.append(_table(["row", "rule", "false warnings"], rules))
    neither = [
        [row_name, fate, n["runs"], f"{n['share']:.0%}", n["warned"]]
        for row_name, row in rows_of(found)
        for fate, n in row["neither"].items()
    ]
    if neither:
        told.append(_table(["row", "neither healthy nor failed", "runs", "share of all runs", "warned"], neither))
    return "\n\n".join(told)


def fates_table(found: Told) -> str:
    """What runs came to at the cut of the protocol and at others."""
    lines = [
        [row_name, cut.removeprefix("fate at ").replace("fate", "protocol"), *(of.get(fate, 0) for fate in _FATES)]
        for row_name, row in rows_of(found)
        for cut, of in row["fates"].items()
        if cut != "healthy_and_failed"
    ]
    told = [_table(["row", "cut", *_FATES], lines)]
    for row_name, row in rows_of(found):
        if row_name != ALL_ROWS and (defects := row["fates"]["healthy_and_failed"]):
            told.append(
                f"{row_name}: {len(defects)} runs are healthy at one cut and failed at another, which is a defect of "
                "the protocol; the results name them under `healthy_and_failed`."
            )
    return "\n\n".join(told)


def rivals_table(found: Told) -> str:
    """The headline row: every rival as published and at our budget, one table a clock."""
    row = headline(found)
    told = []
    for clock in CLOCKS:
        if clock not in row:
            continue
        ours = row[clock]["all"]
        healthy = row["healthy"].get("all")
        first = [
            "**traindiag**",
            healthy["false_runs"] if healthy else "",
            _recall(ours["material"]),
            _share(ours["material"]["mean_lead_share"]),
            healthy["false_runs"] if healthy else "",
            _share(ours["material"]["mean_lead_share"]),
            "",
        ]
        lines = [first, *(_rival(name, rival, clock) for name, rival in row["rivals"].items())]
        head = ["detector", "as published: false runs", "warned", "mean lead share", "at our budget: false runs"]
        table = _table([*head, "mean lead share", "ours is larger by"], lines)
        told.append(f"{clock.capitalize()} failures:\n\n{table}")
    for clock, dealt in row["dealt_anew"].items():
        told.append(
            f"Alarms of another run, dealt to each {clock} failure: {dealt['failing']:.0%} hit if that run failed "
            f"too, {dealt['all']:.0%} if it is any run; its own: {dealt['own']:.0%}."
        )
    return "\n\n".join(told)


def _rival(name: str, rival: Told, clock: str) -> list[Any]:
    published, budget = rival["published"], rival["budget"]
    as_is, there = published[clock]["material"], budget[clock]["material"]
    false = [of["healthy"]["false_runs"] if of["healthy"] else "" for of in (published, budget)]
    cells = [name, false[0], _recall(as_is), _share(as_is["mean_lead_share"])]
    if not budget["possible"]:
        return [*cells, "no such limit", "", ""]
    interval = f"{there['ours_more']:+.2f} ({there['ours_more_low']:+.2f} to {there['ours_more_high']:+.2f})"
    return [*cells, false[1], _share(there["mean_lead_share"]), interval]


def matched_table(found: Told) -> str:
    """AUC where the configuration does not vary."""
    lines = []
    detectors: list[str] = []
    for row_name, row in rows_of(found):
        for clock, strata in row["matched"].items():
            for label, of_label in strata.items():
                if of_label["pairs"]:
                    detectors = [k for k in of_label if k not in ("strata", "pairs")]
                    aucs = [
                        f"{a['auc']:.2f} ({a['low']:.2f} to {a['high']:.2f})" for a in map(of_label.get, detectors)
                    ]
                    lines.append([row_name, clock, label, of_label["strata"], of_label["pairs"], *aucs])
    return _table(["row", "clock", "pairs of runs", "strata", "pairs", *detectors], lines)


def cures_table(found: Told) -> str:
    """What following the advice would have come to."""
    lines = []
    for row_name, row in rows_of(found):
        if row_name == ALL_ROWS:
            continue
        for clock, c in row["cure_rate"].items():
            both = c["both"]
            lines.append(
                [
                    row_name,
                    clock,
                    c["runs"],
                    *(_cured(of[k]) for of in (c, both) for k in ("advice", "a third of the learning rate")),
                    ", ".join(f"{what}: {n}" for what, n in c["not_tried"].items()),
                ]
            )
    head = ["row", "clock", "failing runs", "first remedy", "a third of the learning rate"]
    return _table([*head, "both tried: first remedy", "both tried: a third", "first remedy not tried"], lines)


def made_with(found: Told) -> str:
    """Where the numbers come from, and what was published before."""
    results = [*found["history"], found]
    lines = [
        [
            i,
            r["date"],
            f"`{r['rules']}`",
            f"`{r['protocol']}`",
            r["runs"],
            *(_recall(_all(r, c)) for c in CLOCKS),
            *(_share(_all(r, c).get("mean_lead_share")) for c in CLOCKS),
            f"{headline(r)['healthy']['all']['per_10k']:.2f}" if headline(r)["healthy"] else "",
            r["reason"],
        ]
        for i, r in enumerate(results, 1)
    ]
    head = ["", "date", "rules", "protocol", "runs", "slow: warned", "fast: warned", "slow: lead share"]
    table = _table([*head, "fast: lead share", "false per 10,000", "why"], lines)
    versions = ", ".join(f"{k} {found[k]}" for k in ("traindiag", "torch", "numpy"))
    return f"{found['machine']}, Python {found['python']}, {versions}.\n\n{table}"


def agree_table(found: Told) -> str:
    """Live against replay."""
    lines = [
        [
            f"`{r['run']}`",
            r["messages"],
            "yes" if r["same_in_replay"] else "**no**",
            _number(r["first_live"]),
            _number(r["first_stored"]),
        ]
        for r in found["runs"]
    ]
    head = ["run", "messages live", "the same in replay", "first warning live, step", "of the stored run"]
    return _table(head, lines)


def _all(found: Told, clock: str) -> Told:
    """All kinds of a clock in the headline row, material onset; nothing where it has none."""
    of_clock: Told = headline(found).get(clock, {})
    return of_clock["all"]["material"] if of_clock else {}


# -- for a terminal ----------------------------------------------------------------------------


def as_text(found: Told) -> str:
    """The tables of a result that may not be published."""
    others = (injected_table, fates_table, healthy_table, rivals_table, matched_table, cures_table)
    return "\n\n".join([*(ahead_table(found, c) for c in CLOCKS), *(table(found) for table in others)])


# -- cells -------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def _recall(at: Told) -> str:
    if "warned" not in at:
        return ""
    return f"{at['warned']} ({at['recall']:.0%}, {at['low']:.0%} to {at['high']:.0%})"


def _lead(at: Told) -> str:
    if at.get("median_lead") is None:
        return ""
    return f"{at['median_lead']:g} steps, {at['median_lead_of_run']:.0%} of the run"


def _right(at: Told, key: str, of: str) -> str:
    return f"{at[key]} of {at[of]}" if at.get(of) else ""


def _cured(tried: Told) -> str:
    if not tried["tried"]:
        return ""
    share = f"{tried['share']:.0%}, {tried['low']:.0%} to {tried['high']:.0%}"
    return f"{tried['healthy']} of {tried['tried']} ({share})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _plain(kind: str) -> str:
    return {"all": "**all**", "none": "a variant, no fault"}.get(kind, kind.replace("_", " "))
