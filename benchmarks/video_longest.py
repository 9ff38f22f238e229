"""The longest video that fits into a GPU and decodes, at the shape of Qwen2.5-VL-7B with random weights: bf16 against each preset.

    python benchmarks/video_longest.py --output benchmarks/results/video-longest-h100.json

Real pixels go through the whole model in one pass: vision tower, language model, packing; then tokens are decoded. `bitsandheads plan
--gpu-memory` predicts the number of frames; the search begins there and brackets the truth to --step. An attempt that runs out of memory
is caught and counts as too long. Rows are written as they come, and a plan whose row is there is not run again.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bitsandheads import CompressedCache, enable, get_plan
from bitsandheads.capacity import capacity, tokens_per_frame, weights
from bitsandheads.demo import versions, write_json

CONFIG = Path(__file__).resolve().parent.parent / "tests" / "configs" / "qwen2.5-vl-7b"


def inputs_of(config: Any, frames: int, size: int, device: str) -> dict[str, torch.Tensor]:
    """A clip of noise and a short question, as the processor would lay them out."""
    vision = config.vision_config
    steps, side = frames // vision.temporal_patch_size, size // vision.patch_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    count = steps * (side // vision.spatial_merge_size) ** 2
    ids = torch.full((1, count + 34), config.video_token_id)
    ids[:, 0], ids[:, count + 1], ids[:, count + 2 :] = config.vision_start_token_id, config.vision_end_token_id, 100
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "mm_token_type_ids": (2 * (ids == config.video_token_id)).int().to(device),
        "pixel_values_videos": torch.randn(steps * side**2, values, dtype=torch.bfloat16, device=device),
        "video_grid_thw": torch.tensor([[steps, side, side]], device=device),
    }


@torch.no_grad()
def attempt(model: Any, plan: str, frames: int, size: int, tokens: int) -> dict[str, Any] | None:
    """Figures of one attempt; None if memory ran out."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cache, times = None, []
    try:
        inputs = inputs_of(model.config, frames, size, "cuda")
        cache = CompressedCache(plan, model)
        torch.cuda.synchronize()
        started = time.perf_counter()
        token = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        prompt_seconds = time.perf_counter() - started
        prompt_tokens = inputs["input_ids"].shape[1]
        del inputs
        peak = torch.cuda.max_memory_allocated()
        for _ in range(tokens):
            started = time.perf_counter()
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return None
    finally:
        size_of_cache = cache.memory_bytes() if cache is not None else 0
        bits = cache.bits_per_element() if cache is not None and size_of_cache else None
        del cache
    return {
        "frames": frames,
        "prompt_tokens": prompt_tokens,
        "prompt_seconds": prompt_seconds,
        "token_ms": 1e3 * sorted(times)[len(times) // 2],
        "peak_bytes": peak,
        "cache_bytes": size_of_cache,
        "bits_per_element": bits,
    }


def search(model: Any, plan: str, guess: int, size: int, tokens: int, step: float, until: float) -> dict[str, Any]:
    """The longest clip that worked and the shortest that did not, within a factor of 1 + step or until the time is over."""
    best: dict[str, Any] | None = None
    low, high, frames = 0, None, guess
    tried = []
    while time.perf_counter() < until:
        frames = max(2, frames // 2 * 2)
        found = attempt(model, plan, frames, size, tokens)
        tried.append({"frames": frames, "fits": found is not None})
        print(plan, tried[-1], found and {k: round(v, 2) for k, v in found.items() if v}, flush=True)
        if found is None:
            high = frames
        else:
            best, low = found, frames
        if high is not None and (high <= 2 or high - low <= max(2, step * low)):
            break
        below = (low + high) // 2 if low and high else (high or 0) * 9 // 10
        frames = round(low * (1 + 4 * step)) if high is None else below
    return {"plan": plan, "predicted_frames": guess, "too_long": high, "tried": tried} | (best or {"frames": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=["bf16", "balanced", "kivi-2", "vidkv-1.5/1.66", "extreme"])
    parser.add_argument("--size", type=int, default=448, help="pixels of a frame's side")
    parser.add_argument("--tokens", type=int, default=8, help="to decode")
    parser.add_argument("--step", type=float, default=0.02)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    until = time.perf_counter() + 60 * args.minutes
    config = transformers.AutoConfig.from_pretrained(CONFIG)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    enable(model)
    memory = torch.cuda.get_device_properties(0).total_memory
    frame = tokens_per_frame(config, args.size, args.size)
    data = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": []}
    data |= {
        "model": CONFIG.name,
        "size": args.size,
        "tokens_per_frame": frame,
        "memory": memory,
        "weights": weights(config),
        "versions": versions(),
    }
    for plan in args.plans:
        if any(r["plan"] == plan for r in data["rows"]) or time.perf_counter() > until:
            continue
        guess = capacity(config, get_plan(plan), memory, frame, data["weights"]).frames or 2
        data["rows"].append(search(model, plan, guess, args.size, args.tokens, args.step, until))
        write_json(data, args.output)


if __name__ == "__main__":
    main()
