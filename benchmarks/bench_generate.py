"""Decode steps of whole models through `generate`: tokens per second and tokens per gigabyte, on one GPU.

Random bf16 weights at real shapes. A row is one model, plan, batch and context: a prompt of `context` random tokens, then `generate` of NEW
tokens. `ms_per_step` is the median over the steps after the first WARM, which compile and capture; the time is taken where a stopping criterion
sees each token (the host waits for it, as `generate` does anyway). Plans that start with `hf-` are transformers' own caches. Peak and cache
bytes come from the allocator. A row that fails is kept with its `error`. Rows are written as they come; rows that the file holds are not
measured again (but those that failed for another cause than memory are), so a job that is cut short goes on where it was.

    python benchmarks/bench_generate.py --out benchmarks/results/generate-h100.json [--only REGEX] [--minutes N] [--device cpu --tiny]
"""

import argparse
import gc
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import bitsandheads as bh

NEW, WARM = 48, 16
AT_ONCE = 1 << 18  # tokens of a prompt that are run in one pass
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
    """What a row measures."""

    model: str
    plan: str
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.plan} b{self.batch} t{self.context}"


def points() -> Iterator[Point]:
    """All points, the most important ones first."""
    ours = ("balanced", "bf16", "rlkv@0.5", "balanced+rlkv@0.5")
    headline = ((8, 32768), (1, 131072), (1, 8192), (32, 32768))
    first = "qwen2.5-7b"
    yield from (Point(first, plan, b, t) for b, t in headline for plan in ours)
    yield from (Point(first, plan, b, t) for b, t in headline[:3] for plan in ("hf-static", "hf-dynamic", "hf-quanto-2", "hf-hqq-2"))
    rest = [p for p in bh.preset_names() if p not in ours]
    yield from (Point(first, plan, 8, 32768) for plan in rest)
    yield from (Point(model, plan, b, t) for model in list(MODELS)[1:3] for b, t in headline for plan in ours)
    yield from (Point(model, "hf-static", b, t) for model in list(MODELS)[1:3] for b, t in headline[:3])
    others = [(b, t) for b in (1, 8, 32) for t in (8192, 32768, 131072) if (b, t) not in headline]
    yield from (Point(model, plan, b, t) for model in list(MODELS)[:3] for b, t in others for plan in (*ours, "extreme"))


def make_model(name: str, device: str) -> Any:
    """A model with random bf16 weights, made on the device."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(model.config)  # its buffers are no parameters: computed, not drawn
    model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim < 2:
            parameter.fill_(1.0 if "norm" in parameter_name else 0.0)
        else:
            parameter.normal_(0, 0.02)
    bh.enable(model)
    return model.eval()


def plan_of(name: str, model: Any) -> bh.CachePlan:
    """A preset, or one with every second KV head of every layer windowed (speed and memory do not ask which)."""
    bits, _, share = name.partition("rlkv@")
    if not share:
        return bh.get_plan(name)
    text = model.config
    values = torch.rand(text.num_hidden_layers, text.num_key_value_heads, generator=torch.Generator().manual_seed(0))
    scores = bh.HeadScores(values.tolist(), model=name, method="random")
    return bh.compose(bh.get_plan(bits.rstrip("+") or "bf16"), scores, float(share), WINDOW, name)


def make_cache(point: Point, model: Any, new: int) -> Any:
    """The cache of a row."""
    total = point.context + new
    if point.plan == "hf-static":
        return tf.StaticCache(config=model.config, max_cache_len=total)
    if point.plan == "hf-dynamic":
        return tf.DynamicCache(config=model.config)
    if point.plan.startswith("hf-"):
        _, backend, bits = point.plan.split("-")
        return tf.QuantizedCache(backend, model.config, nbits=int(bits))
    return bh.CompressedCache(plan_of(point.plan, model), model, capacity=total)


class Watch(tf.StoppingCriteria):
    """Never stops; notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        input_ids[0, -1].item()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prefill(point: Point, model: Any, ids: torch.Tensor, cache: Any) -> int:
    """Prompts that would not fit at once: a part of the batch is run and its cache repeated. Returns how many sequences were run (0: none)."""
    part = point.batch
    while part > 1 and part * point.context > AT_ONCE:
        part //= 2
    if part == point.batch or point.plan.startswith("hf-"):
        return 0
    model(ids[:part, :-1], past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(point.batch // part)
    return part


def measure(point: Point, model: Any, device: str, new: int, warm: int) -> dict[str, Any]:
    """One row."""
    on_gpu = device == "cuda"
    row: dict[str, Any] = {}
    if on_gpu:
        row["model_bytes"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(2, model.config.vocab_size, (1, point.context), device=device).expand(point.batch, -1).contiguous()
    if point.plan.startswith("hf-"):
        bh.disable(model)
    try:
        with torch.no_grad():
            cache, watch = make_cache(point, model, new), Watch()
            start = time.perf_counter()
            row["prefilled_sequences"] = prefill(point, model, ids, cache) or point.batch
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                stopping_criteria=[watch],
            )  # fmt: skip
    finally:
        bh.enable(model)
    steps = sorted(b - a for a, b in zip(watch.times[warm:], watch.times[warm + 1 :], strict=False))
    ms = 1e3 * statistics.median(steps)
    row |= {"ms_per_step": ms, "ms_low": 1e3 * steps[0], "ms_high": 1e3 * steps[-1], "tokens_per_s": 1e3 * point.batch / ms}
    row["prefill_s"] = watch.times[0] - start
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    row["cache_bytes"] = cache_bytes(cache)
    return row


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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="regular expression on 'model plan bBATCH tCONTEXT'")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no row after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts: shows that the script works")
    args = parser.parse_args()
    started = time.time()
    data = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    data["environment"] = {"device": where, "torch": torch.__version__, "transformers": tf.__version__, "bitsandheads": bh.__version__}
    todo = list(points())
    new, warm = (NEW, WARM)
    if args.tiny:
        todo = list(
            dict.fromkeys(Point("tiny", p.plan, min(p.batch, 2), 700) for p in todo if "quanto" not in p.plan and "hqq" not in p.plan)
        )
        new, warm = 6, 2
    data["rows"] = [r for r in data["rows"] if "error" not in r or "OutOfMemory" in r["error"]]
    done = {tuple(r[k] for k in ("model", "plan", "batch", "context")) for r in data["rows"]}
    model, loaded = None, ""
    for point in todo:
        if (point.model, point.plan, point.batch, point.context) in done or not re.search(args.only, point.name):
            continue
        if time.time() - started > 60 * args.minutes:
            print(f"Time is up; {point.name} and what follows it are left. Run again to go on.")
            break
        if loaded != point.model:
            model = None
            gc.collect()
            model, loaded = make_model(point.model, args.device), point.model
        row: dict[str, Any] = {"model": point.model, "plan": point.plan, "batch": point.batch, "context": point.context}
        try:
            row |= measure(point, model, args.device, new, warm)
        except Exception as e:  # kept in the row, so that a long job goes on
            row["error"] = f"{type(e).__name__}: {e}".split("\n")[0][:200]
        torch._dynamo.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        data["rows"].append(row)
        write(args.out, data)
        print(point.name, {k: round(v, 3) if isinstance(v, float) else v for k, v in list(row.items())[4:]}, flush=True)


if __name__ == "__main__":
    main()
