"""In minutes on a CPU: at which sparsity does the tiny reasoner stop to write the solutions that it writes with all heads?

    python benchmarks/heads_exact.py --output benchmarks/results/heads-exact.json

Each held-out problem's solution is given to the model in one pass, with the windowed heads' attention masked as a cache would; where
every next token is the likeliest one, greedy generation under the plan writes exactly this solution. That share is a lower bound of the
accuracy (an answer may be right on another way) and needs no generation. Long problems only; see heads_tiny_reasoner.py for generation.
Problems are done in turn, each with all cells, so the file is complete for as many problems as it counts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from heads_tiny_reasoner import FINER, LONG, ROOT, SCORES, SPARSITIES, WHOLE, Cell, plan_of
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from bitsandheads import HeadScores
from bitsandheads.eval.environment import versions, write_json
from bitsandheads.eval.runs import commit
from bitsandheads.eval.stats import wilson
from bitsandheads.gates.attention import local_mask
from bitsandheads.models import load
from bitsandheads.seam import AttentionCall, probed
from bitsandheads.tasks import reasoning


def windowed_heads(cell: Cell, scores: Path) -> list[list[int]]:
    """KV heads of each layer that have a window."""
    if cell.scores == WHOLE:
        return [[]] * len(HeadScores.read(next(scores.glob("*.tsv"))).values)
    groups = plan_of(cell, scores).layers
    return [[h for g in groups[i] if g.window is not None for h in g.kv_heads] for i in sorted(groups)]


def unchanged(model: Any, ids: Tensor, solution: list[int], cache: DynamicCache, first: int, cell: Cell, heads: list[list[int]]) -> bool:
    """Whether every token of the solution is the likeliest one. cache: of the prompt, unchanged on return; first: token that follows it."""
    if first != solution[0]:
        return False

    def probe(call: AttentionCall) -> Tensor:
        group = call.q.shape[1] // call.k.shape[1]
        out = torch.empty_like(call.q)
        local = local_mask(call.mask, cell.window)
        for head in range(call.k.shape[1]):
            mine, mask = slice(head * group, (head + 1) * group), local if head in heads[call.layer] else call.mask
            k, v = (x[:, head : head + 1].expand(-1, group, -1, -1) for x in (call.k, call.v))
            out[:, mine] = scaled_dot_product_attention(call.q[:, mine], k, v, attn_mask=mask, scale=call.scale)
        return out.transpose(1, 2)

    with probed(model, probe):
        logits = model(torch.tensor([solution[:-1]]), past_key_values=cache).logits[0]
    cache.crop(-(len(solution) - 1))
    return logits.argmax(-1).tolist() == solution[1:]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The share of unchanged solutions by sparsity, a line for each source of scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    start = next(r for r in rows if r["scores"] == WHOLE)
    for name in dict.fromkeys(r["scores"] for r in rows if r["scores"] != WHOLE):
        own = [start, *(r for r in rows if r["scores"] == name)]
        y = [r["unchanged"] for r in own]
        error = [[max(a - r["low"], 0) for a, r in zip(y, own, strict=True)], [max(r["high"] - a, 0) for a, r in zip(y, own, strict=True)]]
        style = {"color": "0.6", "linestyle": ":"} if name.startswith("random") else {}
        axes.errorbar([r["sparsity"] for r in own], y, error, label=name, marker="o", markersize=4, capsize=2, **style)
    axes.set(xlabel="sparsity (share of KV heads windowed)", ylabel=f"solutions unchanged, of {start['n']}", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-reasoner")
    parser.add_argument("--scores", type=Path, default=SCORES)
    parser.add_argument("--samples", type=int, default=189)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="only draw what --output holds")
    args = parser.parse_args()
    if args.plot:
        return plot(json.loads(args.output.read_text())["rows"], args.plot)
    model, _ = load(str(args.model), "cpu")
    sources = sorted(p.stem for p in args.scores.glob("*.tsv"))
    cells = [Cell(WHOLE, 0.0)] + [Cell(name, s) for name in sources for s in sorted((*SPARSITIES, *FINER))]
    heads = {c: windowed_heads(c, args.scores) for c in cells}
    known = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": []}
    right = {r["plan"]: [c == "1" for c in r["right"]] for r in known["rows"]}
    done = min((len(right.get(c.name, [])) for c in cells), default=0)
    right = {c.name: right.get(c.name, [])[:done] for c in cells}
    levels = [level for level in reasoning.LEVELS if level >= LONG]
    for number, sample in enumerate(track(reasoning.samples("test", args.samples, seed=1, levels=levels), description="problems")):
        if number < done:
            continue
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([reasoning.encode(sample.prompt)])
        first = int(model(ids, past_key_values=cache).logits[0, -1].argmax())
        solution = [*reasoning.encode(sample.solution), reasoning.EOS]
        for cell in cells:
            right[cell.name].append(unchanged(model, ids, solution, cache, first, cell, heads[cell]))
        rows = []
        for cell in cells:
            own = right[cell.name]
            low, high = wilson(sum(own), len(own))
            row = {
                "plan": cell.name,
                "scores": cell.scores,
                "sparsity": cell.sparsity,
                "window": f"{cell.sink}+{cell.recent}",
                "n": len(own),
            }
            rows.append(row | {"unchanged": sum(own) / len(own), "low": low, "high": high, "right": "".join("01"[r] for r in own)})
        task = {"task": "reasoning, test split, seed 1", "levels": levels, "model": args.model.name}
        write_json(task | {"rows": rows, "versions": versions(), "commit": commit()}, args.output)


if __name__ == "__main__":
    main()
