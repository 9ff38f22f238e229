"""bitsandheads heads train | curriculum | distill."""

from pathlib import Path
from typing import Annotated

import typer

from .base import console
from .heads import heads_app

Model = Annotated[str, typer.Option(help="Local folder or hub name of a causal language model.")]
Problems = Annotated[str, typer.Option(help='File of JSON lines with "prompt" and "answer", or "reasoning:SPLIT:N:SEED".')]
Config = Annotated[Path | None, typer.Option(help="YAML or JSON file with hyper-parameters; what it does not set is the paper's.")]
Chat = Annotated[bool | None, typer.Option(help="Put prompts into the model's chat template, or not.")]


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _numbers(text: str) -> tuple[int, ...]:
    from ..errors import PlanError

    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError as error:
        raise PlanError(f"{text!r} is no list of whole numbers; give them separated by commas.") from error


@heads_app.command()
def train(
    model: Model,
    problems: Problems,
    output: Annotated[Path, typer.Option(help="Folder for head_scores.tsv, logs and checkpoints.")],
    config: Config = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say how much memory the run needs; the weights are not read.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None,
    reward: Annotated[str | None, typer.Option(help='"math", "reasoning" or "module:function".')] = None,
    chat: Chat = None,
) -> None:
    """Find the heads that reasoning needs, by reinforcement learning of a gate for each (RLKV).

    On several GPUs: accelerate launch -m bitsandheads heads train ...
    """
    from ..gates.config import TrainConfig, load_config
    from ..gates.problems import get_reward, read_problems

    chosen = load_config(TrainConfig, config, steps=steps, seed=seed, reward=reward, chat=chat)
    samples = read_problems(problems)
    if dry_run:
        from .. import models
        from ..gates.memory import estimate
        from ..gates.prompts import encode

        tokenizer = models.load_tokenizer(model)
        prompt = max(len(encode(tokenizer, s, chosen.chat)) for s in samples)
        console.print(
            f"{chosen.questions * chosen.samples} solutions in each of {chosen.steps} steps, the longest prompt has {prompt} tokens."
        )
        for line in estimate(models.load_config(model), chosen, prompt).lines():
            _say(line)
        return

    import torch

    from .. import __version__
    from ..errors import BackendError
    from ..models import load

    try:
        import accelerate

        from ..gates.training import train as run
    except ModuleNotFoundError as error:
        raise BackendError(f'Training needs {error.name}. Run `pip install "bitsandheads[train]"`.') from error

    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)
    loaded, tokenizer = load(model, str(state.device))
    header = {"data": problems, "commit": __version__, "name": model}
    scores = run(loaded, tokenizer, samples, get_reward(chosen.reward), chosen, output, resume, say=_say, **header)
    if state.is_main_process:
        _say(f"{output / 'head_scores.tsv'}: {scores.values.size} gates, mean {scores.values.mean():.3f}")


@heads_app.command()
def curriculum(
    model: Model,
    problems: Problems,
    output: Annotated[Path, typer.Option(help="File of JSON lines for the chosen problems.")],
    edges: Annotated[str, typer.Option(help="Upper ends of the bins of output length, in tokens.")] = "2048,4096,6144,8192",
    counts: Annotated[str, typer.Option(help="Problems of each bin.")] = "600,600,1000,800",
    batch: Annotated[int, typer.Option(min=1, help="Problems that are solved at once.")] = 32,
    reward: Annotated[str, typer.Option(help='"math", "reasoning" or "module:function".')] = "math",
    chat: Chat = True,
    seed: Annotated[int, typer.Option(help="Seed of the choice within a bin.")] = 0,
) -> None:
    """Choose the problems that the model itself solves greedily, spread over output lengths. Called again, it goes on where it was cut off."""
    from ..gates.curriculum import Spread, build
    from ..gates.problems import get_reward, read_problems
    from ..gates.prompts import encode, make_engine
    from ..models import load

    spread = Spread(_numbers(edges), _numbers(counts))
    samples, verify = read_problems(problems), get_reward(reward)
    loaded, tokenizer = load(model)
    found = build(
        make_engine(loaded, tokenizer, batch),
        lambda s: encode(tokenizer, s, bool(chat)),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        verify, samples, output, spread, seed,
        lambda done, solved: _say(f"{done}/{len(samples)} problems, {solved} solved"),
    )  # fmt: skip
    for edge, wanted, got in zip(spread.edges, spread.counts, found, strict=True):
        _say(f"up to {edge:6} tokens: {got} problems" + (f", {wanted} were asked for" if got < wanted else ""))


@heads_app.command()
def distill(
    model: Model,
    output: Annotated[Path, typer.Option(help="File for the head scores.")],
    text: Annotated[Path | None, typer.Option(help="Text file that passkeys are hidden in.")] = None,
    problems: Annotated[str | None, typer.Option(help="Instead of passkeys: problems with worked solutions.")] = None,
    config: Config = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the texts.")] = None,
    chat: Chat = True,
) -> None:
    """Find head scores in the manner of DuoAttention: gates that keep the hidden states, on passkeys or on worked solutions."""
    from .. import __version__
    from ..errors import PlanError
    from ..gates import distill as d
    from ..gates.config import load_config
    from ..gates.problems import read_problems
    from ..gates.prompts import encode
    from ..models import load
    from ..scores import read_text

    chosen = load_config(d.DistillConfig, config, steps=steps, seed=seed)
    if (text is None) == (problems is None):
        raise PlanError("Give either --text or --problems.")
    loaded, tokenizer = load(model)
    if text is not None:
        batches = d.passkey_batches(tokenizer(text=read_text(text))["input_ids"], chosen)
    else:
        samples = [s for s in read_problems(str(problems)) if s.solution]
        if not samples:
            raise PlanError(f"{problems} has no worked solutions; give --text, or problems with a solution.")
        pairs = [(encode(tokenizer, s, bool(chat)), tokenizer(text=s.solution, add_special_tokens=False)["input_ids"]) for s in samples]
        batches = d.solution_batches(pairs, chosen)

    def progress(step: int, error: float, mean: float) -> None:
        if step % max(chosen.steps // 20, 1) == 0:
            _say(f"step {step}/{chosen.steps}  relative error {error:.4f}  mean gate {mean:.3f}")

    d.distill(loaded, batches, chosen, progress, data=str(text or problems), commit=__version__, name=model).save(output)
