"""bitsandheads generate."""

from pathlib import Path
from typing import Annotated

import typer

from .base import app, console


@app.command()
def generate(
    model: Annotated[str, typer.Option(help='Local folder or hub name of a text or vision-language model, or "smollm2".')],
    prompt: Annotated[list[str], typer.Option(help="The question; given again: further turns.")],
    video: Annotated[list[Path] | None, typer.Option(help="Video file; may be given again.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given again.")] = None,
    plan: Annotated[str, typer.Option(help="Preset or plan file.")] = "balanced",
    frames: Annotated[int, typer.Option(min=1, help="Frames of each video, spread evenly over it.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 128,
    packed_question: Annotated[
        bool, typer.Option(help="Pack the clip before the question is read, so that it is seen packed only.")
    ] = False,
    reader: Annotated[str, typer.Option(help='"auto", "torchcodec" or "pyav".')] = "auto",
    backend: Annotated[str, typer.Option(help='"auto", "reference", "triton" or "cuda".')] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write answers and figures to this file.")] = None,
) -> None:
    """Answer questions about videos, images or text through a compressed cache, and report what it took."""
    import dataclasses

    from .. import video as v
    from ..demo import versions, write_json
    from ..methods import get_plan

    chosen = get_plan(plan)
    clips = [v.read_video(path, frames, reader) for path in video or ()]
    with console.status(f"loading {model}"):
        loaded, processor = v.load(model, device)
    session = v.Session(loaded, processor, chosen, backend)
    answers = []
    for turn, question in enumerate(prompt):
        with console.status("reading and answering"):
            videos, images = (clips, image or ()) if not turn else ((), ())
            answer = session.ask(question, videos, images, max_new_tokens=max_new_tokens, packed_question=packed_question)
        answers.append(answer)
        if len(prompt) > 1:
            console.print(question, highlight=False, style="dim")
        console.print(answer.text, highlight=False)
    for note in answers[0].notes:
        console.print(f"Not read by torchcodec: {note}", highlight=False, soft_wrap=True, style="dim")
    console.print(report(answers), highlight=False, soft_wrap=True, style="dim")
    if json is not None:
        write_json({"model": model, "plan": chosen.name, "answers": [dataclasses.asdict(a) for a in answers], "versions": versions()}, json)


def report(answers: list) -> str:
    """What the turns took, in a few lines."""
    first, last = answers[0], answers[-1]
    speeds = [a.tokens_per_second for a in answers if a.tokens_per_second]
    speed = f"{sum(speeds) / len(speeds):.1f} tokens/s" if speeds else "one token"
    return (
        f"{first.plan}: {first.frames} frames, {first.images} images, {first.visual_tokens} visual tokens of {first.prompt_tokens} in the prompt\n"
        f"cache: {last.cache_tokens} tokens in {last.cache_bytes / 1e6:.2f} MB, {last.bits_per_element:.2f} bits per element "
        f"(bf16: {last.full_bytes / 1e6:.2f} MB)\n"
        f"first token after {first.first_token_seconds:.2f} s, then {speed}"
    )
