"""A short prompt and a long continuation: how many tokens must be there before the basis of `balanced` is found?

    python benchmarks/short_prompt.py --output benchmarks/results/short-prompt-smollm2.json

Prefills a short prompt, teacher-forces a long text through the real cache, and compares the KL of the last tokens with kivi-2's.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitsandheads import CachePlan, get_plan
from bitsandheads.demo import default_text, versions, write_json
from bitsandheads.eval import fidelity
from bitsandheads.eval.stats import bootstrap_ratio
from bitsandheads.models import load


def with_basis(tokens: int) -> CachePlan:
    plan = get_plan("balanced")
    group = plan.groups[0]
    return replace(plan, name=f"balanced, basis {tokens}", groups=(replace(group, quant=replace(group.quant, basis_tokens=tokens)),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--last", type=int, default=512, help="tokens at the end that count")
    parser.add_argument("--offset", type=int, default=9000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    ids = fidelity.token_ids(tokenizer, default_text(), args.prompt, args.tokens, args.offset)
    against = fidelity.reference(model, ids, args.prompt, args.tokens)
    rows, base = [], None
    for plan in [get_plan("kivi-2"), with_basis(128), with_basis(256), get_plan("balanced"), get_plan("extreme")]:
        row, _ = fidelity.measure(model, plan, against)
        last = np.array(row["token_kl"])[-args.last :]
        base = last if base is None else base
        low, high = bootstrap_ratio(last, base, fidelity.BLOCK)
        rows.append(
            {"plan": plan.name, "kl": last.mean(), "ratio": last.mean() / base.mean(), "low": low, "high": high, "tokens": args.last}
        )
        print(f"{plan.name:20} KL {last.mean():.4f}  x kivi-2 {last.mean() / base.mean():.3f} [{low:.3f}, {high:.3f}]", flush=True)
    setting = {k: getattr(args, k) for k in ("model", "prompt", "tokens", "last", "offset")}
    write_json(setting | {"versions": versions(), "rows": rows}, args.output)


if __name__ == "__main__":
    main()
