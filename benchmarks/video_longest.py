"""The longest video that fits into a GPU and decodes, at the shape of Qwen2.5-VL-7B with random weights: bf16 against each preset.

    python benchmarks/video_longest.py --output benchmarks/results/video-longest-h100.json
    python benchmarks/video_longest.py --one-pass --plans bf16 balanced --output one-pass.json

What is held: random keys and values are packed piece by piece until the first layer holds a clip of so many frames; every other layer gets a copy of what
that one holds. Then the whole model decodes tokens over it. The vision tower and the prompt's attention are left out: for ten million tokens they take
hours, and what they need is gone when decoding begins. With --one-pass real pixels go through the whole model at once, as
transformers does it; the activations of that pass are then what fills the memory.

`bitsandheads plan --gpu-memory` predicts the number of frames; the search brackets the truth to --step. An attempt that runs out of
memory is caught and counts as too long. Rows are written as they come, and a plan whose search ended is not run again.
"""

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bitsandheads import CompressedCache, enable, get_plan
from bitsandheads.capacity import RESERVE, Capacity, capacity, largest, tokens_per_frame, weights
from bitsandheads.demo import versions, write_json
from bitsandheads.layer import CompressedLayer, read_mask

CONFIG = Path(__file__).resolve().parent.parent / "tests" / "configs" / "qwen2.5-vl-7b"
PIECE = 65536  # tokens that are packed at a time
QUERIES = 256  # newest queries of the prompt that steer packing
SHORT = 3 * PIECE // 2  # tokens of the attempt that compiles the kernels and shows what is needed beside the cache
SPARE = 64 << 20  # bytes left free in the first guess
Note = Callable[[dict[str, Any]], None]  # what is known so far about a plan


# -- what is held -----------------------------------------------------------------------------------------------------------------


def random_tokens(layer: CompressedLayer, piece: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, heads, tokens, D] of a layer's shape."""
    shape = layer.shape
    q = torch.randn(1, shape.q_heads, min(QUERIES, piece), shape.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(1, shape.kv_heads, piece, shape.head_dim, dtype=dtype, device=device) for _ in range(2))
    return q, k, v


def fill(layer: CompressedLayer, q: Tensor, k: Tensor, v: Tensor, tokens: int, room: int) -> None:
    """Let a layer hold `tokens` tokens, in buffers with room for `room` more: the first piece as a prompt whose attention is nothing, then more pieces."""
    piece = k.shape[2]
    first = min(piece, tokens)
    layer.stage(k[:, :, :first], v[:, :, :first])
    layer.attend(q, read_mask(None, first), layer.shape.head_dim**-0.5, lambda q, k, v: q[:, :, :0])
    for store in layer.stores:
        store.fix(tokens + room)
    for start in range(first, tokens, piece):
        n = min(piece, tokens - start)
        for store in layer.stores:
            store.append(k[:, :, :n], v[:, :, :n], None)
            store.compress(None)
    layer.segments[0].tokens = tokens


@torch.no_grad()
def held(model: Any, plan: str, tokens: int, new: int) -> dict[str, Any]:
    """Figures of a cache with `tokens` tokens and `new` decode steps of the model."""
    cache = CompressedCache(plan, model)
    began = time.perf_counter()
    device, dtype = model.device.type, model.dtype
    layers = cache.compressed_layers()
    given = random_tokens(layers[0], min(PIECE, tokens), device, dtype)
    fill(layers[0], *given, tokens, new)
    del given
    for layer in layers[1:]:
        layer.stores, layer.segments, layer.scale = copy.deepcopy((layers[0].stores, layers[0].segments, layers[0].scale))
    times, token = [], torch.full((1, 1), 1, device=device)
    for i in range(new):
        started = time.perf_counter()
        position = torch.full((3, 1, 1), tokens + i, device=device)
        logits = model(input_ids=token, position_ids=position, past_key_values=cache).logits
        token = logits[:, -1:].argmax(-1)
        if not bool(logits.isfinite().all()):
            raise ArithmeticError(f"{plan} with {tokens} tokens: logits that are not finite")
        times.append(time.perf_counter() - started)
    return {
        "tokens": tokens,
        "token_ms": 1e3 * sorted(times)[len(times) // 2],
        "seconds": time.perf_counter() - began,
        "cache_bytes": cache.memory_bytes(),
        "allocated_bytes": cache.memory_bytes(allocated=True),
        "bits_per_element": cache.bits_per_element(),
    }


# -- read in one pass -------------------------------------------------------------------------------------------------------------


def inputs_of(config: Any, frames: int, size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A clip of noise and a short question, as the processor would lay them out."""
    vision = config.vision_config
    steps, side = frames // vision.temporal_patch_size, size // vision.patch_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    count = steps * (side // vision.spatial_merge_size) ** 2
    ids = torch.full((1, count + 34), config.video_token_id)
    ids[:, 0], ids[:, count + 1], ids[:, count + 2 :] = config.vision_start_token_id, config.vision_end_token_id, 1
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "mm_token_type_ids": (2 * (ids == config.video_token_id)).int().to(device),
        "pixel_values_videos": torch.randn(steps * side**2, values, dtype=dtype, device=device),
        "video_grid_thw": torch.tensor([[steps, side, side]], device=device),
    }


@torch.no_grad()
def one_pass(model: Any, plan: str, frames: int, size: int, new: int) -> dict[str, Any]:
    """Figures of a clip that is read at once, and `new` decode steps."""
    inputs = inputs_of(model.config, frames, size, model.device.type, model.dtype)
    cache = CompressedCache(plan, model)
    times, tokens = [], inputs["input_ids"].shape[1]
    for step in range(new + 1):
        started = time.perf_counter()
        token = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        inputs = {"input_ids": token}
        token.tolist()
        if step == 0:
            prompt_seconds = time.perf_counter() - started
        else:
            times.append(time.perf_counter() - started)
    return {
        "tokens": tokens,
        "token_ms": 1e3 * sorted(times)[len(times) // 2],
        "prompt_seconds": prompt_seconds,
        "cache_bytes": cache.memory_bytes(),
        "bits_per_element": cache.bits_per_element(),
    }


# -- search -----------------------------------------------------------------------------------------------------------------------


def attempt(figures: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Figures with the peak of memory; None if memory ran out."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return figures() | {"peak_bytes": torch.cuda.max_memory_allocated()}
    except RuntimeError as error:  # the allocator's own error, or a library's
        if "out of memory" not in str(error).lower():
            raise
        return None


def search(measure: Callable[[int], dict[str, Any] | None], guess: int, step: float, until: float, note: Note) -> None:
    """The longest clip that worked and the shortest that did not, within a factor of 1 + step or until the time is over. Frames come in twos.

    note: given what is known after each attempt.
    """
    best: dict[str, Any] | None = None
    low, high, frames = 0, None, max(2, guess // 2 * 2)
    tried = []
    while time.perf_counter() < until:
        found = measure(frames)
        tried.append({"frames": frames, "fits": found is not None})
        print(tried[-1], {k: round(v, 2) for k, v in (found or {}).items()}, flush=True)
        if found is None:
            high = frames
        else:
            best, low = {"frames": frames} | found, frames
        note({"too_long": high, "tried": tried} | (best or {"frames": None}))
        if high is not None and high - low <= max(2, step * low):
            break
        if high is None:
            frames = max(low + 2, round(low * (1 + step)))
        elif low == 0:
            frames = min(high - 2, round(high * (1 - step)))
        else:
            frames = (low + high) // 2
        frames = max(2, frames // 2 * 2)


def search_held(model: Any, plan: str, frame: float, found: Capacity, args: argparse.Namespace, until: float, note: Note) -> None:
    """Search for the longest clip that is held, from what a short one needs beside its cache."""

    def measure(frames: int) -> dict[str, Any] | None:
        return attempt(lambda: held(model, plan, round(frames * frame), args.tokens))

    short = measure(round(SHORT / frame))
    assert short is not None
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
    resolved = get_plan(plan).resolve(model.config)
    room = free - (short["peak_bytes"] - short["allocated_bytes"]) - SPARE
    guess = int(largest(lambda n: resolved.bytes_for(n) <= room) / frame)
    print(plan, f"predicted {found.held_frames}, begins with {guess}, {free / 1e9:.1f} GB free", flush=True)
    search(measure, guess, args.step, until, lambda row: note({"predicted_frames": found.held_frames, "free_bytes": free} | row))


def search_one_pass(model: Any, plan: str, found: Capacity, args: argparse.Namespace, until: float, note: Note) -> None:
    """Search for the longest clip that is read at once, from the prediction."""

    def measure(frames: int) -> dict[str, Any] | None:
        return attempt(lambda: one_pass(model, plan, frames, args.size, args.tokens))

    search(measure, found.frames or 2, args.step, until, lambda row: note({"predicted_frames": found.frames} | row))


def warm(config: Any, plans: list[str]) -> None:
    """Compile the kernels of plans, without the model."""
    for plan in plans:
        (layer, *_) = CompressedCache(plan, config).compressed_layers()
        q, k, v = random_tokens(layer, PIECE, "cuda", torch.bfloat16)
        fill(layer, q, k, v, SHORT, 1)
        layer.stage(k[:, :, :1], v[:, :, :1])
        layer.attend(q[:, :, :1], read_mask(None, 1), layer.shape.head_dim**-0.5, lambda q, k, v: q)
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=["bf16", "balanced", "extreme", "kivi-2", "vidkv-1.5/1.58"])
    parser.add_argument("--one-pass", action="store_true")
    parser.add_argument("--warm", action="store_true", help="only compile the kernels")
    parser.add_argument("--size", type=int, default=448, help="pixels of a frame's side")
    parser.add_argument("--tokens", type=int, default=8, help="to decode")
    parser.add_argument("--step", type=float, default=0.01)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    until = time.perf_counter() + 60 * args.minutes
    config = transformers.AutoConfig.from_pretrained(CONFIG)
    if args.warm:
        warm(config, args.plans)
        return
    if args.output is None:
        parser.error("--output is needed")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    enable(model)
    memory = torch.cuda.get_device_properties(0).total_memory
    frame = tokens_per_frame(config, args.size, args.size)
    data = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": []}
    data |= {"model": CONFIG.name, "size": args.size, "tokens_per_frame": frame, "memory": memory, "reserve": RESERVE}
    data |= {"weights": weights(config), "gpu": torch.cuda.get_device_name(), "versions": versions()}
    what = "one pass" if args.one_pass else "held"
    for plan in args.plans:
        others = [r for r in data["rows"] if (r["plan"], r["what"]) != (plan, what)]
        if any(r["too_long"] for r in data["rows"] if r not in others) or time.perf_counter() > until:
            continue
        found = capacity(config, get_plan(plan), memory, frame, data["weights"])

        def note(row: dict[str, Any], plan: str = plan, others: list[dict[str, Any]] = others) -> None:
            data["rows"] = [*others, {"plan": plan, "what": what} | row]
            write_json(data, args.output)

        if args.one_pass:
            search_one_pass(model, plan, found, args, until, note)
        else:
            search_held(model, plan, frame, found, args, until, note)


if __name__ == "__main__":
    main()
