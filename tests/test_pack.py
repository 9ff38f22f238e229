"""Packing and appending: the ops on a CPU, and their Triton kernels in Triton's interpreter against the PyTorch reference on the same tokens."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from interpreter import needs_interpreter, run_under_interpreter
from torch import Tensor

from bitsandheads import ops
from bitsandheads.errors import BackendError, NotFiniteError
from bitsandheads.layer import CompressedLayer, read_mask
from bitsandheads.methods import get_plan
from bitsandheads.ops.append import Growing
from bitsandheads.plan import HeadGroup, LayerShape, Window
from bitsandheads.quant.codec import Basis, HalfCodec, principal_axes
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant
from bitsandheads.quant.tile import HalfLayout, TileLayout
from bitsandheads.stores.packed import Recent

FINE = KVQuant(
    TensorQuant((AxisClass(6, 0.5), AxisClass(3, 0.25), AxisClass(0, 0.25)), transform="hadamard", order="variance"),
    TensorQuant((AxisClass(4, 0.5, centre=False), AxisClass(1, 0.5, "sign"))), tile=64, group_size=16,
)  # fmt: skip
SMALL = KVQuant(
    TensorQuant((AxisClass(1, 1.0, "minmax"),)), TensorQuant((AxisClass(3, 1.0),), per="token"), tile=16, group_size=16, metadata="fp8"
)
WIDE = KVQuant(TensorQuant((AxisClass(5, 1.0),)), TensorQuant((AxisClass(1, 1.0, "minmax"),), per="token"))
TRITS = KVQuant(
    TensorQuant((AxisClass(2, 0.25), AxisClass("ternary", 0.75, "ternary"))),
    TensorQuant((AxisClass(2, 0.5), AxisClass("ternary", 0.25, "ternary", centre=False), AxisClass(1, 0.25))),
)
MINMAX = KVQuant(TensorQuant((AxisClass(4, 0.5, "minmax"), AxisClass(1, 0.5, "minmax"))), TensorQuant((AxisClass(2, 1.0, "minmax"),)))


# -- helpers that the GPU tests share ------------------------------------------------------------------------------------------------


def tokens(quant: KVQuant, dim: int, dtype: torch.dtype, device: str, tiles: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [2, 2, C, D] with axes of different variance and a mean."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=random) * torch.logspace(0, -1.5, dim)
    x = torch.randn(2, 2, 2, tiles * quant.tile + 5, dim, generator=random) @ mix / 4 + 2 * torch.randn(2, 2, 2, 1, dim, generator=random)
    k, v = x.to(device, dtype)
    return k, v


def halves(quant: KVQuant, dim: int) -> list[tuple[str, HalfLayout, int]]:
    layout = TileLayout.of(quant, dim)
    return [("keys", layout.keys, 0), ("values", layout.values, layout.keys.nbytes)]


def packed_twice(
    quant: KVQuant, which: str, x: Tensor, weighted: bool, basis: Basis | None = None, backend: str = "triton"
) -> tuple[list[Tensor], Basis, Tensor]:
    """The tiles by the kernel and by the reference, from poisoned memory, the basis, and the tokens that were packed: the first sequence
    packs all tiles but one from the place of its first tile on, the second one tile less; three places are left out."""
    dim = x.shape[-1]
    layout = TileLayout.of(quant, dim)
    half = layout.keys if which == "keys" else layout.values
    device, most = x.device, x.shape[2] // quant.tile
    skip = torch.tensor([2, 3, quant.tile], dtype=torch.int32, device=device).expand(2, 2, 3).contiguous()
    place = torch.tensor([i for i in range(x.shape[2]) if i not in (2, 3, quant.tile)], device=device)[1 : 1 + most * quant.tile]
    weight = torch.rand(2, 2, most * quant.tile, device=device) + 0.1 if weighted else None
    rest = x[:, :, place[: (most - 1) * quant.tile]] if most > 1 else x[:, :, place]
    if basis is None:
        basis = HalfCodec(half).find_basis(rest.float(), torch.rand(2, 2, dim, device=device) + 0.1)
    jobs = torch.tensor([[1, 1], [most, most - 1], [0, 1]], dtype=torch.int32, device=device)
    out = []
    for chosen in (backend, "reference"):
        tiles = torch.full((2, 2, most + 1, layout.nbytes), 0x2B, dtype=torch.uint8, device=device)
        status = torch.zeros(1, dtype=torch.int32, device=device)
        kwargs = dict(skip=skip, weight=weight, status=status, backend=chosen)
        ops.pack(x, tiles, jobs, most, layout, which, basis, **kwargs)
        out.append(tiles)
    return out, basis, x[:, :, place]


def check_pack(quant: KVQuant, dim: int, dtype: torch.dtype, device: str = "cpu", tiles: int = 2, backend: str = "triton") -> None:
    for (which, half, base), x in zip(halves(quant, dim), tokens(quant, dim, dtype, device, tiles), strict=True):
        weighted = half.spec.attention_weight > 0
        (got, want), basis, packed = packed_twice(quant, which, x, weighted, backend=backend)
        other = torch.ones(got.shape[-1], dtype=torch.bool)
        other[base : base + half.nbytes] = False
        assert (got[..., other] == 0x2B).all(), "bytes of another half were written"
        assert (got[0, :, tiles:] == 0x2B).all() and (got[1, :, :1] == 0x2B).all() and (got[1, :, tiles:] == 0x2B).all()
        again, _, _ = packed_twice(quant, which, x, False, basis, backend)
        assert weighted or torch.equal(got, again[0]), "a rerun gave other bytes"
        for b, first, n in ((0, 0, tiles), (1, 1, tiles - 1)):
            if n:
                own = {name: t[b : b + 1] for name, t in basis.items()}
                y = HalfCodec(half).encode(packed[b : b + 1, :, : n * half.tokens].float(), own)
                part = slice(base, base + half.nbytes)
                compare(half, got[b : b + 1, :, first : first + n, part], want[b : b + 1, :, first : first + n, part], y)


def check_cuda_pack(quant: KVQuant, dim: int, device: str = "cuda") -> None:
    """The CUDA kernel's bytes against the reference's, and what it leaves behind for the map back against the bytes."""
    from bitsandheads.ops import cuda_pack

    layout, x = TileLayout.of(quant, dim), tokens(quant, dim, torch.bfloat16, device, 6)[0]
    jobs, left_out = torch.tensor([[0, 5], [6, 4], [0, 1]], dtype=torch.int32, device=device), (2, 3, 200)
    skip = torch.tensor(left_out, dtype=torch.int32, device=device).expand(2, 2, 3).contiguous()
    place = torch.tensor([i for i in range(x.shape[2]) if i not in left_out], device=device)
    for _, half, base in halves(quant, dim):
        codec = HalfCodec(half)
        basis = codec.find_basis(x.float()[:, :, : 6 * 128], torch.rand(2, 2, dim, device=device) + 0.1)
        weight = torch.rand(2, 2, 6 * 128, device=device) + 0.1
        tiles = torch.zeros(2, 2, 6, layout.nbytes, dtype=torch.uint8, device=device)
        kept, error = torch.zeros(2, 2, 6, dim, 128, dtype=torch.bfloat16, device=device), torch.zeros(2, 2, 6, dim, device=device)
        status = torch.zeros(1, dtype=torch.int32, device=device)
        cuda_pack.pack_half(x, tiles, jobs, 6, False, half, base, basis, skip, weight, kept, error, status)
        part = tiles[..., base : base + half.nbytes]
        largest = max(m.abs().max().item() for m in half.read_metadata(part))
        assert abs(status.view(torch.float32).item() / largest - 1) < 0.07  # before they were rounded to fp8
        for b, (first, n, at) in enumerate(jobs.T.tolist()):
            own = {name: m[b : b + 1] for name, m in basis.items()}
            packed = x[b : b + 1, :, place[first : first + n * 128]].float()
            y, got = codec.encode(packed, own), part[b : b + 1, :, at : at + n]
            compare(half, got, codec.pack(packed, own, weight[b : b + 1, :, : n * 128]), y)
            restored = half.read(got)[0]  # [h, n, tile, D]
            close(kept[b, :, :n].mT, restored, 2**-8)
            close(error[b, :, :n], (y[0].unflatten(1, (n, 128)) - restored).square().sum(2), 1e-3)


def steps_of(half: HalfLayout, data: Tensor) -> tuple[Tensor, Tensor]:
    """The stored steps, and those of the axes that have a centre."""
    steps, centres = half.read_metadata(data)
    if half.spec.per == "token":
        return steps, steps[..., : centres.shape[-1]]
    wide = steps.new_zeros(*steps.shape[:-1], half.head_dim)
    wide[..., half.step_axes] = steps
    return steps, wide[..., half.centre_axes]


def compare(half: HalfLayout, got: Tensor, want: Tensor, y: Tensor) -> None:
    """Both packed the axes y [B, h, T, D] alike, but where rounding decides: metadata are within a unit in the last place, or what an error
    of 2^-16 of the axes makes (fixed rotations are two bfloat16 parts), or, rarely, what one token makes whose first code, before the least
    squares of gaussian levels, is a tie; a code is another one only where two codes are equally near."""
    fitted = any(c.levels == "gaussian" for c in half.spec.classes)
    moved = half.read_codes(got) != half.read_codes(want)
    share = moved.float().mean().item()
    assert share <= 5e-3, f"{share} of the codes differ"
    ulp, smallest = (2**-3, 2**-15) if half.fmt == "fp8" else (2**-10, 2**-24)
    size = y.square().mean().sqrt()
    beyond, numbers = 0, 0
    for a, b, step in zip(half.read_metadata(got), half.read_metadata(want), steps_of(half, want), strict=True):
        limit = ulp * b.abs() + (smallest * b.abs().amax(-1, keepdim=True) if b.numel() else 0) + 2**-16 * size
        above = (a - b).abs() - limit
        beyond, numbers = beyond + (above > 0).sum().item(), numbers + b.numel()
        assert (above <= step * (4 / half.group_size if fitted else 0)).all(), f"metadata differ by {above.max().item()} more than allowed"
    assert beyond <= 2e-3 * numbers, f"{beyond} of {numbers} metadata differ"
    restored = [half.read(t).flatten(2, 3) for t in (got, want)]
    away = [(r - y).abs() for r in restored]
    by_distance = torch.ones(half.head_dim, dtype=torch.bool, device=y.device)
    by_distance[half.trit_axes[0] : sum(half.trit_axes)] = False  # trits are chosen by a threshold
    tie = (away[0] - away[1]).abs() <= 0.02 * (restored[0] - restored[1]).abs()
    moved = moved.transpose(-1, -2).reshape(y.shape)  # [B, h, N, D, tile] -> [B, h, T, D]
    assert (tie | ~moved | ~by_distance).all(), "a code is another one where one of the two is nearer"
    error = [(a.norm() / y.norm()).item() for a in away]
    assert abs(error[0] - error[1]) <= 1e-3 * error[1], error


def check_exact(dtype: torch.dtype, device: str = "cpu") -> None:
    """Whole numbers whose minimum, maximum and steps are powers of two: nothing is rounded, so the bytes are equal."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(0, 16, (2, 2, 261, 32), generator=random).float() - 7.5
    x[:, :, ::4], x[:, :, 1::4] = -7.5, 7.5
    for which in ("keys", "values"):
        quant = MINMAX if which == "keys" else replace(MINMAX, values=TensorQuant((AxisClass(4, 1.0, "minmax"),)))
        (got, want), _, _ = packed_twice(quant, which, x.to(device, dtype), False, {})
        assert torch.equal(got, want)


def check_append(device: str, backend: str, new: int) -> None:
    """Full tails give their oldest tokens away, then the new tokens are added; against the reference."""
    outs = []
    for name in ("reference", backend):
        torch.manual_seed(1)
        make = lambda h, n: torch.randn(3, h, n, 24).to(device, torch.float16)  # noqa: E731
        counts = lambda *rows: torch.tensor(rows, dtype=torch.int32, device=device)  # noqa: E731
        k, v = make(4, new), make(new, 4).transpose(1, 2)  # values as models hand them over: a transposed view
        stores = [
            Growing((3, 1), make(2, 60), make(2, 60), counts([2] * 3, [1, 4, 0], [40, 39, 48], [40, 40, 2**31 - 1]), 16),
            Growing((2,), make(1, 70), make(1, 70), counts([1] * 3, [0] * 3, [56, 55, 60], [56] * 3), -40),
            Growing((0,), make(1, 70), make(1, 70), counts([0] * 3, [0] * 3, [3, 4, 60], [2**31 - 1] * 3), 0),
        ]
        ops.append(k, v, stores, name)
        outs.append(stores)
    for want, got in zip(*outs, strict=True):
        assert torch.equal(want.counts, got.counts)
        for b, n in enumerate(want.counts[2].tolist()):
            assert torch.equal(want.tail_k[b, :, :n], got.tail_k[b, :, :n]) and torch.equal(want.tail_v[b, :, :n], got.tail_v[b, :, :n])
    assert outs[0][0].counts[1].tolist() == [2, 4, 0] and outs[0][1].counts[2].tolist() == [40 + new, 55 + new, 40 + new]


def check_statistics(dtype: torch.dtype, dim: int, device: str = "cpu", rounded: float = 1e-2) -> None:
    """Attention mass, moments and sums for the map back, against formulas in float64, for sequences of different lengths.

    rounded: relative error of what is multiplied in bfloat16.
    """
    from bitsandheads.ops import triton_prompt

    random = torch.Generator().manual_seed(0)
    counts, tile, group, left_out = [150, 90], 32, 16, (3, 9, 50)
    make = lambda *shape: torch.randn(*shape, generator=random).to(device)  # noqa: E731
    k, q, w = make(2, 2, 150, dim).to(dtype), 2 * make(2, 2, 3, 40, dim).to(dtype), torch.ones(2, 40, device=device)
    w[1, :7] = 0
    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    mass = triton_prompt.attention_mass(q, w, k, lengths, 150, dim**-0.5)
    skip = torch.tensor(left_out, dtype=torch.int32, device=device).expand(2, 2, 3).contiguous()
    jobs = torch.tensor([[2, 2], [4, 2], [0, 1]], dtype=torch.int32, device=device)
    weight, mean = torch.rand(2, 2, 150, generator=random).to(device) + 0.1, make(2, 2, dim)
    total, gram = triton_prompt.moments(k, weight, skip, jobs, 4, tile, group)
    kept = torch.zeros(2, 2, 4, triton_prompt.padded(dim), tile, dtype=torch.bfloat16, device=device)
    kept[:, :, :, :dim] = make(2, 2, 4, dim, tile)
    power, cross = triton_prompt.refit_sums(k, kept, mean, weight, skip, jobs, 4)
    for b, n in ((0, 4), (1, 2)):
        own = slice(b, b + 1)
        want = Recent(q.float(), w).attention_mass(own, k[own, :, : counts[b]].float(), dim**-0.5)
        close(mass[own, :, : counts[b]], want, 1e-5 if dtype == torch.float32 else 1e-3)
        assert not mass[b, :, counts[b] :].any()
        place = [i for i in range(2, 150) if i not in left_out][: n * tile]
        x, share = k[b][:, place].double(), weight[b][:, : n * tile, None].double()
        close(total[b], (x * share).sum(1), 1e-5)
        grouped, grouped_share = x.unflatten(1, (-1, group)), share.unflatten(1, (-1, group))
        away = (grouped - (grouped * grouped_share).sum(2, keepdim=True) / grouped_share.sum(2, keepdim=True)).flatten(1, 2)
        close(gram[b], (away * share).mT @ away, rounded)
        y = kept[b, :, :n, :dim].double().mT.flatten(1, 2)
        close(power[b], (y * share).mT @ y, rounded)
        close(cross[b], (y * share).mT @ (x - mean[b][:, None]), rounded)


def close(got: Tensor, want: Tensor, limit: float) -> None:
    assert ((got.double() - want.double()).norm() / want.double().norm()).item() < limit


def check_choice(heavy: int, device: str = "cpu") -> None:
    """Heavy tokens and token weights, for sequences of different lengths, as the reference finds them."""
    from bitsandheads.ops import triton_prompt

    codecs = HalfCodec(TileLayout.of(get_plan("balanced").groups[0].quant, 16).keys), HalfCodec(TileLayout.of(MINMAX, 16).values)
    mass = torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(0)).to(device)
    k, ends, packed = torch.zeros(2, 2, 150, 16, device=device), [2 + heavy + 128, 2 + heavy + 64], [128, 64]
    begin = triton_prompt.Begin(k, k, [150, 90], [4, 2], 2, heavy, None, None, 1.0, None, "triton")
    table = torch.tensor([ends, packed], dtype=torch.int32, device=device)
    places, (weights, none) = triton_prompt._choose(begin, codecs, mass.clone(), table[0], table[1], 128)
    assert none is None and places.shape == (2, 2, heavy)
    for b, (end, n) in enumerate(zip(ends, packed, strict=True)):
        top = mass[b, :, 2:end].topk(heavy, -1)[1].sort(-1)[0] + 2
        assert torch.equal(places[b].long(), top)
        rest = [[i for i in range(2, end) if i not in row] for row in top.tolist()]
        drawn = torch.stack([m[r] for m, r in zip(mass[b], rest, strict=True)])
        close(weights[b, :, :n], codecs[0].weights(drawn[None])[0], 1e-6)


def check_basis(dim: int, decades: float, device: str = "cuda") -> None:
    """The CUDA kernels: axes as good as exactly found ones, orthogonal but where eigenvalues are close; the map back as in float64."""
    from bitsandheads.ops import cuda_basis

    random = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    spectrum = torch.logspace(0, -decades / 2, dim)
    x = make(dim, dim) @ (make(2, 3, dim, 4 * dim) * spectrum[:, None])
    gram, scale = (x @ x.mT).to(device), (torch.rand(2, 3, dim, generator=random) + 0.2).to(device)
    gram[1, 2, 5], gram[1, 2, :, 5] = 0, 0  # a channel that is always zero
    got, want = cuda_basis.principal_axes(gram, scale).double(), principal_axes(gram, scale).double()
    scaled = gram.double() * scale[..., None] * scale[..., None, :]
    power, exact = ((axes.mT @ scaled @ axes).diagonal(dim1=-2, dim2=-1) for axes in (got, want))
    lost = torch.logspace(-2.4, 0, dim, device=device)  # the share of an axis's variance that codes of 4 to 0 bits lose
    assert ((power * lost).sum(-1) <= 1.002 * (exact * lost).sum(-1)).all()
    assert (got.mT @ got - torch.eye(dim, device=device)).abs().max() < 3e-2
    assert torch.equal(got.float(), cuda_basis.principal_axes(gram, scale)), "a rerun gave other axes"

    y = make(2, 3, 4 * dim, dim) * spectrum
    y[..., -4:] = 0  # axes without codes
    turn = make(2, 3, dim, dim)
    back = torch.linalg.inv(turn)
    x = y @ back + 0.1 * make(2, 3, 4 * dim, dim)
    basis = {"axes": back.mT.to(device, torch.bfloat16)}
    gram, cross = ((y.mT @ z).to(device) for z in (y, x))
    codec = HalfCodec(TileLayout.of(get_plan("balanced").groups[0].quant, dim).keys)
    close(cuda_basis.map_back(basis["axes"], gram, cross), codec.refit(basis, gram, cross), 1e-3)


def life(backend: str, plan: KVQuant, dim: int, dtype: torch.dtype, device: str, prompt: int, steps: list[int], window: bool = False):
    """A layer that is given a padded prompt and then steps, its outputs after the prompt, and all keys, values and queries."""
    groups = (HeadGroup((1,), quant=plan), HeadGroup((0,), window=Window(4, 30))) if window else (HeadGroup((0, 1), quant=plan),)
    layer = CompressedLayer(0, groups, LayerShape(4, 2, dim), backend)
    total = prompt + sum(steps)
    random = torch.Generator().manual_seed(3)
    mix = torch.randn(dim, dim, generator=random) * torch.logspace(0, -1.5, dim)
    x = (torch.randn(2, 2, 2, total, dim, generator=random) @ mix / 4 + torch.randn(2, 1, 2, 1, dim, generator=random)).to(device, dtype)
    q = (2 * torch.randn(2, 4, total, dim, generator=random)).to(device, dtype)
    mask = torch.ones(2, prompt, dtype=torch.long)
    mask[1, :50] = 0
    at, outs = 0, []
    for n in [prompt, *steps]:
        part = slice(at, at + n)
        layer.stage(x[0][:, :, part], x[1][:, :, part])
        chunk = read_mask(mask if at == 0 else None, n)
        out = layer.attend(q[:, :, part], chunk, dim**-0.5, lambda q, k, v: q.transpose(1, 2))
        outs += [] if at == 0 else [out]
        at += n
    return layer, torch.cat(outs, 1), x, q


def exact(store, x: Tensor, q: Tensor, prompt: int) -> Tensor:
    """What attention over all tokens of the store's heads gives for the tokens after the prompt, float64 [B, n, query heads, D]."""
    outs = []
    heads = list(store.kv_heads)
    for b, first in enumerate((0, 50)):
        k, v = x[0][b, heads, first:].double(), x[1][b, heads, first:].double()
        queries = q[b].unflatten(0, (2, 2))[heads, :, prompt:].double()
        scores = torch.einsum("hgnd,htd->hgnt", queries, k) * x.shape[-1] ** -0.5
        place = torch.arange(k.shape[1], device=k.device)
        seen = place <= torch.arange(prompt - first, k.shape[1], device=k.device)[:, None]
        out = torch.einsum("hgnt,htd->hgnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        outs.append(out.flatten(0, 1).transpose(0, 1))
    return torch.stack(outs)


def check_life(
    plan: KVQuant, dim: int, dtype: torch.dtype, device: str, prompt: int, steps: list[int], window: bool = False, backend: str = "triton"
) -> None:
    """The same counts as the reference, and outputs as near to the attention over all tokens."""
    runs = [life(b, plan, dim, dtype, device, prompt, steps, window) for b in (backend, "reference")]
    (got, *_), (want, _, x, q) = runs
    for a, b in zip(got.stores, want.stores, strict=True):
        assert a.tail.count == b.tail.count and torch.equal(a.counts, b.counts)
        assert a._host_counts() == a.counts.tolist()
    packed = want.stores[0]
    assert got.stores[0].bank.count == packed.bank.count and max(packed.bank.count) > 0
    heads = [2 * h + g for h in packed.kv_heads for g in range(2)]
    truth = exact(packed, x, q, prompt)
    ours, reference = (((out[:, :, heads].double() - truth).norm() / truth.norm()).item() for _, out, _, _ in runs)
    assert ours <= 1.1 * reference + 0.003, (ours, reference)


# -- on a CPU: the operators ---------------------------------------------------------------------------------------------------------


def growing(count: int = 3, limit: int = 2**31 - 1) -> list[Growing]:
    counts = torch.tensor([[0], [0], [count], [limit]], dtype=torch.int32)
    return [Growing((1, 0), torch.zeros(1, 2, 20, 16), torch.zeros(1, 2, 20, 16), counts, 16)]


def test_operators() -> None:
    layout = TileLayout.of(MINMAX, 16)
    tiles, status = torch.zeros(1, 2, 2, layout.nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    x, jobs = torch.randn(1, 2, 128, 16), torch.tensor([[0], [1], [1]], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.bitsandheads.pack.default,
        (x, tiles, jobs, 1, False, layout.number, "keys", "", [], None, None, status, "reference"),
        test_utils="test_schema",
    )
    (s,) = growing()
    args = ([s.tail_k, s.tail_v], [s.counts], [1, 0], [2], [16], "reference")
    torch.library.opcheck(torch.ops.bitsandheads.append.default, (x[:, :, :2], x[:, :, :2], *args))


def test_compiled_without_a_break() -> None:
    layout = TileLayout.of(MINMAX, 16)
    tiles, status = torch.zeros(1, 2, 2, layout.nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    x, jobs = torch.randn(1, 2, 128, 16), torch.tensor([[0], [1], [1]], dtype=torch.int32)
    (s,) = growing()

    def step(x: Tensor, tiles: Tensor, jobs: Tensor) -> Tensor:
        ops.append(x[:, :, :2], x[:, :, 1:3], [s], "reference")
        ops.pack(x, tiles, jobs, 1, layout, "keys", {}, status=status, backend="reference")
        return s.counts[2] + 1

    again = tiles.clone()
    assert torch.compile(step, fullgraph=True, backend="aot_eager")(x, tiles, jobs).tolist() == [6]
    ops.pack(x, again, jobs, 1, layout, "keys", {}, status=status, backend="reference")
    assert torch.equal(tiles, again) and tiles[:, :, 1].any() and not tiles[:, :, 0].any()
    assert s.counts[2].tolist() == [5] and torch.equal(s.tail_k[0, :, 3:5], x[0, [1, 0], :2])


def test_due_tiles_are_decided_on_the_device() -> None:
    """With `due` the tail's oldest tokens are packed where the tail has grown to its limit, and append lets them leave."""
    layout, status = TileLayout.of(MINMAX, 16), torch.zeros(1, dtype=torch.int32)
    x = torch.randn(2, 2, 140, 16)
    counts = torch.tensor([[0, 0], [1, 0], [130, 129], [130, 130]], dtype=torch.int32)
    tiles = torch.zeros(2, 2, 2, layout.nbytes, dtype=torch.uint8)
    for which in ("keys", "values"):
        ops.pack(x, tiles, counts, 1, layout, which, {}, due=True, status=status)
    want = torch.cat([HalfCodec(h).pack(x[:1, :, :128], {}) for h in (layout.keys, layout.values)], -1)
    assert torch.equal(tiles[0, :, 1], want[0, :, 0]) and not tiles[1].any() and not tiles[0, :, 0].any()
    before = x.clone()
    ops.append(x[:, :, :0], x[:, :, :0], [Growing((0, 1), x, x.clone(), counts, 128)])
    assert counts.tolist() == [[0, 0], [2, 0], [2, 129], [130, 130]] and torch.equal(x[0, :, :2], before[0, :, 128:130])


def test_errors() -> None:
    x = torch.randn(1, 2, 128, 16)
    x[0, 0, 3, 3] = torch.nan
    layout, status = TileLayout.of(MINMAX, 16), torch.zeros(1, dtype=torch.int32)
    tiles, jobs = torch.zeros(1, 2, 2, layout.nbytes, dtype=torch.uint8), torch.tensor([[0], [1], [1]], dtype=torch.int32)
    with pytest.raises(NotFiniteError, match="step or centre of the codes is nan"):
        ops.pack(x, tiles, jobs, 1, layout, "keys", {}, status=status)
    with pytest.raises(BackendError, match="backend is 'numpy'"):
        ops.append(x, x, growing(), "numpy")
    with pytest.raises(BackendError, match='backend="cuda" cannot run here'):
        ops.pack(x, tiles, jobs, 1, layout, "keys", {}, status=status, backend="cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_the_cuda_kernel_packs() -> None:
    from bitsandheads.ops import cuda_pack

    def why(quant: KVQuant, dim: int) -> list[str | None]:
        return [cuda_pack._unsupported_layout(half) for _, half, _ in halves(quant, dim)]

    for name in ("balanced", "extreme"):
        assert why(get_plan(name).groups[0].quant, 64) == why(get_plan(name).groups[0].quant, 128) == [None, None]
    uneven = (AxisClass(1, 0.0625), AxisClass(2, 0.9375))  # 8 one-bit axes of 128: those of a word are 4 apart
    principal = TensorQuant(uneven, transform="principal")
    for quant, dim, said in (
        (get_plan("balanced").groups[0].quant, 96, "head_dim 96"),
        (get_plan("kivi-2").groups[0].quant, 128, "transform"),
        (KVQuant(principal, principal, metadata="fp8"), 128, "classes of such sizes"),
        (KVQuant(principal, principal, metadata="fp8", group_size=64), 128, "groups of 64"),
    ):
        assert all(reason and said in reason for reason in why(quant, dim)), why(quant, dim)


# -- in Triton's interpreter ---------------------------------------------------------------------------------------------------------

CASES = {  # quantizer, head_dim, dtype
    "balanced": ("balanced", 32, torch.float32),
    "extreme, 24 channels": ("extreme", 24, torch.bfloat16),
    "kivi-2": ("kivi-2", 32, torch.bfloat16),
    "vidkv-1.5/1.58": ("vidkv-1.5/1.58", 32, torch.float16),
    "trits beside other codes": (TRITS, 32, torch.float32),
    "trits, tiles of 32": (replace(TRITS, tile=32, group_size=32), 48, torch.bfloat16),
    "tiles of 64": (FINE, 32, torch.float32),
    "tiles of 16": (SMALL, 40, torch.float32),
    "5 bits, 1 bit by token": (WIDE, 32, torch.float32),
}


def run_cases() -> None:
    for name, (quant, dim, dtype) in CASES.items():
        torch.manual_seed(0)
        check_pack(get_plan(quant).groups[0].quant if isinstance(quant, str) else quant, dim, dtype)
        print(name, flush=True)
    check_exact(torch.bfloat16)
    for new in (0, 1, 5):
        check_append("cpu", "triton", new)
    check_statistics(torch.float32, 24)
    for heavy in (0, 3):
        check_choice(heavy)
    balanced = replace(get_plan("balanced").groups[0].quant, basis_tokens=128, residual=16, tile=32, group_size=32)
    check_life(balanced, 16, torch.float32, "cpu", 260, [1, 1, 40, 5], window=True)


@needs_interpreter
def test_interpreter() -> None:
    run_under_interpreter(__file__)


if __name__ == "__main__":
    run_cases()
