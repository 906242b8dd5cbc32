"""The zoo from the command line.

python -m benchmarks.early_warning plan                                  # how many runs of which kind, and steps
python -m benchmarks.early_warning run --split tuning --jobs 2           # trains what is missing
python -m benchmarks.early_warning fates                                 # writes fates.json from the losses alone
python -m benchmarks.early_warning judge --split reporting --jobs 2      # writes results/early_warning.json
python -m benchmarks.early_warning judge --split tuning                  # prints, and writes beside the runs
python -m benchmarks.early_warning tables                                # README, docs/early_warning.md, its picture
python -m benchmarks.early_warning agree                                 # live and replayed verdicts of ten runs
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.early_warning.agree import agree
from benchmarks.early_warning.fates import FAILED, judge_all, protocol, read_folder
from benchmarks.early_warning.judge import RESULT, judge_runs, protocol_digest, publish, read_fates
from benchmarks.early_warning.many import train_all
from benchmarks.early_warning.tables import as_text, write_tables
from benchmarks.early_warning.zoo import Run, zoo

HERE = Path(__file__).parent
RUNS = HERE / "runs"
FATES = HERE / "fates.json"
SPLITS = ("tuning", "reporting")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 1 if a run could not be trained."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.early_warning", description=__doc__)
    parser.add_argument("command", choices=["plan", "run", "fates", "judge", "tables", "agree"])
    parser.add_argument("--split", choices=SPLITS, action="append", help="one or both; both if not given")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--row", action="append", help="rows of the published table; all if not given")
    parser.add_argument("--without-twins", action="store_true", help="leave cured twins for later")
    parser.add_argument("--only", default="*", help="glob over names of runs")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where stored runs are")
    parser.add_argument("--no-log", action="store_true", help="losses only, for looking at fates in a folder apart")
    parser.add_argument("--reason", help="why the reporting split is judged once more")
    given = parser.parse_args(arguments)
    fates_file = FATES if given.folder == RUNS else given.folder / "fates.json"
    plan = [
        run
        for split in given.split or SPLITS
        for run in zoo(protocol(), split)
        if fnmatch.fnmatchcase(run.name, given.only)
        and (not given.row or run.row in given.row)
        and not (given.without_twins and run.cure)
    ]
    if given.command == "plan":
        print_plan(plan)
    elif given.command == "run":
        return train_all(plan, given.folder, given.jobs, log=not given.no_log)
    elif given.command == "fates":
        write_fates(given.folder, fates_file)
    elif given.command == "tables":
        write_tables()
    elif given.command == "agree":
        return agree(zoo(protocol(), "tuning"), given.folder)
    else:
        if given.split not in (["tuning"], ["reporting"]):
            parser.error("judge takes one --split")
        if given.split == ["reporting"] and RESULT.exists() and not given.reason:
            parser.error("the reporting split was judged before: say why it is again, with --reason")
        result = judge_runs(plan, zoo(protocol(), "tuning"), given.folder, read_fates(fates_file), given.jobs)
        print(as_text(result))
        if given.split == ["reporting"]:
            publish(result, RESULT, given.reason)
        else:
            (given.folder / "judged_tuning.json").write_text(json.dumps(result, indent=1))
    return 0


def print_plan(plan: list[Run]) -> None:
    """Runs and steps by setting and kind."""
    rows: Counter[tuple[str, str, str]] = Counter()
    steps: Counter[tuple[str, str, str]] = Counter()
    for run in plan:
        kind = "cured twin" if run.cure else "control" if run.control == run.name else run.kind
        key = (run.split, run.name.partition(".")[0], kind)
        rows[key] += 1
        steps[key] += run.recipe.steps
    for key in rows:
        print(f"{key[0]:10} {key[1]:14} {key[2]:22} {rows[key]:5} runs {steps[key]:8,} steps")
    print(f"{len(plan)} runs, {sum(steps.values()):,} steps, {len({r.configuration for r in plan})} configurations")


def write_fates(folder: Path, path: Path) -> None:
    """Judges all runs whose losses are stored and prints how many came to what, by kind."""
    runs = read_folder(folder / "losses")
    fates = judge_all(runs, protocol())
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(told)}" for name, told in fates.items())
    path.write_text(f'{{"protocol": "{protocol_digest()}", "runs": {{\n{lines}\n}}}}\n')
    table: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for name, told in fates.items():
        kind = "cured twin" if told["cure"] else told["kind"]
        table[told["split"], name.partition(".")[0], kind][told["fate"]] += 1
    for key in sorted(table):
        print(f"{key[0]:10} {key[1]:14} {key[2]:22} " + ", ".join(f"{n} {f}" for f, n in table[key].most_common()))
    healthy = [t for t in fates.values() if t["fate"] == "healthy" and t["injected_at"] is None]
    failed = Counter(t["kind"] for t in fates.values() if t["fate"] in FAILED and not t["cure"])
    print(f"{len(healthy)} healthy runs of {len({t['configuration'] for t in healthy})} configurations,")
    print(f"{sum(t['steps'] for t in healthy):,} healthy steps; failing by kind: {dict(failed)}")
    clocks = Counter(t["clock"] for t in fates.values() if t["fate"] in FAILED and not t["cure"])
    grey = sum(t["fate"] in ("grey", "slow") for t in fates.values()) / max(1, len(fates))
    print(f"clocks: {dict(clocks)}; grey or slow: {grey:.0%}")
    for name, told in fates.items():
        others = {told[key] for key in told if key.startswith("fate_at_")} | {told["fate"]}
        if "healthy" in others and others & set(FAILED):
            print(f"a defect of the protocol: {name} is both healthy and failed, by the cut")


if __name__ == "__main__":
    raise SystemExit(main())
