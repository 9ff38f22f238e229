"""SmolLM2-135M by sparsity: KL on long text and needles, from run folders of `bitsandheads eval`.

    S=benchmarks/results/head-scores-smollm2
    bitsandheads eval --model smollm2 --tasks fidelity --contexts 1024 --samples 1 --output runs/fidelity --plans bf16,rlkv:$S/mass.tsv@0.2,...
    bitsandheads eval --model smollm2 --tasks needle --contexts 512 --samples 1 --output runs/needle --plans bf16,rlkv:$S/mass.tsv@0.2,...
    python benchmarks/heads_smollm2.py runs/fidelity runs/needle --output benchmarks/results/heads-smollm2.json

The scores were found on the last third of the shipped text, which the windows of the fidelity task do not touch.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bitsandheads.eval import fidelity
from bitsandheads.eval.environment import write_json
from bitsandheads.eval.runs import read_records
from bitsandheads.eval.summary import summarise
from bitsandheads.methods import get_plan
from bitsandheads.models import load_config

TOKENS = 1024  # at which bytes_saved is counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--scores", type=Path, default=Path(__file__).parent / "results" / "head-scores-smollm2")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    records = list({(r["task"], r["plan"], r["id"]): r for folder in args.folders for r in read_records(folder)}.values())
    texts = {r["plan"]: r for r in fidelity.summarise([r for r in records if r["task"] == fidelity.TASK])}
    answers = {r["plan"]: r for r in summarise([r for r in records if r["task"] == "needle"])}
    rows = []
    for plan in dict.fromkeys(r["plan"] for r in records):
        name, _, sparsity = plan.removeprefix("rlkv:").partition("@")
        if plan != "bf16" and not plan.startswith("rlkv:"):
            continue
        full = plan == "bf16"
        resolved = get_plan("bf16" if full else f"rlkv:{args.scores / name}.tsv@{sparsity}").resolve(load_config("smollm2"))
        row: dict[str, Any] = {"plan": plan, "scores": "all heads" if full else name, "sparsity": float(sparsity or 0)}
        row["bytes_saved"] = resolved.sparsity(TOKENS).bytes_saved
        text, answer = texts.get(plan), answers.get(plan)
        row |= {k: text and text[k] for k in ("kl", "kl_low", "kl_high", "top1", "perplexity", "context", "tokens")}
        row |= {f"needles{k}": answer and answer[v] for k, v in (("", "accuracy"), ("_low", "low"), ("_high", "high"), ("_n", "n"))}
        rows.append(row)
    runs = [json.loads((folder / "run.json").read_text()) for folder in args.folders]
    about = [{"config": {k: v for k, v in r["config"].items() if k not in ("plans", "texts")}, "versions": r["versions"]} for r in runs]
    write_json({"rows": rows, "runs": about}, args.output)
    print(f"{len(rows)} rows in {args.output}")


if __name__ == "__main__":
    main()
