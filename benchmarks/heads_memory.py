"""What a GPU's allocator holds for a cache of random tokens at the shape of Llama-3.1-8B, for plans with fewer heads, fewer bits, and both.

    python benchmarks/heads_memory.py --output benchmarks/results/heads-memory.json

The cache is filled layer by layer with one prompt, without a model; attention itself is left out.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from bitsandheads import CachePlan, CompressedCache, HeadScores, compose, get_plan, rlkv
from bitsandheads.eval.environment import versions, write_json
from bitsandheads.eval.runs import commit
from bitsandheads.layer import ChunkMask

Q_HEADS, HEADS, DIM, LAYERS = 32, 8, 128, 32  # Llama-3.1-8B


def config(layers: int = LAYERS) -> Any:
    """The configuration that a cache is made for."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=Q_HEADS * DIM,
        num_hidden_layers=layers,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )


@torch.no_grad()
def allocated(plan: CachePlan, tokens: int, layers: int = LAYERS, device: str = "cuda") -> tuple[int, CompressedCache]:
    """Bytes that the allocator holds more once a cache under the plan has taken a random prompt of `tokens` tokens, and the cache."""
    gc.collect()
    torch.cuda.empty_cache()
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, DIM, generator=generator, device=device, dtype=torch.bfloat16)

    # everything that outlives one layer is made before the first reading: tables of kernels, workspaces of cuBLAS and cuSOLVER
    warm = CompressedCache(plan, config(1) if not plan.strict else config(layers))
    warm_layers = warm.compressed_layers()
    for layer in warm_layers[:2]:
        take(layer, random)
    del warm, warm_layers, layer
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    cache = CompressedCache(plan, config(layers))
    for layer in cache.compressed_layers():
        take(layer, random)
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before, cache


def take(layer: Any, random: Any) -> None:
    """One prompt through a layer."""
    layer.stage(random(HEADS), random(HEADS))
    layer.attend(random(Q_HEADS), ChunkMask(None, None), DIM**-0.5, lambda q, k, v: q[:, :, :1])


def plans(layers: int = LAYERS) -> list[CachePlan]:
    """bf16 first."""
    scores = HeadScores(np.random.default_rng(0).random((layers, HEADS)), method="random")
    bits = [get_plan(n) for n in ("bf16", "balanced", "extreme")]
    return [*bits, rlkv(scores, 0.5), *(compose(b, scores, 0.5) for b in bits[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a GPU: the bytes are those of its allocator")
    rows = []
    for plan in track(plans(), description="plans"):
        held, cache = allocated(plan, args.tokens)
        base = rows[0]["allocator_bytes"] if rows else held
        windowed, saved = cache.resolved.sparsity(args.tokens)
        row = {
            "plan": plan.name,
            "tokens": args.tokens,
            "allocator_bytes": held,
            "plan_bytes": cache.resolved.bytes_for(args.tokens),
            "in_use_bytes": cache.memory_bytes(),
            "times_smaller": base / held,
            "windowed_heads": windowed,
            "bytes_saved": saved,
        }
        rows.append(row)
        del cache
        print(f"{plan.name:28} {held / 2**20:8.1f} MiB by the allocator, {row['plan_bytes'] / 2**20:8.1f} by the plan, 1/{base / held:.1f}")
    shape = {"layers": LAYERS, "q_heads": Q_HEADS, "kv_heads": HEADS, "head_dim": DIM}
    write_json({"shape": shape, "rows": rows, "versions": versions(), "commit": commit()}, args.output)


if __name__ == "__main__":
    main()
