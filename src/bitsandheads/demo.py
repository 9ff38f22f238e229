"""`bitsandheads demo`: what each preset costs and keeps, on a real model and a real text, in one table."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import models
from .eval import fidelity
from .eval.environment import TEXT, default_text, versions, write_json
from .methods import get_plan
from .plan import CachePlan
from .scores import read_text
from .seam import CompressedCache, enabled

__all__ = ["Options", "default_text", "plans_from", "run", "versions", "write_json"]

PLANS = ("bf16", "kivi-2", "kivi-2-sink", "vidkv-1.5/1.58", "vidkv-1.5/1.66", "balanced", "extreme")
CONTINUATION = 20  # greedy tokens for the eye


@dataclass(frozen=True)
class Options:
    """What the demo runs."""

    model: str = models.SMOLLM2
    text: Path | None = None
    plans: tuple[str, ...] = PLANS
    context: int = 2048
    tokens: int = 256
    cache_dir: Path | None = None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the demo, print the table, and return its data."""
    started = time.perf_counter()
    plans = [get_plan(name) for name in options.plans]
    with console.status(f"loading {options.model}"):
        model, tokenizer = models.load(options.model, cache=options.cache_dir)
    text = default_text() if options.text is None else read_text(options.text)
    ids = fidelity.token_ids(tokenizer, text, options.context, options.tokens)
    each = options.context + options.tokens
    rows, continuations = [], []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("full precision", total=each * (len(plans) + 1) + CONTINUATION * len(plans))
        tick = lambda n: bar.advance(task, n)  # noqa: E731
        against = fidelity.reference(model, ids, options.context, options.tokens, tick)
        for plan in plans:
            bar.update(task, description=plan.name)
            row, cache = fidelity.measure(model, plan, against, tick)
            rows.append(row)
            continuations.append((plan.name, tokenizer.decode(continue_greedily(model, cache, ids, CONTINUATION))))
            tick(CONTINUATION)
    full_ppl = float(against.log_probs.gather(-1, against.targets[:, None].to(against.log_probs.device)).mean().neg().exp())
    data = {
        "model": options.model,
        "text": TEXT if options.text is None else options.text.name,
        "context": options.context,
        "tokens": options.tokens,
        "full_precision_perplexity": full_ppl,
        "rows": rows,
        "continuations": dict(continuations),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    print_table(data, console)
    return data


@torch.no_grad()
def continue_greedily(model: Any, cache: CompressedCache, ids: torch.Tensor, tokens: int) -> list[int]:
    """Greedy tokens after everything that the cache holds; the cache grows. ids: int64 [1, N], of which the last is not in the cache yet."""
    out: list[int] = []
    last = ids[:, -1:].to(model.device)
    with enabled(model):
        for _ in range(tokens):
            last = model(last, past_key_values=cache).logits[:, -1:].argmax(-1)
            out.append(int(last))
    return out


def print_table(data: dict[str, Any], console: Console) -> None:
    """Print rows and continuations."""
    table = Table(
        title=f"{data['model']}: {data['context']} tokens of context, then {data['tokens']} teacher-forced tokens of {data['text']}",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("plan", "bits*", "+basis", "all", "at 32k", "MB", "x bf16", "KL", "95%", "top-1", "ppl"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    for r in data["rows"]:
        table.add_row(
            r["plan"],
            *("-" if math.isnan(r[bits]) else f"{r[bits]:.2f}" for bits in ("bits_per_element_without_residual", "basis_bits_per_element")),
            f"{r['bits_per_element']:.2f}",
            f"{r['bits_per_element_at_32k']:.2f}",
            f"{r['cache_bytes'] / 1e6:.1f}",
            f"{r['ratio_to_bf16']:.1f}",
            f"{r['kl']:.4f}",
            f"{r['kl_low']:.3f}-{r['kl_high']:.3f}",
            f"{r['top1']:.3f}",
            f"{r['perplexity']:.2f}",
        )
    console.print(table)
    console.print(
        "bits*: bytes of codes, metadata and whole (sink) tokens over the tokens outside the residual; basis: what rotations add to that "
        "at this length; all: everything that the cache holds, the newest 128-255 whole tokens included; at 32k: everything at 32,768 "
        f"tokens. Full precision: perplexity {data['full_precision_perplexity']:.2f}.",
        style="dim",
    )
    for name, text in data["continuations"].items():
        console.print(Text.assemble((name, "bold"), f" ... {' '.join(text.split())}"))
    console.print(f"{data['seconds']:.0f} s; {', '.join(f'{k} {v}' for k, v in data['versions'].items())}", style="dim")


def plans_from(text: str) -> tuple[str, ...]:
    """ "a,b" -> names, each checked."""
    names = tuple(n.strip() for n in text.split(",") if n.strip())
    for name in names:
        plan: CachePlan = get_plan(name)
        del plan
    return names
