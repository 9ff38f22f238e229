"""`bitsandheads eval`: a model, tasks and plans, into a run folder."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import models
from .errors import TaskError
from .eval import fidelity
from .eval.benchmarks import Options, get_task
from .eval.environment import default_text
from .eval.runner import behind_packed_prompt, evaluate, plan_cache, through_transformers
from .eval.runs import RunFolder
from .eval.tasks import Task
from .methods import get_plan
from .plan import CachePlan
from .scores import read_text


@dataclass(frozen=True)
class Settings:
    """What `run` runs. See the options of `bitsandheads eval`; numbers in lists may come as text."""

    model: str
    tasks: tuple[str, ...]
    plans: tuple[str, ...] = ("bf16", "balanced")
    samples: int | None = None
    seeds: tuple[int | str, ...] = (0,)
    sampling: str = "auto"
    chat: bool | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    contexts: tuple[int | str, ...] = (1024, 2048)
    text: Path | None = None
    device: str | None = None
    backend: str = "auto"
    packed_prompt: bool = False


def whole_numbers(what: str, values: Iterable[int | str]) -> tuple[int, ...]:
    """Whole numbers of at least 0, in their order, each once.

    Raises:
        TaskError: something else, or none.
    """
    values = list(dict.fromkeys(values))
    if not values or not all(str(v).isdecimal() for v in values):
        raise TaskError(f"{what} are {values}; give whole numbers, separated by commas.")
    return tuple(int(v) for v in values)


def sampling_of(text: str, model: Any) -> dict[str, Any] | None:
    """Generation settings: None is greedy.

    Args:
        text: "greedy"; "auto": as the model's generation_config says (thinking models sample, with their own temperature);
            or settings as "temperature=0.6,top_p=0.95".
    Raises:
        TaskError: another text.
    """
    if text == "greedy":
        return None
    if text == "auto":
        return {} if model.generation_config.do_sample else None
    out: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            out[name.strip()] = {"top_k": int}.get(name.strip(), float)(value)
        except ValueError:
            out = {}
        if name.strip() not in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty") or not out:
            raise TaskError(f'The sampling is {text!r}; give "auto", "greedy" or settings such as temperature=0.6,top_p=0.95,top_k=20.')
    return out


def check_length(task: Task, tokenizer: Any, model: Any) -> None:
    """Raise TaskError where prompts and answers together are longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(ids) for ids in tokenizer([s.prompt for s in task.samples]).input_ids), default=0)
    if limit and longest + task.max_new_tokens > limit:
        raise TaskError(
            f"Task {task.name!r}: the longest prompt has {longest} tokens and an answer may have {task.max_new_tokens}, but the model has {limit} "
            "positions. Give a smaller --max-new-tokens or shorter contexts."
        )


def _digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def _config(settings: Settings, plans: Iterable[CachePlan], text: str, sampling: Mapping[str, Any] | None, chat: bool) -> dict[str, Any]:
    """What decides the records. Plans, files and text stand in it by their contents."""
    files = {t: _digest(Path(t.partition("=")[2]).read_bytes()) for t in settings.tasks if "=" in t and Path(t.partition("=")[2]).is_file()}
    resolved = {"plans": {p.name: _digest(p.to_json()) for p in plans}, "text": _digest(text), "sampling": sampling, "chat": chat}
    return asdict(settings) | resolved | {"files": files}


LENGTHS = tuple(2**k for k in range(9, 18))  # tokens, of the memory in the facts


def facts(model: Any, plans: Iterable[CachePlan]) -> dict[str, Any]:
    """Of every plan: bytes at some lengths, and the share of windowed heads."""
    return {
        p.name: {
            "bytes": {n: p.bytes_for(model, n) for n in LENGTHS},
            "windowed": p.sparsity(model, LENGTHS[-1]).windowed,
            "note": p.note,
        }
        for p in plans
    }


def run(settings: Settings, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Run or continue; returns all records of the folder.

    Raises:
        TaskError, PlanError, ModelNotFoundError, RunFolderError: see the parts.
    """
    seeds, contexts = whole_numbers("The seeds", settings.seeds), whole_numbers("The contexts", settings.contexts)
    if not settings.tasks or not settings.plans or not all(contexts):
        raise TaskError(
            f"There are {len(settings.tasks)} tasks, {len(settings.plans)} plans and contexts of {contexts} tokens; give at least one of each."
        )
    with console.status(f"loading {settings.model}"):
        model, tokenizer = models.load(settings.model, settings.device)
    plans = [get_plan(p, model) for p in dict.fromkeys(settings.plans)]
    for plan in plans:
        plan.resolve(model)
    sampling = sampling_of(settings.sampling, model)
    if sampling is None and len(seeds) > 1:
        raise TaskError(
            f"Greedy answers are the same with every seed; give one seed instead of {len(seeds)}, or --sampling temperature=0.6."
        )
    chat = bool(tokenizer.chat_template) if settings.chat is None else settings.chat
    text = default_text() if settings.text is None else read_text(settings.text)
    options = Options(settings.samples, contexts, text, settings.max_new_tokens, chat)
    windows = settings.samples or 3
    tasks = {name: None if name == fidelity.TASK else get_task(name, tokenizer, options) for name in dict.fromkeys(settings.tasks)}
    for task in tasks.values():
        if task is not None:
            check_length(task, tokenizer, model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    config = _config(settings, plans, text, sampling, chat)
    with RunFolder(folder, config, {"plans": facts(model, plans)}) as out, Progress(*columns, console=console) as bar:
        for name, task in tasks.items():
            total = windows * len(contexts) * len(plans) if task is None else len(task.samples) * len(plans) * len(seeds)
            line = bar.add_task(name, total=total)
            tick = lambda n, line=line: bar.advance(line, n)  # noqa: E731
            if task is None:
                fidelity.evaluate(model, tokenizer, text, plans, out, contexts, windows, backend=settings.backend, tick=tick)
                continue
            caches = {p.name: plan_cache(p, backend=settings.backend) for p in plans}
            generate = behind_packed_prompt if settings.packed_prompt else through_transformers
            size = settings.batch_size
            evaluate(model, tokenizer, task, caches, out, batch_size=size, sampling=sampling, seeds=seeds, tick=tick, generate=generate)
        return out.records()
