"""bitsandheads heads score | show | compare. The group; cli/gates.py adds train, curriculum and distill."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .base import app, console

heads_app = typer.Typer(help="Fewer heads: find, look at and compare head scores.", no_args_is_help=True)
app.add_typer(heads_app, name="heads")

SPARSITIES = (0.2, 0.4, 0.5, 0.6, 0.8)
File = Annotated[str, typer.Argument(help="Head scores: a file, a folder or a hub repository.")]
Share = Annotated[float, typer.Option(min=0, max=1, help="Share of the heads that are windowed.")]


class Method(StrEnum):
    """How cheap scores are found."""

    mass = "mass"
    ablation = "ablation"
    random = "random"


@heads_app.command()
def show(
    file: File,
    sparsity: Share = 0.5,
    png: Annotated[Path | None, typer.Option(help="Write the map to this picture too (.png, .svg or .pdf).")] = None,
) -> None:
    """Draw the map of the heads: layers by KV heads, the kept ones marked."""
    from ..headfinding import drawing
    from ..scores import HeadScores

    scores = HeadScores.from_pretrained(file)
    for name in ("model", "method", "sink", "recent", "data", "seed", "commit"):
        value = getattr(scores, name)
        if value not in ("", None):
            console.print(f"{name:7} {value}", highlight=False)
    console.print(drawing.terminal_map(scores, sparsity))
    if png is not None:
        drawing.save_picture(scores, sparsity, png)
        console.print(f"wrote {png}", highlight=False)


@heads_app.command()
def compare(a: File, b: File) -> None:
    """Rank correlation of two files of head scores, and the overlap of the heads that they keep at each sparsity."""
    from rich.table import Table

    from ..scores import HeadScores, overlap, rank_correlation

    first, second = HeadScores.from_pretrained(a), HeadScores.from_pretrained(b)
    console.print(f"Spearman's rank correlation: {rank_correlation(first, second):.3f}", highlight=False)
    table = Table("sparsity", "kept heads", "kept by both", "overlap", "by chance")
    for s in SPARSITIES:
        kept, share = int(first.top(1 - s).sum()), overlap(first, second, s)
        table.add_row(f"{s:g}", str(kept), str(round(share * kept)), f"{share:.1%}", f"{kept / first.values.size:.1%}")
    console.print(table)


@heads_app.command()
def score(
    method: Annotated[Method, typer.Option(help="mass: attention beyond the window; ablation: output error of each windowed head.")],
    model: Annotated[str, typer.Option(help='Local folder or hub name of a causal language model, or "smollm2".')],
    output: Annotated[Path, typer.Option(help="File for the head scores.")],
    problems: Annotated[
        str | None,
        typer.Option(help='JSON lines with "prompt" and "answer", or "reasoning:SPLIT:N:SEED"; the model answers them greedily.'),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Instead of problems: a text file.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Use the first so many problems, or so many pieces of the text.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to a problem.")] = 1024,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece of the text.")] = 2048,
    prompt: Annotated[int, typer.Option(min=1, help="Of these the tokens that count as its prompt.")] = 256,
    sink: Annotated[int, typer.Option(min=0, help="First tokens that a windowed head keeps.")] = 32,
    recent: Annotated[int, typer.Option(min=1, help="Newest tokens that it keeps.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    chat: Annotated[bool | None, typer.Option(help="Put problems into the model's chat template; default: if it has one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random scores.")] = 0,
) -> None:
    """Find head scores without training, in minutes."""
    from .. import headfinding as h
    from ..errors import PlanError
    from ..eval.runs import commit
    from ..models import load, load_config
    from ..plan import Window
    from ..scores import read_text
    from ..seam import layer_shapes

    if method is Method.random:
        h.random_scores(load_config(model), seed, name=model, commit=commit() or "").save(output)
        console.print(f"wrote {output}", highlight=False)
        return
    if (problems is None) == (text is None):
        raise PlanError("Give either --problems or --text.")
    loaded, tokenizer = load(model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        if text is not None:
            ids = tokenizer(text=read_text(text))["input_ids"]
            sequences = h.text_sequences(ids, length, prompt, count)
        else:
            prompts, ends = h.read_prompts(loaded, tokenizer, str(problems), count, chat)
            task = bar.add_task("greedy answers", total=len(prompts))
            sequences = h.solve(loaded, prompts, new_tokens, ends, batch, lambda n: bar.advance(task, n))
        find = h.mass_scores if method is Method.mass else h.ablation_scores
        steps = len(sequences) * (1 if method is Method.mass else sum(s.compressed for s in layer_shapes(loaded)))
        finding = bar.add_task(method.value, total=steps)
        scores = find(
            loaded, sequences, Window(sink, recent), batch, lambda n: bar.advance(finding, n),
            name=model, data=str(text or problems), commit=commit() or "", extra={"sequences": len(sequences)},
        )  # fmt: skip
    scores.save(output)
    console.print(f"wrote {output}", highlight=False)
