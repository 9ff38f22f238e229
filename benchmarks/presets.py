"""KL, perplexity and top-1 of every preset with bootstrap intervals, on SmolLM2-135M and the shipped text.

    python benchmarks/presets.py --output benchmarks/results/presets-smollm2.json

For each context length and window of the text: one full-precision run, then each plan teacher-forced through its real cache.
Rows are appended as they are found; a killed run continues where it stopped. The summary pools a plan's windows and gives its
KL over kivi-2's with an interval from a paired block bootstrap.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bitsandheads import get_plan, preset_names
from bitsandheads.demo import default_text, versions, write_json
from bitsandheads.eval import fidelity
from bitsandheads.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--windows", type=int, default=3, help="windows of the text for each context")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--plans", nargs="+", default=preset_names())
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    plans = [get_plan(p) for p in dict.fromkeys(["kivi-2", *args.plans])]
    data = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": []}
    done = {(r["plan"], r["context"], r["window"]) for r in data["rows"]}
    model, tokenizer = load(args.model)
    text = default_text() if args.text is None else args.text.read_text()
    length = tokenizer(text, return_tensors="pt").input_ids.shape[1]
    for context in args.contexts:
        need = context + args.tokens + 1
        for window in track(range(args.windows), description=f"context {context}"):
            todo = [p for p in plans if (p.name, context, window) not in done]
            if not todo:
                continue
            offset = window * fidelity.STRIDE % (length - need)
            ids = fidelity.token_ids(tokenizer, text, context, args.tokens, offset)
            against = fidelity.reference(model, ids, context, args.tokens)
            for plan in todo:
                row, _ = fidelity.measure(model, plan, against)
                data["rows"].append(row | {"window": window, "offset": offset})
                write_json(data, args.output)
    summary = fidelity.summarise(data["rows"])
    for row in data["rows"]:
        row["token_kl"] = [float(f"{x:.4g}") for x in row["token_kl"]]
    write_json({"model": args.model, "versions": versions(), "summary": summary, "rows": data["rows"]}, args.output)
    for r in summary:
        Console().print(
            f"{r['context']:5} {r['plan']:16} {r['bits_per_element_without_residual']:.2f} bits  "
            f"KL {r['kl']:.4f} [{r['kl_low']:.4f}, {r['kl_high']:.4f}]  "
            f"x kivi-2 {r['kl_over_kivi2']:.3f} [{r['kl_over_kivi2_low']:.3f}, {r['kl_over_kivi2_high']:.3f}]  "
            f"top-1 {r['top1']:.3f} [{r['top1_low']:.3f}, {r['top1_high']:.3f}]  "
            f"perplexity {r['perplexity']:.2f} [{r['perplexity_low']:.2f}, {r['perplexity_high']:.2f}]",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
