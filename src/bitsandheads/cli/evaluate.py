"""bitsandheads eval."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .base import app, console


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help='Local folder or hub name of a causal language model, or "smollm2".')],
    tasks: Annotated[
        str, typer.Option(help="fidelity, needle, gsm8k, math-500, aime24, aime25, mbpp, longreason-8k..., reasoning; NAME=FILE.")
    ],
    output: Annotated[Path, typer.Option(help="Run folder; a run that was stopped goes on where it was.")],
    plans: Annotated[str, typer.Option(help="Presets, plan files or plans from head scores, separated by commas.")] = "bf16,balanced",
    samples: Annotated[
        int | None, typer.Option(min=1, help="At most so many of each task (needles: of each cell; fidelity: windows).")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of sampled answers, separated by commas.")] = "0",
    sampling: Annotated[
        str, typer.Option(help='"auto" (what the model\'s generation_config says), "greedy", or temperature=0.6,top_p=0.95')
    ] = "auto",
    chat: Annotated[bool | None, typer.Option(help="Ask through the chat template. Default: if the tokenizer has one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the task's own.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens of context of fidelity and needle.")] = "1024,2048",
    text: Annotated[Path | None, typer.Option(help="Long text of fidelity and needle. Default: chapters of Pride and Prejudice.")] = None,
    device: Annotated[str | None, typer.Option(help='Default: "cuda" if there is one, else "cpu".')] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, triton or cuda.")] = "auto",
    packed_prompt: Annotated[bool, typer.Option(help="Pack the prompt before the answer's first token is chosen.")] = False,
) -> None:
    """Let a model do tasks with each plan: one record for each sample, and a table with paired differences to bf16."""
    from ..evaluation import Settings, run

    settings = Settings(
        model=model,
        tasks=tuple(_list(tasks)),
        plans=tuple(_list(plans)),
        samples=samples,
        seeds=tuple(_list(seeds)),
        sampling=sampling,
        chat=chat,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        contexts=tuple(_list(contexts)),
        text=text,
        device=device,
        backend=backend,
        packed_prompt=packed_prompt,
    )
    try:
        records = run(settings, output, console)
    except KeyboardInterrupt:
        console.print(f"Stopped. {output} holds what was done; the same command goes on from there.")
        raise SystemExit(130) from None
    print_tables(records)


def _span(low: float, high: float, form: str = ".3f") -> str:
    return f"{low:{form}} to {high:{form}}"


def print_tables(records: list[dict[str, Any]]) -> None:
    """A table of fidelity, and one of answers, of what records there are."""
    from ..eval import fidelity
    from ..eval.summary import BASE, summarise

    texts = [r for r in records if r["task"] == fidelity.TASK]
    answers = [r for r in records if r["task"] != fidelity.TASK]
    if texts:
        table = _table("Fidelity on long text", "plan", "context", "bits", "KL", "95%", "top-1", "perplexity")
        for r in fidelity.summarise(texts):
            figures = (
                f"{r['bits_per_element']:.2f}",
                f"{r['kl']:.4f}",
                _span(r["kl_low"], r["kl_high"]),
                f"{r['top1']:.3f}",
                f"{r['perplexity']:.2f}",
            )
            table.add_row(r["plan"], str(r["context"]), *figures)
        console.print(table)
    if answers:
        table = _table("Answers", "task", "plan", "bits", "n", "accuracy", "95%", f"less {BASE}", "95%", "tokens", "repeated", "cut off")
        for r in summarise(answers):
            against = ("", "")
            if r["verdict"]:
                against = (f"{r['difference']:+.3f}, {r['verdict']}", _span(r["difference_low"], r["difference_high"], "+.3f"))
            cells = (f"{r['bits_per_element']:.2f}", str(r["n"]), f"{r['accuracy']:.3f}", _span(r["low"], r["high"]), *against)
            habits = (f"{r['mean_output_tokens']:.0f}", f"{r['repetition']:.2f}", f"{r['truncated']:.2f}")
            table.add_row(r["task"], r["plan"], *cells, *habits)
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("task", "plan") else "right")
    return table
