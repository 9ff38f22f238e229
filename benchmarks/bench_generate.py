"""Decode steps of whole models through `generate`: tokens per second and tokens per gigabyte, on one GPU.

Random bf16 weights at real shapes. A row is one model, plan, batch and context: a prompt of `context` random tokens, then `generate`.
`ms_per_step` is the median over the steps after those that compile and capture, from one pass of `generate`'s loop to the next. Plans that start
with `hf-` are transformers' own caches.

A prompt is read once for all rows of a model and context, as one sequence: its first chunk is attended to in full precision under every plan,
so every plan is given the same queries, keys and values. Each cache takes them layer by layer and is then repeated over the batch, which gives the
bytes that the prompt of one sequence gives (tests/test_generate_benchmark.py). `prefill_s` is the reading plus `packing_s`, what the cache did with it,
both for one sequence (`prefilled_sequences`). `cache_bytes` are the bytes of the cache's tensors; `peak_bytes` is the allocator's peak in the
decode steps, model and cache included. Rows marked `largest` have the largest batch that fits: from the plan's bytes, then less until the allocator
agrees. `longest` holds the longest context whose cache can be allocated beside the model, by bisection; `prefill` whole prompts of one sequence that the
model reads into the cache itself, at once or in chunks: seconds (the median of `repeats`), the allocator's peak, and what is held afterwards. What
packing costs a prompt is the difference between the plans there; `packing_s` above is more, for it waits for every layer by itself. `profiles`:
the kernels of a step, microseconds in which any runs (`busy_us`), and in which none does between one and the next (`between_us`).

A row that fails is kept with its `error`; a cache that the plan's bytes say cannot fit is not tried. Rows are written as they come; rows that the file
holds are not measured again, so a job that is cut short goes on where it was. Those that failed for another cause than memory are, and so are those
marked `again`, which an earlier version measured.

Longer than other files: all kinds of rows share the prompts, the caches and the file that a cut job goes on from.

    python benchmarks/bench_generate.py --out benchmarks/results/generate-h100.json [--only REGEX] [--minutes N] [--device cpu --tiny]
    python benchmarks/bench_generate.py --out benchmarks/results/generate-h100.json --merge OTHER.json --commit HASH
"""

import argparse
import gc
import json
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import bitsandheads as bh
from bitsandheads.layer import ChunkMask

STEPS = 40, 14  # new tokens of a row, and how many of them come before the time is taken
FEW = 8, 3  # the same for caches that take long
QUERIES = 256  # newest queries that packing looks at
STEPS_SECONDS, ROW_SECONDS = 8.0, 60  # a row takes no more steps after this time, and is given up
CHUNK = 8192  # tokens of a pass, for prompts in chunks
PROFILED, BETWEEN_US = 6, 20  # steps of a profile; longer than that the GPU waits for the host
TUNED = {"coordinate_descent_tuning": True}  # options of torch.compile
SPARE = 3 << 30  # bytes that the largest batch leaves to the steps themselves, and 4 MiB more for each sequence
WINDOW = bh.Window(16, 64)
QWEN25 = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)
LLAMA31 = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)
QWEN3 = dict(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=151936,
    head_dim=128,
)
TINY = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, head_dim=64
)
LONG = dict(max_position_embeddings=1 << 20, tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0)
MODELS: dict[str, Callable[[], Any]] = {
    "qwen2.5-7b": lambda: tf.Qwen2Config(**QWEN25, **LONG),
    "llama-3.1-8b": lambda: tf.LlamaConfig(**LLAMA31, **LONG),
    "qwen3-4b": lambda: tf.Qwen3Config(**QWEN3, **LONG),
    "tiny": lambda: tf.LlamaConfig(**TINY, **LONG),
}


@dataclass(frozen=True)
class Point:
    """What a row measures.

    kind: "steps"; "tuned": steps compiled with TUNED; "largest": with the largest batch that fits; "longest": no steps, the longest context;
    "prefill", "chunked": no steps, the prompt; "profile": the kernels of some steps.
    """

    model: str
    plan: str
    batch: int
    context: int
    kind: str = "steps"

    @property
    def name(self) -> str:
        return f"{self.model} {self.plan} b{self.batch} t{self.context} {self.kind}"


OURS = ("balanced", "bf16", "rlkv@0.5", "balanced+rlkv@0.5")
STATIC = {
    "hf-static": "sdpa",
    "hf-static-flex": "flex_attention",
    "hf-static-eager": "eager",
}  # compiled, with every attention that is offered


def points() -> Iterator[Point]:
    """All points, the most important ones first; rows that share a compiled step follow each other."""
    first, *others = list(MODELS)[:3]
    more = [p for p in bh.preset_names() if p not in OURS]
    yield from (Point(first, plan, batch, context) for batch, context in ((8, 32768), (1, 8192)) for plan in OURS)
    yield from (Point(first, plan, 1, 8192, "tuned") for plan in OURS)
    yield from (
        Point(first, plan, batch, context, "profile") for batch, context in ((8, 32768), (1, 8192), (1, 131072)) for plan in OURS[:2]
    )
    yield from (Point(first, plan, 1, 32768, "largest") for plan in OURS)
    yield from (Point(first, plan, 1, 32768, kind) for kind in ("prefill", "chunked") for plan in ("balanced", "bf16"))
    yield from (Point(first, plan, 1, 131072, kind) for kind in ("steps", "tuned") for plan in OURS)
    yield from (Point(first, plan, 1, 2048, "longest") for plan in (*OURS, "extreme"))
    rest = [(1, 32768), (32, 32768), (8, 8192), (32, 8192)]
    yield from (Point(first, plan, b, t) for b, t in rest for plan in OURS)
    yield from (Point(first, plan, 8, 32768) for plan in more)
    yield from (Point(first, plan, 1, 131072, "prefill") for plan in ("balanced", "bf16"))
    yield from (Point(first, plan, b, 131072) for b in (8, 32) for plan in OURS)
    yield from (Point(model, plan, b, t) for model in others for b, t in ((8, 32768), (1, 8192)) for plan in OURS)
    yield from (Point(model, plan, 1, 32768, "largest") for model in others for plan in OURS)
    yield from (Point(model, plan, b, t) for model in others for b, t in rest for plan in OURS)
    yield from (Point(model, plan, b, 131072) for model in others for b in (1, 8, 32) for plan in OURS)
    yield from (Point(first, plan, b, t) for plan in STATIC for b, t in ((8, 32768), (1, 8192)))
    yield from (Point(first, f"hf-{kind}", b, t) for b, t in ((8, 32768), (1, 8192)) for kind in ("dynamic", "hqq-2", "quanto-2"))
    yield from (Point(model, "hf-static", 8, 32768) for model in others)


def make_model(name: str, device: str) -> Any:
    """A model by its name."""
    return random_model(MODELS[name](), device)


def random_model(config: Any, device: str) -> Any:
    """A model with random bf16 weights, made on the device."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(model.config)  # its buffers are no parameters: computed, not drawn
    model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    draw_weights(model.requires_grad_(False))
    bh.enable(model)
    return model.eval()


def draw_weights(model: Any) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if "norm" in name else 0.0)
        else:
            parameter.normal_(0, 0.02)


def plan_of(name: str, model: Any) -> bh.CachePlan:
    """A preset, or one with every second KV head of every layer windowed (speed and memory do not ask which)."""
    bits, _, share = name.partition("rlkv@")
    if not share:
        return bh.get_plan(name)
    text = model.config
    values = torch.rand(text.num_hidden_layers, text.num_key_value_heads, generator=torch.Generator().manual_seed(0))
    scores = bh.HeadScores(values.tolist(), model=name, method="random")
    return bh.compose(bh.get_plan(bits.rstrip("+") or "bf16"), scores, float(share), WINDOW, name)


def make_cache(point: Point, model: Any, total: int) -> Any:
    """The cache of a row, for `total` tokens."""
    if point.plan in STATIC:
        return tf.StaticCache(config=model.config, max_cache_len=total)
    if point.plan == "hf-dynamic":
        return tf.DynamicCache(config=model.config)
    if point.plan.startswith("hf-"):
        _, backend, bits = point.plan.split("-")
        return tf.QuantizedCache(backend, model.config, nbits=int(bits))
    return bh.CompressedCache(plan_of(point.plan, model), model, capacity=total)


@dataclass
class Prompt:
    """What the layers of a model were given for a prompt: newest queries [1, Hq, QUERIES, D], keys and values [1, H, tokens, D], on the CPU."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scale: float
    seconds: float


def read_prompt(model: Any, tokens: int, device: str) -> Prompt:
    """Run a prompt of random tokens through the model and keep what its layers were given."""
    prompt = Prompt([], [], [], 0.0, 0.0)
    copying = [0.0]

    def keep(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=device == "cuda").copy_(x)

    def watch(layer: Any) -> None:
        def attend(q: torch.Tensor, chunk: Any, scale: float, base: Callable[..., torch.Tensor]) -> torch.Tensor:
            (k, v), layer.staged = layer.staged, None
            synchronize(device)
            start = time.perf_counter()
            for kept, x in ((prompt.queries, q[:, :, -QUERIES:]), (prompt.keys, k), (prompt.values, v)):
                kept.append(keep(x))
            copying[0] += time.perf_counter() - start
            prompt.scale = scale
            return base(q, k, v)

        layer.attend = attend

    cache = bh.CompressedCache("bf16", model)
    for layer in cache.compressed_layers():
        watch(layer)
    ids = torch.randint(2, model.config.vocab_size, (1, tokens), device=device)
    synchronize(device)
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    synchronize(device)
    prompt.seconds = time.perf_counter() - start - copying[0]
    return prompt


def fill(cache: Any, prompt: Prompt, batch: int, device: str) -> float:
    """Give a cache the prompt, for every sequence of the batch. Returns the seconds that the cache took for one."""
    seconds = 0.0
    ours = isinstance(cache, bh.CompressedCache)
    if ours and cache.scores_embeddings:
        cache.set_token_scores(torch.rand(1, prompt.keys[0].shape[2], generator=torch.Generator().manual_seed(0)))
    for i, (q, k, v) in enumerate(zip(prompt.queries, prompt.keys, prompt.values, strict=True)):
        q, k, v = (x.to(device).expand(1 if ours else batch, -1, -1, -1) for x in (q, k, v))
        synchronize(device)
        start = time.perf_counter()
        handle, _ = cache.update(k, v, i)
        if ours:
            handle.layer.attend(q, ChunkMask(None, None), prompt.scale, lambda q, k, v: q)
        synchronize(device)
        seconds += time.perf_counter() - start
    if ours and batch > 1:
        cache.fixed.enter()  # buffers get their size before they are repeated
        cache.batch_repeat_interleave(batch)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Watch(tf.StoppingCriteria):
    """Notes when `generate` has each token. It waits for each token by itself, so these are the times of its own loop.

    Stops early, though after three steps that count, where `warm` tokens and those steps took longer than STEPS_SECONDS.
    """

    def __init__(self, batch: int, warm: int, device: str) -> None:
        self.times: list[float] = []
        self.enough = warm + 4
        self.go_on = torch.zeros(batch, dtype=torch.bool, device=device)
        self.stop = torch.ones_like(self.go_on)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return self.stop if len(self.times) >= self.enough and self.times[-1] - self.times[0] > STEPS_SECONDS else self.go_on


class Profile(Watch):
    """Profiles PROFILED steps."""

    def __init__(self, batch: int, warm: int, device: str) -> None:
        super().__init__(batch, warm, device)
        self.first = warm
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if len(self.times) in (self.first, self.first + PROFILED):
            torch.cuda.synchronize()
            (self.profiler.start if len(self.times) == self.first else self.profiler.stop)()
        return super().__call__(input_ids, scores, **kwargs)

    def summary(self) -> dict[str, Any]:
        """Of a step: launches, busy and idle microseconds, and the kernels, those that take longest first."""
        events = [e for e in self.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels: dict[str, list[float]] = {}
        busy = between = end = 0.0
        for e in sorted(events, key=lambda e: e.time_range.start):
            start, stop = e.time_range.start, e.time_range.end
            between += start - end if 0 < start - end < BETWEEN_US and end else 0
            busy += max(stop - max(start, end), 0)
            end = max(end, stop)
            kernels.setdefault(e.name, []).append(stop - start)
        each = [{"launches": len(us) / PROFILED, "us": sum(us) / PROFILED, "kernel": name[:160]} for name, us in kernels.items()]
        row = {"launches": len(events) / PROFILED, "busy_us": busy / PROFILED, "between_us": between / PROFILED}
        return row | {"kernels": sorted(each, key=lambda k: -k["us"])}


def decode(point: Point, model: Any, prompt: Prompt, device: str, watch: Watch, new: int) -> dict[str, Any]:
    """Fill a cache with a prompt that is one token shorter than the context (a shorter one only compiles the step), and generate `new` tokens."""
    row: dict[str, Any] = {"batch": point.batch, **({"tuned": True} if point.kind == "tuned" else {})}
    on_gpu = device == "cuda"
    check_room(point, model, device)
    if on_gpu:
        row["model_bytes"] = torch.cuda.memory_allocated()
    cache = make_cache(point, model, point.context + STEPS[0])
    row |= {"prefilled_sequences": 1 if isinstance(cache, bh.CompressedCache) else point.batch}
    row["packing_s"] = fill(cache, prompt, point.batch, device)
    row["prefill_s"] = prompt.seconds + row["packing_s"]
    ids = torch.randint(2, model.config.vocab_size, (1, prompt.keys[0].shape[2] + 1), device=device).expand(point.batch, -1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        stopping_criteria=[watch],
        compile_config=tf.CompileConfig(mode=None, options=TUNED) if point.kind == "tuned" else None,
    )
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row | {"cache_bytes": cache_bytes(cache)}


def measure(point: Point, model: Any, prompt: Prompt, device: str, few: bool = False) -> dict[str, Any]:
    """One row. few: only a few steps."""
    new, warm = FEW if few or (point.plan.startswith("hf-") and point.plan not in STATIC) else STEPS
    watch = Watch(point.batch, warm, device)
    row = decode(point, model, prompt, device, watch, new)
    steps = sorted(b - a for a, b in zip(watch.times[warm:], watch.times[warm + 1 :], strict=False))
    ms = 1e3 * statistics.median(steps)
    row |= {"steps": len(steps), "ms_per_step": ms, "ms_low": 1e3 * steps[0], "ms_high": 1e3 * steps[-1]}
    return row | {"tokens_per_s": 1e3 * point.batch / ms}


def profile(point: Point, model: Any, prompt: Prompt, device: str) -> dict[str, Any]:
    """The kernels of PROFILED steps."""
    watch = Profile(point.batch, STEPS[1], device)
    decode(point, model, prompt, device, watch, STEPS[1] + PROFILED + 2)
    return watch.summary()


def check_room(point: Point, model: Any, device: str) -> None:
    """Raise OutOfMemoryError for a cache of ours that cannot fit, before its prompt is copied."""
    if device != "cuda" or point.plan.startswith("hf-"):
        return
    needed = point.batch * plan_of(point.plan, model).resolve(model.config).capacity_bytes(point.context + STEPS[0], itemsize=2)
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        raise torch.OutOfMemoryError(f"the cache needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free beside the model")


def largest(point: Point, model: Any, prompt: Prompt, device: str) -> dict[str, Any]:
    """The row with the largest batch that fits."""
    plan = plan_of(point.plan, model).resolve(model.config)
    each = plan.capacity_bytes(point.context + STEPS[0], itemsize=2) + (4 << 20)
    batch = int((torch.cuda.mem_get_info()[0] - SPARE) // each) if device == "cuda" else 2
    while True:
        try:
            return measure(replace(point, batch=batch), model, prompt, device) | {"largest": True}
        except torch.OutOfMemoryError:
            batch = batch * 24 // 25
        clean(device)


def longest(point: Point, model: Any, prompt: Prompt, device: str) -> dict[str, Any]:
    """The longest context of one sequence whose cache can be allocated beside the model, to one part in 256."""
    plan = plan_of(point.plan, model).resolve(model.config)
    guess = torch.cuda.mem_get_info()[0] / plan.capacity_bytes(1 << 20, itemsize=2) * (1 << 20)
    low, high, taken = int(guess * 0.8), int(guess * 1.1), 0  # fits, does not fit
    while high - low > low >> 8 or not taken:
        middle = (low + high) // 2
        cache = make_cache(point, model, middle)
        try:
            fill(cache, prompt, 1, device)
            cache.fixed.enter()
            low, taken = middle, cache_bytes(cache)
        except torch.OutOfMemoryError:
            high = middle
        del cache
        clean(device)
    return {"context": low, "cache_bytes": taken}


def prefill(point: Point, model: Any, prompt: Prompt, device: str) -> dict[str, Any]:
    """Seconds and bytes of a whole prompt of one sequence, after one that does not count (kernels are compiled); chunked: in passes of CHUNK tokens."""
    ids = torch.randint(2, model.config.vocab_size, (1, point.context), device=device)
    row: dict[str, Any] = {"chunk": min(CHUNK, point.context // 2) if point.kind == "chunked" else None}
    seconds = []
    for _ in range(1 + (5 if point.context <= 32768 else 2)):
        clean(device)
        if device == "cuda":
            row["model_bytes"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        cache = make_cache(point, model, point.context + STEPS[0])
        synchronize(device)
        start = time.perf_counter()
        for part in ids.split(row["chunk"] or point.context, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        row["cache_bytes"] = cache_bytes(cache)
        if device == "cuda":
            row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "held_bytes": torch.cuda.memory_allocated() - row["model_bytes"]}
        del cache
    del seconds[0]
    return row | {
        "prefill_s": statistics.median(seconds),
        "prefill_low": min(seconds),
        "prefill_high": max(seconds),
        "repeats": len(seconds),
    }


SECTIONS = ("rows", "longest", "prefill", "profiles")
SECTION = {"longest": "longest", "prefill": "prefill", "chunked": "prefill", "profile": "profiles"}  # of the file; all others: rows
KINDS = {
    "steps": measure,
    "tuned": measure,
    "largest": largest,
    "longest": longest,
    "prefill": prefill,
    "chunked": prefill,
    "profile": profile,
}


def clean(device: str) -> None:
    """Give back what is not used any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds."""
    if isinstance(cache, bh.CompressedCache):
        return cache.memory_bytes(allocated=True)
    seen: dict[int, int] = {}

    def walk(x: Any, depth: int = 0) -> None:
        if isinstance(x, torch.Tensor):
            inner = [getattr(x, n) for n in ("_data", "_scale", "_shift") if isinstance(getattr(x, n, None), torch.Tensor)]
            for part in inner:
                walk(part, depth + 1)
            if not inner and x.device.type != "meta":
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif depth < 6:
            for y in (
                x.values()
                if isinstance(x, dict)
                else x
                if isinstance(x, (list, tuple))
                else vars(x).values()
                if hasattr(x, "__dict__")
                else ()
            ):
                walk(y, depth + 1)

    for layer in cache.layers:
        walk({k: v for k, v in vars(layer).items() if k != "config"})
    return sum(seen.values())


def write(path: Path, data: dict[str, Any]) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("generate.json"))
    parser.add_argument("--only", default="", help="regular expression on 'model plan bBATCH tCONTEXT'")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no row after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wait", type=Path, help="compile the steps of one model's rows, then wait for this file before anything is timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts: shows that the script works")
    parser.add_argument("--commit", default="", help="of the code, noted in the rows")
    parser.add_argument("--merge", type=Path, help="take the rows of this file into --out, in place of rows of the same points")
    parser.add_argument(
        "--kernels", help="I/N: only compile the kernels of the I-th of N parts of the plans, for the disk caches of a run that follows"
    )
    args = parser.parse_args()
    if args.merge:
        merge(args.out, args.merge, args.commit)
    elif args.kernels:
        compile_kernels(*map(int, args.kernels.split("/")), args.device)
    else:
        run(args)


def merge(path: Path, other: Path, commit: str) -> None:
    """Take the rows of a run on the same device and versions into a file."""
    data, new = (json.loads(p.read_text()) if p.exists() else None for p in (path, other))
    data = data or {"environment": new["environment"]}
    if data["environment"] != new["environment"]:
        raise SystemExit(f"{other} was measured with {new['environment']}, {path} with {data['environment']}. Give --out another file.")
    for kind in SECTIONS:
        rows = {r["point"]: r for r in data.get(kind, []) if "again" not in r}
        rows |= {r["point"]: {**r, "commit": r.get("commit") or commit} for r in new.get(kind, [])}
        order = {p.name: i for i, p in enumerate(points())}
        data[kind] = sorted(rows.values(), key=lambda r: order.get(r["point"], len(order)))
    write(path, data)


def tried(call: Callable[[], dict[str, Any]], seconds: int = ROW_SECONDS) -> dict[str, Any]:
    """What a call returns, or its error: kept in the row, so that a long job goes on. A call that takes longer is an error too."""

    def give_up(*args: Any) -> None:
        raise TimeoutError(f"given up after {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        return call()
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}".split("\n")[0][:200]}
    finally:
        signal.alarm(0)


class Bench:
    """The model and the prompts that the rows share."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.model: Any = None
        torch._dynamo.config.recompile_limit = 64  # one for each static length; beyond the limit steps would run uncompiled in silence
        self.name = self.plan = ""
        self.prompts: dict[int, Prompt] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.compiled = False

    def row(self, point: Point) -> dict[str, Any]:
        """Measure a point."""
        self.load(point.model)
        how = KINDS[point.kind]
        prompt = self.prompt(point.context)  # for prefill too: the first pass of a length loads kernels
        self.attention(point.plan)
        row = {"point": point.name, "model": point.model, "plan": point.plan, "batch": point.batch, "context": point.context}
        row |= tried(lambda: how(point, self.model, prompt, self.device))
        clean(self.device)
        return row

    def compile(self, points: list[Point]) -> None:
        """Compile what these points of one model need, then give the memory of its weights back until `restore`."""
        self.load(points[0].model)
        self.compiled = True
        compiled = [p for p in points if self.has_step(p)]
        alike = (replace(p, context=p.context if p.plan in STATIC else 2048) for p in compiled)
        for point in dict.fromkeys(alike):
            prompt = self.prompt(min(2048, point.context))
            self.attention(point.plan)
            for batch in (2, 3) if point.kind == "largest" else (point.batch,):  # the second batch of a step makes it general
                one = replace(point, batch=batch)
                row = tried(partial(measure, one, self.model, prompt, self.device, few=True), seconds=400)
                print("compiled for", one.name, row.get("error", ""), flush=True)
                clean(self.device)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        clean(self.device)

    @staticmethod
    def has_step(point: Point) -> bool:
        """Whether a point is compiled beforehand. All plans of ours share a step, and those of more than eight sequences a general one."""
        if point.plan in STATIC:
            return True
        if point.kind == "tuned" or (point.kind == "steps" and point.batch <= 8):
            return point.plan in OURS
        return point.plan == OURS[0] and point.kind in ("steps", "largest")

    def restore(self) -> None:
        """Weights again."""
        for name, parameter in self.model.named_parameters():
            parameter.data = torch.empty(self.shapes[name], dtype=parameter.dtype, device=self.device)
        draw_weights(self.model)
        self.prompts = {}

    def load(self, name: str) -> None:
        """Switch to a model."""
        if self.name != name:
            self.model, self.prompts = None, {}
            torch._dynamo.reset()  # it compiles a function of transformers, which all models share, eight times at most
            clean(self.device)
            self.model, self.name = make_model(name, self.device), name
            self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
            self.prompt(512)  # libraries are loaded and kernels chosen

    def prompt(self, tokens: int) -> Prompt:
        """The prompt for a context of so many tokens; the row's own first step reads the last of them."""
        if tokens not in self.prompts:
            self.attention("bf16")
            self.prompts[tokens] = read_prompt(self.model, tokens - 1, self.device)
        return self.prompts[tokens]

    def attention(self, plan: str) -> None:
        """Switch the model to the attention of a plan. A StaticCache's step is compiled for one length alone; a general one would be slower."""
        if not self.compiled and (plan in STATIC or self.plan in STATIC):
            torch._dynamo.reset()
        self.plan = plan
        bh.disable(self.model)
        self.model.set_attn_implementation(STATIC.get(plan, "sdpa"))
        if not plan.startswith("hf-"):
            bh.enable(self.model)


@torch.no_grad()
def compile_kernels(part: int, parts: int, device: str) -> None:
    """Prompt and steps of one layer, for every plan and both sizes of a group of query heads."""
    first, second = list(MODELS)[:2]
    for name in (first, second):
        config = MODELS[name]()
        config.num_hidden_layers, config.vocab_size, config.intermediate_size = 1, 1024, 64
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[:1]
        model = random_model(config, device)
        plans = [*OURS[:3], *(p for p in bh.preset_names() if p not in OURS and name == first)][part::parts]
        for plan, batch in ((plan, batch) for plan in plans for batch in (1, 8)):
            room = 2100 if batch == 1 else 32808  # caches with room for many tokens have kernels of their own
            cache = make_cache(Point(name, plan, batch, 2048), model, room)
            fill(cache, read_prompt(model, 2047, device), batch, device)
            model.generate(torch.full((batch, 2048), 2, device=device), past_key_values=cache, max_new_tokens=3, disable_compile=True)
            print(name, plan, batch, flush=True)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Measure what the file does not hold yet."""
    started = time.time()
    data = json.loads(args.out.read_text()) if args.out.exists() else {kind: [] for kind in SECTIONS}
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    data["environment"] = {"device": where, "torch": torch.__version__, "transformers": tf.__version__, "bitsandheads": bh.__version__}
    todo = list(points())
    if args.tiny:
        kept = [p for p in todo if p.kind not in ("longest", "profile") and not re.search("quanto|hqq|flex", p.plan)]
        todo = list(dict.fromkeys(Point("tiny", p.plan, min(p.batch, 2), 700, p.kind) for p in kept))
    done = set()
    for kind in SECTIONS:
        data[kind] = [r for r in data.get(kind, []) if "error" not in r or "OutOfMemory" in r["error"]]
        done |= {r["point"] for r in data[kind] if "again" not in r}
    bench = Bench(args.device)
    todo = [p for p in todo if p.name not in done and re.search(args.only, p.name)]
    if args.wait:
        bench.compile(todo)
        print("waiting", flush=True)
        while not args.wait.exists():
            time.sleep(0.1)
        started = time.time()
        bench.restore()
    for point in todo:
        if time.time() - started > 60 * args.minutes:
            print(f"Time is up; {point.name} and what follows it are left. Run again to go on.")
            return
        row = bench.row(point) | {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": args.commit}
        kind = SECTION.get(point.kind, "rows")
        data[kind] = [*(r for r in data[kind] if r["point"] != point.name), row]
        write(args.out, data)
        print(
            f"{time.time() - started:.0f} s",
            point.name,
            {k: round(v, 3) if isinstance(v, float) else v for k, v in list(row.items())[5:]},
            flush=True,
        )


if __name__ == "__main__":
    main()
