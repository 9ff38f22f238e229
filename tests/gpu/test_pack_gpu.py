"""The kernels of packing and appending on a GPU, against the PyTorch reference on the same tokens. pytest -m gpu tests/gpu."""

import contextlib

import pytest
import test_pack as t
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import bitsandheads as bh
from bitsandheads import ops
from bitsandheads.layer import CompressedLayer
from bitsandheads.methods import get_plan
from bitsandheads.methods.vidkv import KEYS, VALUES
from bitsandheads.ops import cuda_pack
from bitsandheads.plan import HeadGroup, LayerShape
from bitsandheads.quant.codec import HalfCodec
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant
from bitsandheads.quant.tile import TileLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PRESETS = ["balanced", "extreme", "kivi-2", "kivi-2-sink", *(f"vidkv-{k}/{v}" for k in KEYS for v in VALUES)]


def quant_of(preset: str) -> KVQuant:
    return get_plan(preset).groups[0].quant


@pytest.mark.parametrize(
    ("backend", "preset", "prompt", "chunks"),
    [
        ("triton", "balanced", 1500, [4, 8, 300, 1]),
        ("triton", "extreme", 1200, [300, 1]),
        ("triton", "kivi-2", 700, [300, 1]),
        ("triton", "vidkv-1.5/1.66", 700, [8]),
        ("cuda", "balanced", 1500, [4, 8, 300, 1]),
        ("cuda", "extreme", 1200, [300, 1]),
    ],
)
def test_life_of_a_layer(backend: str, preset: str, prompt: int, chunks: list[int]) -> None:
    """Prompt with padding, single tokens over several tiles, chunks. The slowest tests come first, for workers that run side by side."""
    t.check_life(quant_of(preset), 128, torch.bfloat16, "cuda", prompt, [1] * 150 + chunks, window=True, backend=backend)


@torch.no_grad()
def test_a_model_loses_no_more_than_with_the_reference() -> None:
    """Logits of forced tokens over two newly packed tiles. Where codes need no basis the kernels' logits are the reference's but for codes on ties. Principal
    axes of close eigenvalues are arbitrary, and with them the errors: there both lose equally much against the model without a cache."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=8192, initializer_range=0.08,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).bfloat16().cuda().eval()
    prompt, new = 900, 140
    ids = torch.randint(0, 512, (2, prompt + new), generator=torch.Generator().manual_seed(1)).cuda()
    exact = model(ids).logits[:, prompt - 1 :].float()

    def forced(plan: str, backend: str) -> torch.Tensor:
        with bh.enabled(model):
            cache = bh.CompressedCache(plan, model, backend=backend)
            logits = [model(ids[:, :prompt], past_key_values=cache).logits[:, -1:]]
            logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, prompt + new)]
        return torch.cat(logits, 1).float()

    for plan, alike in (("balanced", False), ("kivi-2", True)):
        want, got = forced(plan, "reference"), forced(plan, "auto")
        reference, ours, apart = (d.norm().item() for d in (want - exact, got - exact, got - want))
        assert 0 < ours < 1.1 * reference, (plan, ours, reference, apart, exact.norm().item())
        assert not alike or apart < 0.3 * reference, (plan, ours, reference, apart)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_presets(preset: str, dim: int, dtype: torch.dtype) -> None:
    t.check_pack(quant_of(preset), dim, dtype, "cuda", tiles=6)


@pytest.mark.parametrize("preset", ["balanced", "extreme"])
@pytest.mark.parametrize("dim", [64, 128])
def test_cuda_kernel(preset: str, dim: int) -> None:
    quant = quant_of(preset)
    like = torch.zeros(1, 1, 128, dim, dtype=torch.bfloat16, device="cuda")
    assert all(cuda_pack.unsupported(like, half, None) is None for _, half, _ in t.halves(quant, dim))
    t.check_cuda_pack(quant, dim)
    t.check_pack(quant, dim, torch.bfloat16, "cuda", tiles=6, backend="cuda")


@pytest.mark.parametrize("dim", [80, 96, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_head_dims(dim: int, dtype: torch.dtype) -> None:
    for preset in ("balanced", "kivi-2"):
        t.check_pack(quant_of(preset), dim, dtype, "cuda", tiles=3)


@pytest.mark.parametrize("quant", [t.FINE, t.SMALL, t.WIDE], ids=["tiles of 64", "tiles of 16", "5 bits"])
def test_other_layouts(quant: KVQuant) -> None:
    t.check_pack(quant, 64, torch.bfloat16, "cuda", tiles=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exact(dtype: torch.dtype) -> None:
    t.check_exact(dtype, "cuda")


@pytest.mark.parametrize("levels", ["minmax", "gaussian"])
@pytest.mark.parametrize("transform", ["none", "principal"])
def test_outliers_and_constant_channels(levels: str, transform: str) -> None:
    half = TensorQuant((AxisClass(2, 1.0, levels),), transform=transform)
    quant = KVQuant(half, half)
    x = torch.randn(2, 2, 3 * 128 + 5, 128, device="cuda")
    x[..., 5] *= 1000
    x[..., 9] = 1000.0
    x[:, :, 200] *= 10
    (got, want), basis, packed = t.packed_twice(quant, "keys", x.bfloat16(), False)
    keys = TileLayout.of(quant, 128).keys
    y = HalfCodec(keys).encode(packed[:1].float(), {name: b[:1] for name, b in basis.items()})
    t.compare(keys, got[:1, :, :3, : keys.nbytes], want[:1, :, :3, : keys.nbytes], y)


@pytest.mark.parametrize("new", [0, 1, 5, 8])
def test_append(new: int) -> None:
    t.check_append("cuda", "triton", new)


@pytest.mark.parametrize(("dim", "dtype"), [(24, torch.float32), (128, torch.bfloat16), (64, torch.float16)])
def test_statistics(dim: int, dtype: torch.dtype) -> None:
    t.check_statistics(dtype, dim, "cuda", rounded=4e-3)


@pytest.mark.parametrize("decades", [1, 4])
@pytest.mark.parametrize("dim", [24, 64, 80, 128])
def test_basis(dim: int, decades: float) -> None:
    t.check_basis(dim, decades)


@pytest.mark.parametrize("heavy", [0, 4, 7])
def test_choice(heavy: int) -> None:
    t.check_choice(heavy, "cuda")


def test_steps_in_a_captured_graph() -> None:
    """Append, attention and the packing of a full tile, all decided on the device: the replayed graph does what the eager layer does."""
    quant = quant_of("balanced")
    eager, *_ = t.life("triton", quant, 128, torch.bfloat16, "cuda", 1000, [1])
    captured, *_ = t.life("triton", quant, 128, torch.bfloat16, "cuda", 1000, [1])
    store = captured.stores[0]
    store.tail.reserve(400)
    store.bank.reserve(12)
    k, v, q = (torch.zeros(2, h, 1, 128, device="cuda", dtype=torch.bfloat16) for h in (2, 2, 4))

    def step() -> torch.Tensor:
        ops.append(k, v, [store.growing(1)], "triton")
        out = ops.decode_attention(q, [store.heads()], 0.1, backend="triton")[0]
        for which, x, basis in (("keys", store.tail.k, store.basis[0]), ("values", store.tail.v, store.basis[1])):
            ops.pack(x, store.bank.tiles, store.counts, 1, store.layout, which, basis, due=True, status=store.status, backend="triton")
        return out

    counts, tiles = store.counts.clone(), store.bank.tiles.clone()
    step()
    store.counts.copy_(counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    store.counts.copy_(counts)
    store.bank.tiles.copy_(tiles)
    random = torch.Generator().manual_seed(5)
    for _ in range(200):
        x = torch.randn(2, 2, 2, 1, 128, generator=random).bfloat16().cuda()
        query = torch.randn(2, 4, 1, 128, generator=random).bfloat16().cuda()
        k.copy_(x[0]), v.copy_(x[1]), q.copy_(query)
        graph.replay()
        eager.stage(x[0], x[1])
        want = eager.attend(query, bh.layer.read_mask(None, 1), 0.1, lambda q, k, v: q)
        t.close(out.transpose(1, 2), want, 1e-2)  # the splits of the attention follow the capacity, which differs
    ops.append(k[:, :, :0], v[:, :, :0], [store.growing(0)], "triton")
    assert torch.equal(store.counts, eager.stores[0].counts) and eager.stores[0].bank.count[0] > 4


def test_compiled() -> None:
    layout = TileLayout.of(quant_of("kivi-2"), 128)
    tiles, status = torch.zeros(1, 2, 2, layout.nbytes, dtype=torch.uint8, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    x = torch.randn(1, 2, 128, 128, device="cuda", dtype=torch.bfloat16)
    jobs = torch.tensor([[0], [1], [1]], dtype=torch.int32, device="cuda")

    def step(x: torch.Tensor, tiles: torch.Tensor) -> None:
        for which in ("keys", "values"):
            ops.pack(x, tiles, jobs, 1, layout, which, {}, status=status)

    other = tiles.clone()
    torch.compile(step, fullgraph=True)(x, tiles)
    step(x, other)
    assert torch.equal(tiles, other) and tiles[:, :, 1].any()


def test_numbers_that_cannot_be_packed() -> None:
    for bad, quant in ((torch.nan, "balanced"), (torch.inf, "kivi-2")):
        layer, *_ = t.life("triton", quant_of(quant), 64, torch.bfloat16, "cuda", 1000, [1])
        k = torch.full((2, 2, 1, 64), bad, device="cuda", dtype=torch.bfloat16)
        q = torch.ones(2, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(bh.NotFiniteError, match="of KV heads"):
            for _ in range(300):
                layer.stage(k, k)
                layer.attend(q, bh.layer.read_mask(None, 1), 0.1, lambda q, k, v: q)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_prompt_that_cannot_be_packed(backend: str) -> None:
    """The host does not wait for a prompt's kernels, so the error comes with the next token."""
    layer = CompressedLayer(0, (HeadGroup((0, 1), quant=quant_of("balanced")),), LayerShape(4, 2, 64), backend)
    k, q = (torch.randn(1, heads, 1000, 64, device="cuda", dtype=torch.bfloat16) for heads in (2, 4))
    k[0, 0, 500, 3] = torch.nan
    for part in (slice(0, 999), slice(999, 1000)):
        layer.stage(k[:, :, part], k[:, :, part])
        with pytest.raises(bh.NotFiniteError, match="step or centre") if part.start else contextlib.nullcontext():
            layer.attend(q[:, :, part], bh.layer.read_mask(None, part.stop - part.start), 0.1, lambda q, k, v: q.transpose(1, 2))
