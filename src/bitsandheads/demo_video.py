"""The part of `bitsandheads demo` about video: questions about generated clips, asked through the packed cache of the tiny video model."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .eval.clips import ask_packed, clip_task, video_tokens
from .eval.runner import generate_records, plan_cache
from .eval.summary import row_of
from .methods import get_plan
from .tasks import video

MODEL = Path(__file__).parents[2] / "models" / "tiny-video"  # in a clone; the weights are no part of the package
PLANS = ("bf16", "vidkv-1.5/1.58", "balanced", "extreme")
QUESTIONS, FRAMES, LONG = 24, 32, 32768
SHOWN = 6  # frames of the picture, and questions


def run(console: Console, folder: Path = MODEL) -> dict[str, Any] | None:
    """Ask, print and return the data; None, with a line that says so, where the model is not there."""
    import transformers

    if not folder.is_dir():
        console.print(f"No video part: {folder} is not there. The tiny video model is in the repository; run this in a clone.", style="dim")
        return None
    started = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    samples = list(video.samples(QUESTIONS, "test", FRAMES))
    task = clip_task(model.config, samples, device)
    records: dict[str, list[dict[str, Any]]] = {}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar:
        line = bar.add_task("questions about clips", total=QUESTIONS * len(PLANS))
        for plan in PLANS:
            found = generate_records(model, tokenizer, task, plan_cache(plan), plan=plan, batch_size=8, generate=ask_packed)
            for part in found:
                records.setdefault(plan, []).extend(dataclasses.asdict(r) for r in part)
                bar.advance(line, len(part))
    rows = [{"plan": p} | row_of(r) | {"bits_per_element_at_32k": get_plan(p).bits_for(model.config, LONG)} for p, r in records.items()]
    data = {"model": folder.name, "frames": FRAMES, "visual_tokens": video_tokens(model.config, FRAMES), "rows": rows}
    data |= {"answers": {p: [r["output"] for r in own] for p, own in records.items()}, "seconds": time.perf_counter() - started}
    print_table(data, samples, console)
    return data


def picture(frames: Tensor) -> Text:
    """Frames uint8 [T, 3, SIZE, SIZE] beside each other, one character for two cells."""
    cells = frames[:, :, video.CELL // 2 :: video.CELL, video.CELL // 2 :: video.CELL].permute(0, 2, 3, 1).tolist()
    out = Text()
    for y in range(0, video.GRID, 2):
        for frame in cells:
            for top, bottom in zip(frame[y], frame[y + 1], strict=True):
                out.append("▀", style=f"rgb({','.join(map(str, top))}) on rgb({','.join(map(str, bottom))})")
            out.append("  ")
        out.append("\n")
    return out


def print_table(data: dict[str, Any], samples: list[video.VideoSample], console: Console) -> None:
    """Print some frames and questions of the first clip, and the table."""
    console.print(
        Text.assemble(
            (data["model"], "bold"),
            f": a clip of {FRAMES} frames, {data['visual_tokens']} visual tokens, packed before the question is read",
        )
    )
    if console.color_system is not None:
        console.print(picture(video.frames_of(samples[:1])[0][:: FRAMES // SHOWN][:SHOWN]))
    for i, s in enumerate(samples[:SHOWN]):
        said = ", ".join(f"{plan} {answers[i]}" for plan, answers in data["answers"].items())
        console.print(Text.assemble(f"{s.prompt} ", (s.answer, "bold"), "  ", (said, "dim")))
    table = Table(title=f"{QUESTIONS} questions about {len({s.clip for s in samples})} clips", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("plan", "bits", "at 32k", "MB each", "right", "95%"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    for r in data["rows"]:
        right, bits = round(r["accuracy"] * r["n"]), f"{r['bits_per_element']:.2f}"
        interval, size = f"{100 * r['low']:.0f}-{100 * r['high']:.0f}%", f"{r['mean_cache_bytes'] / 1e6:.2f}"
        table.add_row(r["plan"], bits, f"{r['bits_per_element_at_32k']:.2f}", size, f"{right} of {r['n']}", interval)
    console.print(table)
    console.print(f"{data['seconds']:.0f} s. All plans on 2,048 questions: docs/video.md.", style="dim")
