"""One layer's decode attention: our packed kernels against the best bf16 kernels, on one GPU.

Times are medians over replays of a CUDA graph of at least 16 launches whose inputs rotate over at least 200 MB (so that nothing is read from
L2), divided by the launches. Everything a step needs is inside: rotating queries and outputs, the gather into slots, 6 sink tokens and a
tail of 192. Appending the new token is not (it is a copy of 512 bytes for each head). Writes JSON rows.

FlashAttention-3 is compared when its library is given: the file vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so of the vllm 0.22.1 wheel.

    python benchmarks/bench_decode.py --out benchmarks/results/decode-h100.json [--quick] [--flash3 _vllm_fa3_C.abi3.so]
"""

import argparse
import datetime
import json
import math
import subprocess
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bitsandheads.methods import get_plan
from bitsandheads.ops import cuda_decode, reference, triton_decode
from bitsandheads.ops.synthetic import head_set

ROTATED = 220e6
SINK, TAIL, DIM = 6, 192, 128
SDPA = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
SHAPES = {"Qwen2.5-VL-7B": (28, 4), "Llama-3.1-8B / Qwen3-4B": (32, 8)}
DEVICE = torch.device("cuda")


def timed(calls: list[Callable[[], object]], least: int = 16, repeats: int = 9) -> tuple[float, float, float]:
    """Microseconds of one launch: median, low, high."""
    launches = max(least, len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / launches)
    times.sort()
    return times[len(times) // 2], times[1], times[-2]


def roofline() -> float:
    """Bytes per second of the fastest read: a sum over 2 GB."""
    x = torch.empty(1 << 29, dtype=torch.float32, device=DEVICE).normal_()
    return x.nbytes / timed([lambda: x.sum()])[0] * 1e6


def sets_for(plan: str, kv_heads: int, batch: int, context: int, seed: int, ragged: bool):
    quant = get_plan("balanced" if plan == "balanced, half windowed" else plan).groups[0].quant
    lengths = [context - (b * context // (2 * batch) if ragged else 0) for b in range(batch)]
    if quant is None:
        return [head_set(None, DIM, tuple(range(kv_heads)), [0] * batch, [0] * batch, lengths, seed=seed)]
    tiles = [(n - SINK - TAIL) // quant.tile for n in lengths]
    full = tuple(range(0, kv_heads, 2)) if plan.endswith("windowed") else tuple(range(kv_heads))
    sets = [head_set(quant, DIM, full, [SINK] * batch, tiles, [TAIL] * batch, seed=seed)]
    if len(full) < kv_heads:
        rest = tuple(range(1, kv_heads, 2))
        sets.append(head_set(None, DIM, rest, [SINK] * batch, [0] * batch, [TAIL] * batch, seed=seed, window=TAIL))
    return sets


def bytes_of(sets) -> int:
    total = 0
    for s in sets:
        sinks, tiles, tails = s.lengths.sum(1).tolist()
        total += len(s.kv_heads) * ((sinks + tails) * DIM * 4 + (tiles * s.layout.nbytes if s.layout else 0))
        total += sum(b["axes"].nbytes for b in (s.key_basis, s.value_basis) if "axes" in b)
    return total


def packed_row(plan: str, backend: str, q_heads: int, kv_heads: int, batch: int, context: int, ragged: bool = False) -> dict:
    q = torch.randn(batch, q_heads, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    first = sets_for(plan, kv_heads, batch, context, 0, ragged)
    size = bytes_of(first)
    copies = [first] + [sets_for(plan, kv_heads, batch, context, i, ragged) for i in range(1, min(24, math.ceil(ROTATED / size)))]
    op = {"cuda": cuda_decode, "triton": triton_decode}[backend].decode_attention
    us, low, high = timed([lambda s=s: op(q, s, DIM**-0.5) for s in copies])
    return {"plan": plan + (", ragged" if ragged else ""), "backend": backend, "us": us, "us_low": low, "us_high": high, "bytes": size}


def sdpa_row(name: str, kernel: SDPBackend, q_heads: int, kv_heads: int, batch: int, context: int) -> dict:
    q = torch.randn(batch, q_heads, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    size = 4 * batch * kv_heads * context * DIM
    make = lambda: torch.randn(batch, kv_heads, context, DIM, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    copies = [(make(), make()) for _ in range(min(24, math.ceil(ROTATED / size)))]
    with sdpa_kernel(kernel):
        us, low, high = timed([lambda k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in copies], repeats=7)
    return {"plan": "bf16", "backend": name, "us": us, "us_low": low, "us_high": high, "bytes": size}


def flash3_row(dtype: torch.dtype, q_heads: int, kv_heads: int, batch: int, context: int) -> dict:
    """FlashAttention-3 on a contiguous cache in bf16 or fp8 (e4m3), the best of several numbers of splits (0: its own choice)."""
    fp8 = dtype == torch.float8_e4m3fn
    fwd = torch.ops._vllm_fa3_C.fwd
    make = lambda *shape: torch.randn(*shape, DIM, device=DEVICE, dtype=torch.bfloat16).to(dtype)  # noqa: E731
    q = make(batch, 1, q_heads)
    size = 2 * q.element_size() * batch * kv_heads * context * DIM
    copies = [(make(batch, context, kv_heads), make(batch, context, kv_heads)) for _ in range(min(24, math.ceil(ROTATED / size)))]
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    scales = [torch.ones(batch, kv_heads, device=DEVICE)] * 3 if fp8 else [None] * 3

    def call(k: torch.Tensor, v: torch.Tensor, splits: int) -> torch.Tensor:
        # k_new, v_new, q_v, out; cu_seqlens (3), seqused (q, k); max_seqlen (2); page table, batch index, left padding, rotary (3)
        before = (None,) * 4, (None,) * 4, (lengths,), (None,) * 8
        after = (*scales, DIM**-0.5, False, -1, -1, 0.0, True, None, splits, None, 0, None, 1, 0, None)
        return fwd(q, k, v, *(x for part in before for x in part), *after)[0]

    k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in copies[0])
    want = scaled_dot_product_attention(q.to(torch.bfloat16).transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)
    error = ((call(*copies[0], 0) - want).float().norm() / want.float().norm()).item()
    assert error < 0.1, f"FlashAttention-3 is called wrongly: relative error {error}"
    del k, v, want
    rows = [(*timed([partial(call, *c, splits) for c in copies], repeats=5), splits) for splits in (0, 8, 32)]
    us, low, high, splits = min(rows)
    return {
        "plan": "fp8" if fp8 else "bf16",
        "backend": "FlashAttention-3",
        "us": us,
        "us_low": low,
        "us_high": high,
        "bytes": size,
        "splits": splits,
    }


def unpack_row(q_heads: int, kv_heads: int, batch: int, context: int) -> dict:
    """What a cache without a fused kernel does: restore everything, then SDPA."""
    q = torch.randn(batch, q_heads, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    (s,) = sets_for("balanced", kv_heads, batch, context, 0, False)

    def call() -> torch.Tensor:
        k, v = (x.bfloat16() for x in reference.unpack_tiles(s))
        return scaled_dot_product_attention(q, torch.cat([k, s.tail_k], 2), torch.cat([v, s.tail_v], 2), enable_gqa=True)

    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    times.sort()
    return {
        "plan": "balanced",
        "backend": "unpack, then SDPA",
        "us": times[2],
        "us_low": times[0],
        "us_high": times[-1],
        "bytes": bytes_of([s]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--flash3", help="library of FlashAttention-3")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--few", action="store_true", help="three shapes only of the models after the first")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop taking new rows after this long")
    options = parser.parse_args()
    if options.flash3:
        torch.ops.load_library(options.flash3)
    start = time.time()
    read = roofline()
    git = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True)
    import triton

    report = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(), "commit": git.stdout.strip() or None, "read_bytes_per_second": read, "rows": [],
    }  # fmt: skip
    print(f"{report['gpu']}: {read / 1e12:.2f} TB/s read")
    points = [(b, n) for n in (131072, 32768, 8192) for b in (8, 1, 32)]
    if options.quick:
        points = [(1, 8192), (1, 32768), (8, 32768), (1, 131072), (8, 131072)]
    for model, (q_heads, kv_heads) in SHAPES.items():
        few = options.few and not model.startswith("Qwen2")
        for batch, context in [(8, 131072), (1, 32768), (8, 32768)] if few else points:
            if time.time() - start > options.seconds or (options.quick and not model.startswith("Qwen2")):
                continue
            shape = (q_heads, kv_heads, batch, context)
            rows = []
            jobs = [partial(sdpa_row, name, kernel, *shape) for name, kernel in SDPA.items()]
            jobs += [partial(packed_row, plan, backend, *shape) for plan in ("bf16", "balanced") for backend in ("cuda", "triton")]
            jobs += [partial(packed_row, plan, "cuda", *shape) for plan in ("balanced, half windowed", "extreme")]
            jobs += [partial(packed_row, plan, "cuda", *shape, ragged=True) for plan in ("bf16", "balanced")]
            if options.flash3:
                jobs += [partial(flash3_row, dtype, *shape) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
            if batch * context <= 1 << 18 and not options.quick:
                jobs.append(partial(unpack_row, *shape))
            for job in jobs:
                try:
                    rows.append(job())
                except Exception as e:  # a kernel that a library lacks for this shape is a row without a time
                    print(f"  no row: {type(e).__name__}: {str(e)[:160]}")
                torch.cuda.empty_cache()
            least = {plan: min((r["us"] for r in rows if r["plan"] == plan), default=None) for plan in ("bf16", "bf16, ragged", "fp8")}
            for row in rows:
                ragged = row["plan"].endswith("ragged")  # fewer tokens than in the other rows
                best, fp8 = (least["bf16, ragged"], None) if ragged else (least["bf16"], least["fp8"])
                speedup = best / row["us"] if best else None
                row |= {"model": model, "batch": batch, "context": context, "best_bf16_us": best, "fp8_us": fp8, "speedup": speedup}
                row["share_of_read"] = row["bytes"] / row["us"] * 1e6 / read
                report["rows"].append(row)
                where = f"{model[:12]:12} B{batch:<3} {context // 1024:4}K {row['plan']:24} {row['backend']:18}"
                spread = f"{row['us']:8.1f} us [{row['us_low']:.1f}-{row['us_high']:.1f}]"
                print(f"{where} {spread} {row['bytes'] / row['us'] / 1e6:5.2f} TB/s {f'{speedup:5.2f}x' if speedup else '-'}", flush=True)
            with open(options.out, "w") as f:
                json.dump(report, f, indent=1)


if __name__ == "__main__":
    main()
