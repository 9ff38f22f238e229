"""The tiny reasoner under every preset and head plan: rows of benchmarks/results/eval-tiny-reasoner.json from run folders.

    bitsandheads eval --model models/tiny-reasoner --tasks reasoning --samples 500 --batch-size 500 --max-new-tokens 600 --plans PLAN --output runs/PLAN
    python benchmarks/eval_tiny_reasoner.py runs/*

A folder may hold one plan or many. Every row is compared with `bf16` on the same problems; level 4 is counted once more by itself.
"""

import argparse
import json
from pathlib import Path

from bitsandheads.eval.environment import write_json
from bitsandheads.eval.runs import RUN, read_records
from bitsandheads.eval.summary import summarise

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "eval-tiny-reasoner.json"
LONGEST = 4  # level of the longest problems
COMMAND = (
    "bitsandheads eval --model models/tiny-reasoner --tasks reasoning --samples 500 --batch-size 500 --max-new-tokens 600 --plans PLAN"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--device", help="where the plans were run, if not all where the first folder was")
    parser.add_argument("--note", default="One process for each plan. *-short: groups of 32 tokens, a residual of 16.")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    records = list({(r["plan"], r["id"]): r for folder in args.folders for r in read_records(folder)}.values())
    longest = {r["plan"]: r for r in summarise(r for r in records if r["level"] == LONGEST)}
    rows = []
    for row in summarise(records):
        long = longest[row["plan"]]
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        rows.append(row | {f"level_{LONGEST}_n": long["n"], f"level_{LONGEST}_accuracy": round(long["accuracy"], 6)})
    run = json.loads((args.folders[0] / RUN).read_text())
    versions = run["versions"] | ({"device": args.device} if args.device else {})
    about = {
        "model": "tiny-reasoner",
        "task": "reasoning",
        "date": run["started"][:10],
        "versions": versions,
        "command": COMMAND,
        "note": args.note,
    }
    write_json(about | {"rows": rows}, args.result)
    for r in rows:
        print(f"{r['plan']:32} {r['n']} {r['accuracy']:.3f} {r['verdict'] or ''}  level {LONGEST}: {r[f'level_{LONGEST}_accuracy']:.3f}")


if __name__ == "__main__":
    main()
