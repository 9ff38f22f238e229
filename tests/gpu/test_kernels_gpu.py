"""The GPU kernels against the reference in float64 on the same bytes. Run on a GPU machine: pytest -m gpu tests/gpu."""

from dataclasses import replace

import pytest
import torch
from real_caches import real_caches
from test_decode_cuda import KIVI, THREE_BITS
from test_kernels_triton import TRITS
from test_restore import CASES
from test_restore import check as check_restored

from bitsandheads.methods import get_plan
from bitsandheads.ops import backends, decode_attention, long_chunks, reference
from bitsandheads.ops.chunks import attend_chunk
from bitsandheads.ops.synthetic import head_set
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BALANCED = get_plan("balanced").groups[0].quant
MINMAX = KVQuant(TensorQuant((AxisClass(2, 1.0, "minmax"),)), TensorQuant((AxisClass(2, 1.0),)))
FINE = KVQuant(
    TensorQuant((AxisClass(4, 1.0),), transform="hadamard"), TensorQuant((AxisClass(3, 0.5), AxisClass(1, 0.5))), tile=64, group_size=32
)
SMALL = KVQuant(TensorQuant((AxisClass(2, 1.0),)), TensorQuant((AxisClass(2, 1.0),)), tile=32, group_size=32, metadata="fp8")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if why := backends.why_not(request.param, torch.device("cuda")):
        pytest.skip(why)
    return request.param


def check(
    backend: str, sets, q_heads: int, queries: int = 1, dim: int = 128, dtype=torch.bfloat16, worst: float = 1e-3, hidden=None
) -> None:
    batch = sets[0].tail_k.shape[0]
    q = torch.randn(batch, q_heads, queries, dim, device="cuda").to(dtype)
    out, lse = decode_attention(q, sets, dim**-0.5, hidden, backend)
    again, lse_again = decode_attention(q, sets, dim**-0.5, hidden, backend)
    want, want_lse = reference.decode_attention(q.double(), sets, dim**-0.5, hidden, torch.float64)
    rounded = ((want.to(dtype).double() - want).norm() / want.norm()).item()  # what writing the exact result in `dtype` costs
    error = ((out.double() - want).norm() / want.norm()).item()
    assert error < rounded + worst, (error, rounded)
    assert (lse - want_lse).abs().max() < 2e-3 * max(1.0, want_lse.abs().max().item())
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("dim", [64, 128])
def test_groups(backend: str, group: int, dim: int) -> None:
    check(backend, [head_set(BALANCED, dim, (0, 1), [6, 5], [9, 3], [140, 1])], 2 * group, dim=dim)


@pytest.mark.parametrize("tails", [[0, 1], [15, 16], [17, 127], [128, 255]])
@pytest.mark.parametrize("tiles", [[1, 0], [2, 31], [64, 7]])
def test_lengths(backend: str, tails: list[int], tiles: list[int]) -> None:
    check(backend, [head_set(BALANCED, 128, (0, 1, 2), [6, 6], tiles, tails)], 21)


@pytest.mark.parametrize(
    "quant", [MINMAX, FINE, SMALL, KIVI, THREE_BITS], ids=["minmax", "fine", "small tiles", "kivi", "three bits a token"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layouts(backend: str, quant: KVQuant, dtype: torch.dtype) -> None:
    check(backend, [head_set(quant, 128, (0, 1), [32, 0], [9, 3], [140, 7], dtype)], 8, dtype=dtype)


@pytest.mark.parametrize("preset", ["balanced", "extreme", "vidkv-1.25/1.58", "vidkv-1.5/1.58", "vidkv-2/1.58", "vidkv-2/2"])
def test_presets(preset: str) -> None:
    quant = get_plan(preset).groups[0].quant
    check("auto", [head_set(quant, 128, (0, 1), [32, 0], [9, 3], [140, 7])], 8)


def test_salient_tokens(backend: str) -> None:
    """Tiles whose values have other codes beside ternary ones; one sequence has none, a windowed head never."""
    quant = get_plan("vidkv-1.5/1.66").groups[0].quant
    one = head_set(quant, 128, (0, 2), [3, 0], [9, 3], [140, 7])
    better = replace(quant, values=replace(quant.values, classes=(AxisClass(2, 1.0),)))
    one.extra = (head_set(better, 128, (0, 2), [0, 0], [4, 0], [0, 0], seed=1),)
    check(backend, [one, head_set(None, 128, (1,), [4, 4], [0, 0], [60, 40], window=30)], 21)


@pytest.mark.parametrize("group", [4, 12])
@pytest.mark.parametrize("tile", [128, 32, 16])
def test_trits_beside_other_codes(tile: int, group: int) -> None:
    """Ternary keys and values, in tiles whose words hold one slot and several, for one warp and for four."""
    quant = replace(TRITS, tile=tile, group_size=min(tile, 32))
    check("triton", [head_set(quant, 64, (0, 1), [6, 0], [33, 2], [140, 7])], 2 * group, dim=64)


@pytest.mark.parametrize("queries", [2, 4, 8])
def test_query_tokens(backend: str, queries: int) -> None:
    sets = [head_set(BALANCED, 128, (0, 2), [6, 6], [9, 3], [140, 17]), head_set(None, 128, (1, 3), [4, 4], [0, 0], [60, 40], window=30)]
    check(backend, sets, 16, queries)
    hidden = torch.arange(queries, device="cuda").flip(0).expand(2, -1) + 2
    check(backend, sets, 16, queries, hidden=hidden)


def test_windows_and_whole_heads(backend: str) -> None:
    sets = [
        head_set(BALANCED, 128, (0, 3), [6, 0], [300, 44], [140, 255]),
        head_set(None, 128, (1,), [4, 4], [0, 0], [300, 200], window=256),
    ]
    check(backend, [*sets, head_set(None, 128, (2,), [0, 0], [0, 0], [5000, 7])], 28)


@pytest.mark.parametrize("transform", ["none", "principal"])
def test_outliers(backend: str, transform: str) -> None:
    quant = KVQuant(
        TensorQuant((AxisClass(2, 1.0, "minmax"),), transform=transform), TensorQuant((AxisClass(2, 1.0),), transform=transform)
    )
    x = torch.randn(2, 2, 1280, 128, device="cuda")
    x[..., 5] *= 1000
    x[..., 9] = 1000.0
    check(backend, [head_set(quant, 128, (0, 1), [32, 32], [10, 10], [140, 255], packed=(x, x))], 8, worst=5e-3)


@pytest.mark.parametrize("dim", [80, 96, 256])
def test_other_head_dims(dim: int) -> None:
    check("auto", [head_set(BALANCED, dim, (0, 1), [6, 5], [9, 3], [140, 1])], 8, dim=dim)


def test_graph_with_changing_lengths(backend: str) -> None:
    s = head_set(BALANCED, 128, (0, 1, 2, 3), [6, 6], [40, 40], [200, 200])
    q = torch.randn(2, 28, 1, 128, device="cuda", dtype=torch.bfloat16)
    decode_attention(q, [s], 0.1, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode_attention(q, [s], 0.1, backend=backend)
    for tiles, tails in (([40, 3], [200, 1]), ([1, 17], [7, 128])):
        s.lengths.copy_(torch.tensor([[6, 2], tiles, tails]))
        graph.replay()
        want, _ = reference.decode_attention(q.double(), [s], 0.1, dtype=torch.float64)
        assert ((out.double() - want).norm() / want.norm()) < 3e-3


def test_real_caches(backend: str) -> None:
    """What SmolLM2-135M held in three layers under two plans."""
    for name, q, heads in real_caches("cuda"):
        out, lse = decode_attention(q, [heads], 0.125, backend=backend)
        want, want_lse = reference.decode_attention(q.double(), [heads], 0.125, dtype=torch.float64)
        rounded = (want.to(q.dtype).double() - want).norm() / want.norm()
        assert ((out.double() - want).norm() / want.norm()) < rounded + 1e-3, name
        assert (lse - want_lse).abs().max() < 5e-3, name


def test_compiled_without_a_graph_break(backend: str) -> None:
    s = head_set(BALANCED, 128, (0, 1), [6, 6], [9, 3], [140, 17])
    q = torch.randn(2, 14, 1, 128, device="cuda", dtype=torch.bfloat16)

    def step(q: torch.Tensor) -> torch.Tensor:
        return decode_attention(q * 2, [s], 0.1, backend=backend)[0] + 1

    want = step(q)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q), want)


def test_many_short_heads(backend: str) -> None:
    """More heads than multiprocessors, some with windows: several of them share a CTA."""
    sets = [head_set(BALANCED, 128, (0, 1, 2), [6] * 40, [7] * 20 + [33] * 20, [192] * 40)]
    check(backend, [*sets, head_set(None, 128, (3,), [4] * 40, [0] * 40, [60] * 40, window=30)], 28)


def test_large_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernel takes more warps for many tiles; here for few ones."""
    if why := backends.why_not("cuda", torch.device("cuda")):
        pytest.skip(why)
    monkeypatch.setattr("bitsandheads.ops.cuda_decode.MANY_TILES", 0)
    check("cuda", [head_set(BALANCED, 64, (0, 1), [6, 5], [9, 3], [140, 1])], 14, dim=64)
    window = head_set(None, 128, (1, 3), [4, 4], [0, 0], [60, 40], window=30)
    check("cuda", [head_set(BALANCED, 128, (0, 2), [6, 6], [300, 44], [140, 17]), window], 16, 8)
    window = head_set(None, 128, (3,), [4] * 40, [0] * 40, [60] * 40, window=30)
    check("cuda", [head_set(BALANCED, 128, (0, 1, 2), [6] * 40, [7] * 20 + [33] * 20, [192] * 40), window], 28)


def test_long_heads_beside_windows(backend: str) -> None:
    """Long heads fill the multiprocessors, but for a few that all heads with windows share; two of the long ones are short."""
    tiles = [700] * 6 + [2, 5]
    window = head_set(None, 128, (1,), [4] * 8, [0] * 8, [200] * 8, window=192)
    check(backend, [head_set(BALANCED, 128, (0,), [6] * 8, tiles, [192] * 8), window], 14)


def check_long(sets, q_heads: int, n: int, dim: int = 128, dtype=torch.bfloat16) -> None:
    """A chunk of n new tokens in blocks of tiles, of the usual size and of a few tiles. Turned queries, keys, values and the result are rounded."""
    batch = sets[0].tail_k.shape[0]
    q = torch.randn(batch, n, q_heads, dim, device="cuda").to(dtype).transpose(1, 2)
    assert long_chunks.covers(q, "auto")
    want, _ = reference.decode_attention(q.double(), sets, dim**-0.5, None, torch.float64)
    rounded = ((want.to(dtype).double() - want).norm() / want.norm()).item()
    for out in (attend_chunk(q, sets, dim**-0.5, None, "auto"), long_chunks.attend_long_chunk(q, sets, dim**-0.5, restored=1 << 19)):
        assert out is not None and out.dtype is dtype
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error < 4 * rounded, (error, rounded)
        assert (out.double() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("case", ["alike", "lengths differ", "half", "all kinds"])
def test_long_chunks(case: str, n: int) -> None:
    window = head_set(None, 128, (1,), [16, 16], [0, 0], [n + 64, n + 90], window=64)
    sets = {
        "alike": [head_set(BALANCED, 128, (0, 1), [6, 6], [40, 40], [n + 140] * 2)],
        "lengths differ": [head_set(BALANCED, 128, (0, 1), [6, 0], [40, 7], [n + 140, n])],
        "half": [head_set(None, 128, (0,), [0, 0], [0, 0], [4000, n]), window],
        "all kinds": [
            head_set(BALANCED, 128, (3, 0), [6, 6], [1, 0], [n + 255, n + 1]),
            window,
            head_set(None, 128, (2,), [0, 0], [0, 0], [n + 500] * 2),
        ],
    }[case]
    check_long(sets, 7 * sum(len(s.kv_heads) for s in sets), n)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_long_chunks_of_other_shapes(dim: int, dtype: torch.dtype, group: int) -> None:
    check_long([head_set(BALANCED, dim, (0, 1), [6, 5], [9, 3], [400, 301], dtype)], 2 * group, 300, dim, dtype)
    for size in (1, 5, 400):  # windows of one token, of some, and longer than the tail
        check_long([head_set(None, dim, (0, 1), [2, 0], [0, 0], [310, 330], dtype, window=size)], 2 * group, 300, dim, dtype)


@pytest.mark.parametrize(
    "quant", [MINMAX, FINE, SMALL, get_plan("kivi-2").groups[0].quant], ids=["minmax", "fine", "small tiles", "kivi-2"]
)
def test_long_chunks_of_other_layouts(quant: KVQuant) -> None:
    check_long([head_set(quant, 128, (0, 1), [32, 0], [9, 3], [440, 307])], 8, 300)


@pytest.mark.parametrize(("name", "quant", "dim"), CASES, ids=[f"{name}, {dim} channels" for name, _, dim in CASES])
def test_restored_tiles(name: str, quant: KVQuant, dim: int) -> None:
    check_restored(quant, dim, "cuda", (torch.float32, torch.float16, torch.bfloat16))


def test_a_long_chunk_never_restores_the_whole_history() -> None:
    s = head_set(BALANCED, 128, (0, 1, 2, 3), [6], [2048], [400])
    q = torch.randn(1, 28, 256, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_chunk(q, [s], 0.1, None, "auto")
    assert torch.cuda.max_memory_allocated() - before < 2 * 2 * 4 * 2048 * 128 * 128  # keys and values in bf16
