"""Let a model answer the samples of a task through a cache, one record for each sample.

Batches are fixed by the task and the batch size alone, never by what is already done: a run that was killed and goes on computes
the same batches with the same seeds, so it ends with the records of an uninterrupted one.
"""

import copy
import dataclasses
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TaskError
from ..methods import get_plan
from ..plan import CachePlan
from ..seam import CompressedCache, enabled, layer_shapes
from ..tasks import Sample
from .runs import RunFolder
from .tasks import Task

NGRAM = 16  # tokens of the n-grams that `repetition` counts
FULL_ITEMSIZE = 2  # bytes of an element in full precision (bfloat16)

CacheFactory = Callable[[Any, int], Any]  # (model, batch) -> an empty cache of transformers
Generate = Callable[[Any, Mapping[str, Tensor], Any, Any], Tensor]  # (model, inputs, cache, GenerationConfig) -> prompts and answers [B, n]


@dataclass(frozen=True)
class Record:
    """What one sample gave.

    Attributes:
        output_tokens: generated tokens, the end-of-sequence token included.
        repetition: see `repetition`.
        truncated: max_new_tokens came before an end-of-sequence token.
        seconds: of the batch, divided by its sequences.
        peak_bytes: during the batch; on a GPU what the allocator held, weights included; on a CPU the resident memory of the
            process, its highest so far.
        cache_bytes: of the cache for this sample's own tokens (prompt and output; neither padding nor what follows the end).
        full_bytes: the same tokens at 2 bytes an element.
        bits_per_element: 16 * cache_bytes / full_bytes.
        held_bytes: counted from the tensors of the batch's cache at its end, divided by its sequences. All sequences then have the
            longest output's length, and a cache of transformers holds the padding too. None: the cache does not tell.
    """

    task: str
    plan: str
    seed: int
    id: str
    kind: str
    level: int
    prompt: str
    output: str
    score: float
    prompt_tokens: int
    output_tokens: int
    repetition: float
    truncated: bool
    seconds: float
    peak_bytes: int
    cache_bytes: int
    full_bytes: int
    bits_per_element: float
    held_bytes: int | None


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams that occurred before in the same output: rep-n of arXiv 1908.04319. 0 for fewer than n + 1 tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def plan_cache(plan: str | CachePlan, backend: str = "auto", dtype: torch.dtype | None = None) -> CacheFactory:
    """Makes caches of a plan.

    Args:
        plan: where it names head scores, `get_plan(plan, model)` says whether they belong to the model.
        dtype: of tokens that the plan keeps whole; None: the model's, or bfloat16 where that has more than two bytes, so that full
            precision is 16 bits.
    """
    resolved = get_plan(plan)

    def make(model: Any, batch: int) -> CompressedCache:
        own = dtype or (model.dtype if model.dtype.itemsize <= FULL_ITEMSIZE else torch.bfloat16)
        return CompressedCache(resolved, model, backend=backend, dtype=own)

    return make


# -- bytes --------------------------------------------------------------------------------------------------------------------


def _element_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all full-attention layers."""
    return sum(2 * s.kv_heads * s.head_dim * itemsize for s in layer_shapes(config) if s.compressed)


def own_bytes(cache: Any, config: Any, tokens: int, generated: int, batch: int) -> int:
    """Bytes that a cache needs for one unpadded sequence of `tokens` tokens, of which so many were generated.

    Only full-attention layers count.

    A CompressedCache is asked by its plan (a test holds that equal to the bytes counted). Another cache may have
    `bytes_for(tokens, generated)`; else an equal share of its `memory_bytes()`; a cache of transformers needs whole tokens of its dtype.
    """
    if isinstance(cache, CompressedCache):
        dtype = cache.dtype or config.dtype or torch.float32
        return cache.resolved.bytes_for(tokens, 1, dtype.itemsize, generated)
    if hasattr(cache, "bytes_for"):
        return int(cache.bytes_for(tokens, generated))
    if hasattr(cache, "memory_bytes"):
        return int(cache.memory_bytes()) // batch
    return tokens * _element_bytes(config, cache.layers[0].keys.element_size())


def held_bytes(cache: Any) -> int | None:
    """Bytes counted from the tensors of a cache; None if it has no tensors to count."""
    if hasattr(cache, "memory_bytes"):
        return int(cache.memory_bytes())
    tensors = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor)) or None


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- prompts ------------------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Any, task: Task) -> list[list[int]]:
    """The token ids of every prompt.

    Raises:
        TaskError: the task wants a chat template and the tokenizer has none.
    """
    prompts = [s.prompt for s in task.samples]
    if not task.chat:
        return tokenizer(prompts).input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(f"Task {task.name!r} asks through a chat template and this model's tokenizer has none. Use chat=False.")
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False) for p in prompts]
    return tokenizer(texts, add_special_tokens=False).input_ids


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask int64 [B, longest]."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def batches(task: Task, rows: Sequence[Sequence[int]] | None, batch_size: int) -> list[list[int]]:
    """Indices of the samples of every batch, the longest prompts first; in the task's order where it encodes itself."""
    order = list(range(len(task.samples)))
    if rows is not None:
        order.sort(key=lambda i: -len(rows[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# -- generation ---------------------------------------------------------------------------------------------------------------


def through_transformers(model: Any, inputs: Mapping[str, Tensor], cache: Any, config: Any) -> Tensor:
    """Answers by the model's own `generate` with this cache. As in use, the first token comes from the prompt in full precision.

    Args:
        inputs: input_ids and attention_mask int64 [B, N], left-padded, and what else the model takes.
        cache: an empty cache of transformers or of ours.
        config: a GenerationConfig.
    Returns:
        int64 [B, N + new tokens]: prompts and answers.
    """
    with enabled(model):
        return model.generate(**inputs, past_key_values=cache, generation_config=config)


@torch.no_grad()
def behind_packed_prompt(model: Any, inputs: Mapping[str, Tensor], cache: Any, config: Any) -> Tensor:
    """The same after the prompt but its last token was read and packed, so that the first token, too, comes from the packed cache.

    Arguments and result as in `through_transformers`.

    Raises:
        TaskError: prompts of more than text.
    """
    more = sorted(inputs.keys() - {"input_ids", "attention_mask"})
    if more:
        raise TaskError(f"Only prompts of text alone can be packed before the answer begins; these bring {', '.join(more)}.")
    ids, mask = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]
    with enabled(model):
        if ids.shape[1]:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return model.generate(**inputs, past_key_values=cache, generation_config=config)


def generation_config(model: Any, tokenizer: Any, max_new_tokens: int, sampling: Mapping[str, Any] | None) -> Any:
    """The model's own, greedy or with these sampling settings, with a padding token.

    sampling: None: greedy. Else settings of transformers' GenerationConfig such as temperature; {} samples as the model's own
        generation_config says.
    """
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length, config.return_dict_in_generate = max_new_tokens, None, False
    config.do_sample = sampling is not None
    if sampling is None:
        config.temperature = config.top_p = config.top_k = config.min_p = None
    for name, value in (sampling or {}).items():
        setattr(config, name, value)
    if config.pad_token_id is None:
        ends = _ends(config)
        pad = getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None)
        config.pad_token_id = pad if pad is not None else ends[0] if ends else 0
    return config


def _ends(config: Any) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _output_lengths(new: Tensor, ends: list[int]) -> tuple[list[int], list[bool]]:
    """Tokens up to and with the first end token, and whether there was none. new: [B, n] on the CPU."""
    is_end = torch.isin(new, torch.tensor(ends, dtype=new.dtype)) if ends else torch.zeros_like(new, dtype=torch.bool)
    found = is_end.any(1)
    lengths = torch.where(found, is_end.int().argmax(1) + 1, new.shape[1])
    return lengths.tolist(), (~found).tolist()


def generate_records(
    model: Any,
    tokenizer: Any,
    task: Task,
    cache_factory: CacheFactory,
    *,
    plan: str,
    batch_size: int = 16,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    done: Collection[str] = (),
    generate: Generate = through_transformers,
) -> Iterator[list[Record]]:
    """Answer the samples of a task, batch by batch, the longest prompts first.

    Args:
        model: a model of transformers in evaluation mode.
        tokenizer: its tokenizer, or the processor that `task.encode` wants.
        cache_factory: (model, batch) -> an empty cache. See `plan_cache`.
        plan: what the records call the cache.
        sampling: see `generation_config`.
        seed: of the samples drawn; each batch has a random stream of its own.
        generate: how answers are made: `through_transformers`, `behind_packed_prompt`, or another way.
        done: ids that need no record. A batch all of whose ids are done is not run; of another one only the missing records come.
    Yields:
        The new records of a batch.
    Raises:
        TaskError: ids that are not unique, or a chat template that is missing.
    """
    if len({s.id for s in task.samples}) != len(task.samples):
        raise TaskError(f"Task {task.name!r} has samples with the same id. Give every sample an id of its own.")
    rows = None if task.encode else prompt_ids(tokenizer, task)
    config = generation_config(model, tokenizer, task.max_new_tokens, sampling)
    done = set(done)
    for number, members in enumerate(batches(task, rows, batch_size)):
        samples = [task.samples[i] for i in members]
        if all(s.id in done for s in samples):
            continue
        inputs = left_padded([rows[i] for i in members], config.pad_token_id) if rows else task.encode(tokenizer, samples)  # type: ignore[misc]
        records = _run_batch(model, tokenizer, task, samples, inputs, cache_factory, config, plan, seed, number, generate)
        yield [r for r in records if r.id not in done]


@torch.no_grad()
def _run_batch(
    model: Any,
    tokenizer: Any,
    task: Task,
    samples: Sequence[Sample],
    inputs: Mapping[str, Tensor],
    cache_factory: CacheFactory,
    config: Any,
    plan: str,
    seed: int,
    number: int,
    generate: Generate,
) -> list[Record]:
    device, batch = model.device, len(samples)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    cache = cache_factory(model, batch)
    with torch.random.fork_rng([device] if cuda else []):
        torch.manual_seed(seed * 1_000_003 + number)
        out = generate(model, {k: v.to(device) for k, v in inputs.items()}, cache, config)
    new = out[:, inputs["input_ids"].shape[1] :].cpu()
    seconds = time.perf_counter() - started
    peak, held = _peak_bytes(device), held_bytes(cache)
    lengths, truncated = _output_lengths(new, _ends(config))
    tokens = [row[:n] for row, n in zip(new.tolist(), lengths, strict=True)]
    outputs = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    prompts = inputs["attention_mask"].sum(1).tolist()
    token_bytes = _element_bytes(model.config, FULL_ITEMSIZE)
    records = []
    for i, sample in enumerate(samples):
        in_cache = prompts[i] + lengths[i] - 1  # the last token is never fed back
        own = own_bytes(cache, model.config, in_cache, lengths[i] - 1, batch)
        full = token_bytes * in_cache
        records.append(
            Record(
                task=task.name,
                plan=plan,
                seed=seed,
                id=sample.id,
                kind=sample.kind,
                level=sample.level,
                prompt=sample.prompt,
                output=outputs[i],
                score=float(task.score(sample, outputs[i])),
                prompt_tokens=prompts[i],
                output_tokens=lengths[i],
                repetition=repetition(tokens[i]),
                truncated=truncated[i],
                seconds=seconds / batch,
                peak_bytes=peak,
                cache_bytes=own,
                full_bytes=full,
                bits_per_element=8 * FULL_ITEMSIZE * own / full if full else float("nan"),
                held_bytes=None if held is None else held // batch,
            )
        )
    return records


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    caches: Mapping[str, CacheFactory],
    folder: RunFolder,
    *,
    batch_size: int = 16,
    sampling: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    tick: Callable[[int], None] = lambda n: None,
    generate: Generate = through_transformers,
) -> None:
    """Run a task with every cache and seed into a folder; what the folder already holds is not run again.

    Args:
        caches: name of the plan -> its cache factory.
        tick: called with the number of records that are new, and at first with those already there.
        generate: see `generate_records`.
    """
    for plan, factory in caches.items():
        for seed in seeds:
            done = folder.done(task.name, plan, seed)
            tick(len(done))
            for records in generate_records(
                model,
                tokenizer,
                task,
                factory,
                plan=plan,
                batch_size=batch_size,
                sampling=sampling,
                seed=seed,
                done=done,
                generate=generate,
            ):
                folder.append([dataclasses.asdict(r) for r in records])
                tick(len(records))
