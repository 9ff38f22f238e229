"""The CUDA decode kernel on a CPU: its source, with the section of PTX instructions replaced by C++ that does the same (emulator/), compiled for the CPU
and launched with the arguments that the GPU would get. Shows wrong results, misaligned accesses and threads that wait in vain; not races, not speed."""

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitsandheads.methods import get_plan
from bitsandheads.ops import cuda_decode, reference
from bitsandheads.ops.synthetic import head_set
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant

HERE = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
BALANCED = get_plan("balanced").groups[0].quant
EXTREME = get_plan("extreme").groups[0].quant
FINE = KVQuant(
    TensorQuant((AxisClass(4, 1.0),), transform="hadamard"), TensorQuant((AxisClass(3, 0.5), AxisClass(1, 0.5))), tile=64, group_size=32
)
TERNARY = get_plan("vidkv-1.5/1.58").groups[0].quant
MIXED = KVQuant(  # ternary axes between others, a group for each tile of 64 tokens, fp8 steps
    TensorQuant((AxisClass(2, 1.0),)), TensorQuant((AxisClass(2, 0.25), AxisClass("ternary", 0.5, levels="ternary", centre=False), AxisClass(1, 0.25))),
    tile=64, group_size=64, metadata="fp8",
)  # fmt: skip
KIVI = get_plan("kivi-2-sink").groups[0].quant
THREE_BITS = KVQuant(  # values for each token without centres, in both planes
    TensorQuant((AxisClass(2, 1.0),)), TensorQuant((AxisClass(3, 1.0, centre=False),), per="token"), tile=64, group_size=32, metadata="fp8"
)
ONE_BIT = KVQuant(TensorQuant((AxisClass(2, 1.0),)), TensorQuant((AxisClass(1, 1.0, "minmax"),), per="token"), tile=32, group_size=32)
SMALL = KVQuant(TensorQuant((AxisClass(2, 1.0),)), TensorQuant((AxisClass(2, 1.0),)), tile=32, group_size=32, metadata="fp8")


def _compile(text: str, folder: Path) -> ctypes.CDLL:
    start, end = text.index("// ---- instructions ---"), text.index("// ---- the plan ---")
    text = text[:start] + (HERE / "instructions.h").read_text() + text[end:]
    text = re.sub(r'asm volatile\("(mbarrier\.init|fence)[^;]*;" ?[^;]*;', ";", text).replace(
        "extern __shared__ __align__(128) u8 memory[];", ""
    )
    assert "asm" not in text
    text = (HERE / "threads.h").read_text() + text + (HERE / "launch.h").read_text()
    source = folder / (hashlib.sha256(text.encode()).hexdigest()[:16] + ".cpp")
    library = source.with_suffix(".so")
    if not library.exists():
        source.write_text(text)
        subprocess.run(
            [str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fno-gnu-unique", "-o", str(library), str(source)], check=True
        )
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], None]:
    """Run the CUDA backend on the CPU, as a GPU of so many multiprocessors."""
    folder = tmp_path_factory.getbasetemp()

    @lru_cache
    def kernels(layout, dim, dtype, group, n_query, many, device, multiprocessors: int) -> cuda_decode.Kernels:
        library = _compile(cuda_decode.source(layout, dim, dtype, group, n_query, many), folder)
        merge = library.launch_merge_1, library.launch_merge_4
        return cuda_decode.Kernels(library.launch_attend, merge, multiprocessors, cuda_decode._shape(layout, many)[0] * 32, 0)

    def start(function: Any, grid: int, threads: int, shared: int, stream: int, arguments: Any, early: bool) -> None:
        assert not function(ctypes.c_void_p(arguments[0]), grid, threads), "threads wait for each other in vain"

    def install(multiprocessors: int) -> None:
        monkeypatch.setattr(cuda_decode, "kernels", partial(kernels, multiprocessors=multiprocessors))
        monkeypatch.setattr(cuda_decode, "_start", start)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=multiprocessors))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    return install


def check(sets: list, q_heads: int, queries: int = 1, dim: int = 128, dtype: torch.dtype = torch.bfloat16, hidden=None) -> None:
    q = torch.randn(sets[0].tail_k.shape[0], q_heads, queries, dim).to(dtype)
    out, lse = cuda_decode.decode_attention(q, sets, dim**-0.5, hidden)
    want, want_lse = reference.decode_attention(q.double(), sets, dim**-0.5, hidden, torch.float64)
    rounded = (want.to(dtype).double() - want).norm() / want.norm()
    assert (out.double() - want).norm() / want.norm() < rounded + 1e-3
    assert (lse - want_lse).abs().max() < 2e-3 * max(1.0, want_lse.abs().max().item())


def heads(quant: KVQuant | None, dim: int, kv: tuple[int, ...], sinks: list[int], tiles: list[int], tails: list[int], **more: Any):
    return head_set(quant, dim, kv, sinks, tiles, tails, device="cpu", **more)


@pytest.mark.parametrize("many_tiles", [0, 1 << 30], ids=["many tiles", "few tiles"])
@pytest.mark.parametrize("multiprocessors", [1, 6])
def test_ragged(emulate, monkeypatch: pytest.MonkeyPatch, many_tiles: int, multiprocessors: int) -> None:
    """Both sizes of the kernel; heads that share CTAs and heads with CTAs of their own, one of them without a tile."""
    emulate(multiprocessors)
    monkeypatch.setattr(cuda_decode, "MANY_TILES", many_tiles)
    monkeypatch.setattr(cuda_decode, "MANY_HEADS", 1 if many_tiles else 1 << 30)
    check([heads(BALANCED, 128, (0, 1), [6, 0], [30, 0], [70, 1])], 14)


def test_whole_precision_apart(emulate) -> None:
    """A head with so many CTAs that some take whole-precision tokens alone."""
    emulate(16)
    check([heads(BALANCED, 128, (0,), [6], [26], [200])], 7)


def test_many_partial_results(emulate, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(44)
    monkeypatch.setattr(cuda_decode, "MANY_HEADS", 1)
    check([heads(BALANCED, 64, (0,), [6], [75], [20])], 7, dim=64)


def test_windows_and_query_tokens(emulate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and windowed heads, 8 tokens of 4 query heads (4 blocks of query rows), some of the newest tokens hidden."""
    emulate(5)
    monkeypatch.setattr(cuda_decode, "MANY_HEADS", 1)
    hidden = torch.arange(8).flip(0).expand(2, -1) + 2
    window = heads(None, 64, (1,), [4, 4], [0, 0], [40, 50], window=30)
    check([heads(BALANCED, 64, (0,), [6, 6], [3, 1], [14, 17]), window], 8, 8, dim=64, hidden=hidden)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [(EXTREME, torch.bfloat16), (FINE, torch.bfloat16), (SMALL, torch.float16), (TERNARY, torch.bfloat16), (MIXED, torch.bfloat16)],
    ids=["extreme", "fine", "small", "ternary", "mixed"],
)
def test_layouts(emulate, quant: KVQuant, dtype: torch.dtype) -> None:
    emulate(3)
    check([heads(quant, 128, (0,), [3, 0], [5, 2], [20, 7], dtype=dtype)], 4, dtype=dtype)


@pytest.mark.parametrize("quant", [KIVI, THREE_BITS, ONE_BIT], ids=["kivi", "three bits", "one bit"])
@pytest.mark.parametrize("dim", [64, 128])
def test_values_for_each_token(emulate, quant: KVQuant, dim: int) -> None:
    emulate(3)
    check([heads(quant, dim, (0,), [3, 0], [5, 2], [20, 7])], 4, dim=dim)


@pytest.mark.parametrize("size", [1e-6, 3e3])
def test_values_for_each_token_of_many_sizes(emulate, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Steps that are subnormal in fp16, and such that overflow it times a probability; some tokens a thousand times smaller than others. Seven warps."""
    emulate(2)
    monkeypatch.setattr(cuda_decode, "MANY_TILES", 0)
    keys, values = torch.randn(2, 1, 1, 384, 128)
    values *= size
    values[:, :, ::5] *= 1e-3
    check([heads(KIVI, 128, (0,), [0], [3], [0], packed=(keys, values))], 4)


def test_salient_tokens(emulate) -> None:
    """Tiles whose values have other codes beside ternary ones; one sequence has none, a windowed head never."""
    emulate(4)
    one = heads(TERNARY, 128, (0, 2), [3, 0], [5, 2], [20, 7])
    better = replace(TERNARY, values=replace(TERNARY.values, classes=(AxisClass(2, 1.0),)))
    one.extra = (heads(better, 128, (0, 2), [0, 0], [2, 0], [0, 0], seed=1),)
    check([one, heads(None, 128, (1,), [4, 4], [0, 0], [40, 50], window=30)], 12)


def test_without_tiles(emulate) -> None:
    emulate(5)
    check([heads(None, 128, (0,), [0, 0], [0, 0], [300, 7])], 16)


def test_small_heads_on_a_line_beside_large_ones(emulate) -> None:
    """Two long sequences take CTAs of their own; the heads of a short one and those with windows, between them in number, share the others."""
    emulate(9)
    window = heads(None, 64, (1,), [4, 4, 4], [0, 0, 0], [40, 50, 70], window=30)
    check([heads(BALANCED, 64, (0,), [6, 6, 0], [1, 40, 38], [14, 17, 60]), window], 8, dim=64)


def test_both_kinds_in_a_large_part(emulate) -> None:
    """CTAs with so many units that the one with whole-precision tokens takes fewer tiles."""
    emulate(2)
    check([heads(BALANCED, 64, (0,), [6], [140], [120])], 7, dim=64)
