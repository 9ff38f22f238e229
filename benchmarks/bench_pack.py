"""Packing and appending for one layer on one GPU: the kernels, and everything that a prompt costs.

"pack" rows: one launch over the keys and one over the values of a prompt, as CUDA graph replays of at least 12 launches over tokens that rotate
over at least 200 MB; the basis is known. "prompt" rows: all that follows the attention of a prompt (attention mass, moments, eigenvectors, packing, map
back, the copy of the residual): `us` as in a prefill, where the host is ahead and the device does not wait for it (CUDA events around prompts that were
queued behind other work), `clock_us` by the clock for one prompt on an idle device. "append" rows: one token for all heads. `profile`: the kernels of
one prompt. Writes JSON.

    python benchmarks/bench_pack.py --out benchmarks/results/pack-h100.json [--quick]
"""

import argparse
import datetime
import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from bench_decode import DEVICE, DIM, SHAPES, roofline, timed

from bitsandheads import ops
from bitsandheads.methods import get_plan
from bitsandheads.ops.append import Growing
from bitsandheads.quant.codec import HalfCodec
from bitsandheads.quant.tile import TileLayout
from bitsandheads.stores.base import Prompt
from bitsandheads.stores.packed import RECENT_QUERIES, PackedStore

PACKED = (
    ("balanced", "cuda"), ("balanced", "triton"), ("extreme", "cuda"), ("extreme", "triton"), ("kivi-2", "triton"), ("vidkv-1.5/1.58", "triton")
)  # fmt: skip
ROTATED = 200e6


def tokens_like(batch: int, kv_heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, kv_heads, tokens, DIM, device=DEVICE, dtype=torch.bfloat16)


def pack_row(plan: str, backend: str, q_heads: int, kv_heads: int, batch: int, tokens: int, read: float, once: bool = False) -> dict:
    quant = get_plan(plan).groups[0].quant
    layout, tiles_each = TileLayout.of(quant, DIM), tokens // quant.tile - 2
    most = tiles_each
    xs = [tokens_like(batch, kv_heads, tokens) for _ in range(max(2, -(-int(ROTATED) // (2 * batch * kv_heads * tokens * DIM))))]
    tiles = torch.zeros(batch, kv_heads, most, layout.nbytes, dtype=torch.uint8, device=DEVICE)
    jobs = torch.tensor([[quant.sink] * batch, [most] * batch, [0] * batch], dtype=torch.int32, device=DEVICE)
    weight = torch.rand(batch, kv_heads, most * quant.tile, device=DEVICE) + 0.5
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    heavy = torch.arange(1, quant.heavy + 1, dtype=torch.int32, device=DEVICE) * (tokens // (quant.heavy + 2))
    skip = heavy.expand(batch, kv_heads, -1).contiguous() if quant.heavy else None
    total, rows = [0.0, 0.0, 0.0], {}
    for which, half in (("keys", layout.keys), ("values", layout.values)):
        basis = HalfCodec(half).find_basis(xs[0][:, :, :1024].float(), torch.ones(batch, kv_heads, DIM, device=DEVICE))
        own = weight if half.spec.attention_weight else None
        calls = [
            partial(ops.pack, x, tiles, jobs, most, layout, which, basis, skip=skip, weight=own, status=status, backend=backend) for x in xs
        ]
        if once:
            calls[0]()
            continue
        times = clock(calls[0], 3) if backend == "reference" else timed(calls, least=12, repeats=9)
        rows[which + "_us"] = times[0]
        total = [a + b for a, b in zip(total, times, strict=True)]
    if once:
        return {}
    size = 2 * batch * kv_heads * most * quant.tile * DIM * 2
    once = size / read * 1e6
    return row("pack", plan, backend, batch, tokens, total) | rows | {"bytes": size, "read_once_us": once, "ratio": total[0] / once}


def clock(call: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Microseconds by the clock: median, low, high."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    times.sort()
    return times[len(times) // 2], times[0], times[-1]


def behind(call: Callable[[], object], repeats: int, times: int = 3) -> tuple[float, float, float]:
    """Microseconds of the device for a call, when the host is ahead of it: median, low, high."""
    busy = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(30):  # about 40 ms
            busy @ busy
        begin.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / times)
    found.sort()
    return found[len(found) // 2], found[0], found[-1]


def row(what: str, plan: str, backend: str, batch: int, tokens: int, us: tuple[float, ...] | list[float]) -> dict:
    return {
        "what": what,
        "plan": plan,
        "backend": backend,
        "batch": batch,
        "tokens": tokens,
        "us": us[0],
        "us_low": us[1],
        "us_high": us[2],
    }


def prompt(plan: str, backend: str, q_heads: int, kv_heads: int, batch: int, tokens: int) -> tuple[Callable[[], None], int]:
    """What follows a prompt's attention, for tokens with principal axes of falling variance, and the bytes of its keys and values."""
    quant = get_plan(plan).groups[0].quant
    mix = torch.randn(DIM, DIM, device=DEVICE) * torch.logspace(0, -1.5, DIM, device=DEVICE)
    k, v = ((torch.randn(batch, kv_heads, tokens, DIM, device=DEVICE) @ mix / 4).bfloat16() for _ in range(2))
    queries = torch.randn(batch, kv_heads, q_heads // kv_heads, RECENT_QUERIES, DIM, device=DEVICE, dtype=torch.bfloat16)
    given = Prompt(queries, torch.ones(batch, RECENT_QUERIES, device=DEVICE), DIM**-0.5, padded=False)

    def call() -> None:
        store = PackedStore(tuple(range(kv_heads)), k, v, quant, backend)
        store.append(k, v, None)
        store.compress(given)

    return call, k.nbytes + v.nbytes


def prompt_row(plan: str, backend: str, q_heads: int, kv_heads: int, batch: int, tokens: int, read: float, once: bool = False) -> dict:
    call, size = prompt(plan, backend, q_heads, kv_heads, batch, tokens)
    if once:
        call()
        return {}
    clocked = clock(call, 3 if backend == "reference" else 7)
    us = clocked if backend == "reference" else behind(call, 5)
    return row("prompt", plan, backend, batch, tokens, us) | {"clock_us": clocked[0], "bytes": size, "read_once_us": size / read * 1e6}


def profile(plan: str, backend: str, q_heads: int, kv_heads: int, batch: int, tokens: int) -> list[dict]:
    """Microseconds of the device and launches of every kernel of a prompt, the longest first."""
    call, _ = prompt(plan, backend, q_heads, kv_heads, batch, tokens)
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA and e.self_device_time_total]
    rows = [{"kernel": e.key, "us": e.self_device_time_total, "launches": e.count} for e in kernels]
    return sorted(rows, key=lambda r: -r["us"])


def append_row(plan: str, backend: str, q_heads: int, kv_heads: int, batch: int, tokens: int, read: float) -> dict:
    k = tokens_like(batch, kv_heads, 1)

    def store(heads: tuple[int, ...], held: int, limit: int, leave: int) -> Growing:
        tail = [tokens_like(batch, len(heads), limit + 8) for _ in range(2)]
        counts = torch.tensor([[0] * batch, [1] * batch, [held] * batch, [limit] * batch], dtype=torch.int32, device=DEVICE)
        return Growing(heads, tail[0], tail[1], counts, leave)

    stores = [store(tuple(range(0, kv_heads, 2)), 128, 256, 128), store(tuple(range(1, kv_heads, 2)), 272, 288, -272)]
    us = timed([lambda: ops.append(k, k, stores)], least=64, repeats=9)
    return row("append", plan, backend, batch, tokens, us) | {"bytes": 2 * k.nbytes * 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--quick", action="store_true", help="one model, one batch")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop taking new rows after this long")
    options = parser.parse_args()
    begin, read = time.time(), roofline()
    import triton

    git = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True)
    report = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(), "commit": git.stdout.strip() or None, "read_bytes_per_second": read, "rows": [],
    }  # fmt: skip
    jobs: list[tuple[str, partial[dict]]] = []
    for model, (q_heads, kv_heads) in list(SHAPES.items())[: 1 if options.quick else None]:
        shape = (q_heads, kv_heads)
        for batch, tokens in ((1, 32768), (8, 4096)) if not options.quick else ((1, 32768),):
            for plan, backend in PACKED:
                jobs.append((model, partial(prompt_row, plan, backend, *shape, batch, tokens, read)))
                jobs.append((model, partial(pack_row, plan, backend, *shape, batch, tokens, read)))
        jobs += [(model, partial(append_row, "balanced, half windowed", "triton", *shape, b, 1, read)) for b in (1, 8, 32)]
        jobs.append((model, partial(pack_row, "balanced", "reference", *shape, 1, 32768, read)))
        jobs.append((model, partial(prompt_row, "balanced", "reference", *shape, 1, 32768, read)))
    torch.linalg.eigh(torch.eye(2, device=DEVICE))  # PyTorch's linear algebra must not be loaded by several threads at once
    with ThreadPoolExecutor(12) as pool:  # kernels are compiled side by side
        first = [job for _, job in jobs if job.func in (pack_row, prompt_row) and "reference" not in job.args]
        list(pool.map(lambda job: job(once=True), first))
    model, shape = next(iter(SHAPES.items()))
    report["profile"] = {"model": model, "plan": "balanced", "tokens": 32768, "kernels": profile("balanced", "cuda", *shape, 1, 32768)}
    for model, job in jobs:
        if time.time() - begin > options.seconds:
            break
        new = {"model": model} | job()
        report["rows"].append(new)
        ratio = (
            f" {new['ratio']:.2f} times one read" if "ratio" in new else f" by the clock {new['clock_us']:.0f}" if "clock_us" in new else ""
        )
        where = f"{model[:12]:12} {new['what']:7} {new['plan']:24} {new['backend']:10} B{new['batch']:<3} {new['tokens']:6}"
        print(f"{where} {new['us']:9.1f} us [{new['us_low']:.1f}-{new['us_high']:.1f}]{ratio}", flush=True)
        torch.cuda.empty_cache()
        with open(options.out + ".new", "w") as f:
            json.dump(report, f, indent=1)
        os.replace(options.out + ".new", options.out)


if __name__ == "__main__":
    main()
