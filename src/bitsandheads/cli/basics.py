"""bitsandheads demo | presets | plan | doctor."""

from pathlib import Path
from typing import Annotated

import typer

from .base import app, console


@app.command()
def demo(
    model: Annotated[str, typer.Option(help='Local folder or hub name of a causal language model, or "smollm2".')] = "smollm2",
    text: Annotated[Path | None, typer.Option(help="Text file; default: chapters of Pride and Prejudice.")] = None,
    plans: Annotated[str, typer.Option(help="Presets or plan files, separated by commas.")] = "",
    context: Annotated[int, typer.Option(min=1, help="Tokens of context.")] = 2048,
    tokens: Annotated[int, typer.Option(min=1, help="Teacher-forced tokens after the context.")] = 256,
    video: Annotated[bool, typer.Option(help="Also ask the tiny video model about clips.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where the converted model is kept; default: ~/.cache/bitsandheads.")] = None,
) -> None:
    """True bits, bytes, KL, top-1 and a continuation for each preset, on a real model and text; then questions about packed clips."""
    from .. import demo as d
    from .. import demo_video

    names = d.plans_from(plans) or d.PLANS
    data = d.run(d.Options(model, text, names, context, tokens, cache_dir), console)
    data["video"] = demo_video.run(console) if video else None
    if json is not None:
        d.write_json(data, json)


@app.command()
def presets() -> None:
    """All presets in a line each."""
    from rich.text import Text

    from ..methods import get_plan, preset_names
    from ..plan import describe

    for name in preset_names():
        plan = get_plan(name)
        console.print(Text.assemble((f"{name:16}", "bold"), f" {describe(plan.groups[0])}  ", (plan.note, "dim")), soft_wrap=True)


@app.command()
def plan(
    name: Annotated[
        str | None, typer.Argument(metavar="PLAN", help='Preset, plan file, or "rlkv:SCORES@SPARSITY", "balanced+rlkv:SCORES@SPARSITY".')
    ] = None,
    plan: Annotated[str | None, typer.Option(help="The same as PLAN; with --gpu-memory neither means all presets.")] = None,
    model: Annotated[str, typer.Option(help="Local folder or hub name; only its configuration is read.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Context length.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GB (1e9 bytes) of a GPU: say how much fits in place.")] = None,
    frame_size: Annotated[str, typer.Option(help="Height x width of a video's frames, for --gpu-memory.")] = "448x448",
    tokens_per_frame: Annotated[float | None, typer.Option(min=0.1, help="In place of what the configuration says.")] = None,
) -> None:
    """What a plan does to a model, from the configuration alone: head groups, bytes and bits; with --gpu-memory what fits."""
    from ..errors import PlanError
    from ..methods import get_plan, preset_names
    from ..models import load_config

    chosen = name or plan
    if not model or not (chosen or gpu_memory):
        raise PlanError("Give --model, and a plan or --gpu-memory: `bitsandheads plan balanced --model FOLDER`.")
    config = load_config(model)
    if gpu_memory is not None:
        from .. import capacity

        each = tokens_per_frame
        if each is None and hasattr(config, "vision_config"):
            each = capacity.tokens_per_frame(config, *capacity.frame_size(frame_size))
        found = capacity.compare(config, [get_plan(p, config) for p in ([chosen] if chosen else preset_names())], gpu_memory * 1e9, each)
        console.print(capacity.table(found, config, gpu_memory * 1e9, each), highlight=False, soft_wrap=True)
        return
    resolved = get_plan(chosen or "", config).resolve(config)
    console.print(resolved.table(tokens), highlight=False, soft_wrap=True)
    console.print(
        f"{batch} x {tokens} tokens: {resolved.bytes_for(tokens, batch) / 1e9:.3f} GB; {resolved.sparsity(tokens)}", highlight=False
    )


@app.command()
def doctor() -> None:
    """Versions, devices, and which backend runs where and why."""
    import torch

    from .. import ops
    from ..demo import versions

    for name, value in versions().items():
        console.print(f"{name:13} {value}", highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for line in ops.explain_backends(device):
        console.print(line, highlight=False, soft_wrap=True)
