"""ops.reference.decode_attention against masks written out in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bitsandheads as bh
from bitsandheads.ops import HeadSet, _in_parts, chunks, decode_attention
from bitsandheads.ops.chunks import attend_chunk
from bitsandheads.ops.long_chunks import attend_long_chunk, covers
from bitsandheads.ops.reference import decode_attention as reference
from bitsandheads.ops.synthetic import head_set
from bitsandheads.quant.codec import HalfCodec
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant
from bitsandheads.quant.tile import TileLayout

DIM, TILE = 32, 32
PRINCIPAL = TensorQuant((AxisClass(3, 0.5), AxisClass(1, 0.25), AxisClass(0, 0.25)), transform="principal")
PLAIN = TensorQuant((AxisClass(2, 1.0, "minmax"),))
QUANT = KVQuant(PRINCIPAL, PLAIN, group_size=32, tile=TILE, residual=8, sink=4)
BETTER = TensorQuant((AxisClass(4, 1.0, "minmax"),))


class Places:
    """Every key and value that a set may hold, one list for each sequence: (k [h, D], v [h, D], time, is in the sink)."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[tuple[Tensor, Tensor, int, bool]]] = [[] for _ in range(batch)]

    def add(self, b: int, k: Tensor, v: Tensor, sink: bool = False) -> None:
        for i in range(k.shape[1]):
            self.rows[b].append((k[:, i], v[:, i], len(self.rows[b]), sink))


def tiles_of(
    batch: int, heads: int, counts: list[int], places: Places, values: TensorQuant | None = None
) -> tuple[Tensor, TileLayout, dict]:
    layout = TileLayout.of(QUANT, DIM, values)
    codecs = HalfCodec(layout.keys), HalfCodec(layout.values)
    n = max(counts)
    x = torch.randn(2, batch, heads, n * TILE, DIM) + torch.randn(2, batch, heads, 1, DIM)
    torch.manual_seed(len(counts))  # one basis for all parts of a set
    basis = codecs[0].find_basis(torch.randn(batch, heads, 64, DIM), torch.ones(batch, heads, DIM))
    tiles = torch.cat([codecs[0].pack(x[0], basis), codecs[1].pack(x[1], {})], -1)
    k, v = codecs[0].unpack(tiles[..., : layout.keys.nbytes], basis), codecs[1].unpack(tiles[..., layout.keys.nbytes :], {})
    for b, count in enumerate(counts):
        places.add(b, k[b, :, : count * TILE], v[b, :, : count * TILE])
    tiles = torch.cat([tiles, torch.randint(0, 255, (batch, heads, 2, tiles.shape[-1])).to(torch.uint8)], 2)  # spare capacity holds rubbish
    return tiles, layout, basis


def whole_of(batch: int, heads: int, counts: list[int], places: Places, sink: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, batch, heads, max(counts) + 3, DIM)
    for b, count in enumerate(counts):
        places.add(b, x[0, b, :, :count], x[1, b, :, :count], sink)
        x[:, b, :, count:] = 77.0  # unused places hold rubbish
    return x[0], x[1]


def build(kind: str, kv_heads: tuple[int, ...], tails: list[int], window: int | None = None) -> tuple[HeadSet, Places]:
    batch, heads = len(tails), len(kv_heads)
    places = Places(batch)
    sinks, tiles = [0] * batch, [0] * batch
    parts: dict = {}
    if kind in ("window", "packed", "salient"):
        sinks = [3, 5, 0][:batch] if kind == "window" else [4] * batch
        parts["sink_k"], parts["sink_v"] = whole_of(batch, heads, sinks, places, sink=True)
    if kind in ("packed", "salient"):
        tiles = [3, 1, 2][:batch]
        data, layout, basis = tiles_of(batch, heads, tiles, places)
        parts |= {"tiles": data, "layout": layout, "key_basis": basis}
    if kind == "salient":
        counts = [1, 0, 1][:batch]
        data, layout, basis = tiles_of(batch, heads, counts, places, BETTER)
        lengths = torch.tensor([[0] * batch, counts, [0] * batch], dtype=torch.int32)
        empty = torch.zeros(batch, heads, 0, DIM)
        parts["extra"] = (HeadSet(kv_heads, empty, empty, lengths, tiles=data, layout=layout, key_basis=basis),)
    tail_k, tail_v = whole_of(batch, heads, tails, places)
    lengths = torch.tensor([sinks, tiles, tails], dtype=torch.int32)
    return HeadSet(kv_heads, tail_k, tail_v, lengths, window=window, **parts), places


def oracle(q: Tensor, sets: list[tuple[HeadSet, Places]], scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, q_heads, n, dim = q.shape
    group = q_heads // sum(len(s.kv_heads) for s, _ in sets)
    out, lse = torch.zeros(batch, q_heads, n, dim, dtype=torch.float64), torch.zeros(batch, q_heads, n, dtype=torch.float64)
    for heads, places in sets:
        for b, row in enumerate(places.rows):
            for i in range(n):
                own = len(row) - 1 - (n - 1 - i if hidden is None else int(hidden[b, i]))  # the query's own place in time
                seen = [(k, v) for k, v, t, sink in row if t <= own and (heads.window is None or sink or t > own - heads.window)]
                k, v = (torch.stack(x, 1).double() for x in zip(*seen, strict=True))
                for at, h in enumerate(heads.kv_heads):
                    for g in range(group):
                        scores = k[at] @ q[b, h * group + g, i].double() * scale
                        lse[b, h * group + g, i] = scores.logsumexp(0)
                        out[b, h * group + g, i] = scores.softmax(0) @ v[at]
    return out, lse


LAYERS = {
    "whole": [("whole", (0, 1, 2), None)],
    "packed": [("packed", (0, 1, 2), None)],
    "salient": [("salient", (2, 0, 1), None)],
    "window": [("window", (0, 1, 2), 6)],
    "mixed": [("packed", (2, 0), None), ("window", (1,), 6), ("whole", (3,), None)],
}
TAILS = {"packed": [20, 9, 13], "salient": [11, 30, 8], "window": [14, 9, 33], "whole": [40, 9, 21]}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_against_written_out_masks(layer: str, group: int, n: int, padded: bool) -> None:
    sets = [build(kind, heads, TAILS[kind], window) for kind, heads, window in LAYERS[layer]]
    kv_heads = sum(len(s.kv_heads) for s, _ in sets)
    q = torch.randn(3, kv_heads * group, n, DIM)
    hidden = None
    if padded:  # sequence 0: all real; 1: the last tokens are padding, so its queries end earlier; 2: real, padding, real
        hidden = torch.stack([torch.arange(n - 1, -1, -1), (torch.arange(n - 1, -1, -1) - 1).clamp(min=0), torch.full((n,), n // 2)])
    expected, expected_lse = oracle(q, sets, 0.3, hidden)
    out, lse = reference(q.double(), [s for s, _ in sets], 0.3, hidden)
    assert out.dtype is torch.float64 and lse.dtype is torch.float32
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_only_rounded_at_the_end(dtype: torch.dtype) -> None:
    sets = [build(kind, heads, TAILS[kind], window) for kind, heads, window in LAYERS["mixed"]]
    q = torch.randn(3, 8, 2, DIM).to(dtype)
    expected, _ = oracle(q, sets, 0.3, None)
    out, _ = decode_attention(q, [s for s, _ in sets], 0.3)
    assert out.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=2 * eps + 1e-5, rtol=eps + 1e-5)


def test_noise_correction_raises_packed_scores_only() -> None:
    """Packed scores gain share / 2 * var(error of scale * q . k), the error of axis i having variance noise_i."""
    share, scale = 0.8, 0.3
    sets = []
    for spec in (PRINCIPAL, replace(PRINCIPAL, noise_correction=share)):
        torch.manual_seed(3)
        heads, places = build("packed", (0, 1), [12, 7])
        layout = TileLayout.of(replace(QUANT, keys=spec), DIM)
        noise = torch.rand(2, 2, DIM) * 3
        sets.append((replace(heads, layout=layout, key_basis=heads.key_basis | {"noise": noise}), places))
    (plain, places), (raised, _) = sets
    q = torch.randn(2, 4, 2, DIM).double()
    got, _ = reference(q, [raised], scale)
    for b, row in enumerate(places.rows):
        k, v = (torch.stack([place[i] for place in row], 1).double() for i in (0, 1))
        packed = torch.arange(len(row)) - 4
        packed = (packed >= 0) & (packed < int(raised.lengths[1, b]) * TILE)
        for head in range(4):
            for i in range(2):
                own = len(row) - 1 - (1 - i)
                turned = q[b, head, i] @ raised.key_basis["axes"][b, head // 2].double()
                gain = share / 2 * scale**2 * (turned.square() * raised.key_basis["noise"][b, head // 2].double()).sum()
                scores = k[head // 2] @ q[b, head, i] * scale + gain * packed
                expected = scores[: own + 1].softmax(0) @ v[head // 2][: own + 1]
                torch.testing.assert_close(got[b, head, i], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, reference(q, [plain], scale)[0], atol=1e-3)


def test_lse_merges_parts() -> None:
    """Outputs over two parts, weighted by their lse, give the output over both: what a split kernel relies on."""
    whole, _ = build("packed", (0, 1), [20, 20])
    q = torch.randn(2, 4, 1, DIM)
    out, lse = reference(q, [whole], 0.3)
    tiles_only = HeadSet(
        whole.kv_heads, whole.tail_k, whole.tail_v, whole.lengths * torch.tensor([[0], [1], [0]]), tiles=whole.tiles,
        layout=whole.layout, key_basis=whole.key_basis,
    )  # fmt: skip
    rest = HeadSet(whole.kv_heads, whole.tail_k, whole.tail_v, whole.lengths * torch.tensor([[1], [0], [1]]), whole.sink_k, whole.sink_v)
    parts = [reference(q, [s], 0.3) for s in (tiles_only, rest)]
    weights = torch.stack([p[1] for p in parts]).softmax(0)[..., None]
    torch.testing.assert_close(weights[0] * parts[0][0] + weights[1] * parts[1][0], out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack([p[1] for p in parts]).logsumexp(0), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n", [1, 8, 13, 24])
def test_a_chunk_in_pieces_is_the_chunk(n: int, padded: bool) -> None:
    torch.manual_seed(n)
    sets = [build("packed", (0, 2), [40, 33])[0], build("window", (1,), [40, 33], window=20)[0]]
    q = torch.randn(2, 6, n, DIM)
    hidden = torch.stack([torch.arange(n - 1, -1, -1), torch.arange(n - 1, -1, -1).clamp(max=3)]) if padded else None
    want = decode_attention(q, sets, 0.2, hidden)[0]
    got = attend_chunk(q, sets, 0.2, hidden, "auto", most=8)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(attend_chunk(q, sets, 0.2, hidden, "auto"), want)  # the reference takes any size


def long_sets(layer: str, alike: bool) -> list[HeadSet]:
    """Sets of three sequences, all of one length or not, whose packed scores are raised."""
    if layer == "waiting":  # quantized heads before their first tile
        waiting = build("packed", (0, 1, 2), TAILS["packed"])[0]
        waiting.tiles, waiting.key_basis, waiting.lengths[1] = None, {}, 0
        sets = [waiting]
    else:
        sets = [build(kind, heads, TAILS[kind], window)[0] for kind, heads, window in LAYERS[layer]]
    for s in sets:
        noise = torch.rand(3, len(s.kv_heads), DIM)
        for part in (s, *s.extra):
            if part.tiles is not None and part.layout is not None:
                keys = replace(part.layout.keys, spec=replace(PRINCIPAL, noise_correction=0.8))
                part.layout, part.key_basis = replace(part.layout, keys=keys), part.key_basis | {"noise": noise}
            if alike:
                part.lengths = part.lengths.amax(1, keepdim=True).expand(-1, 3)
    return sets


@pytest.mark.parametrize("restored", [1, 2 * 9 * TILE * DIM, 1 << 23], ids=["tile by tile", "two tiles", "at once"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("layer", [*LAYERS, "waiting"])
def test_a_long_chunk_in_blocks_is_the_chunk(layer: str, alike: bool, restored: int) -> None:
    torch.manual_seed(0)
    sets = long_sets(layer, alike)
    kv_heads = sum(len(s.kv_heads) for s in sets)
    for group, n in ((1, 8), (4, 5), (7, 1)):
        q = torch.randn(3, kv_heads * group, n, DIM, dtype=torch.float64)
        got = attend_long_chunk(q if group == 4 else q.mT.contiguous().mT, sets, 0.3, restored)
        torch.testing.assert_close(got, reference(q, sets, 0.3)[0], atol=1e-6, rtol=1e-5)
    assert not covers(q, "auto")


@pytest.mark.parametrize("tiles", [[1, 1], [3, 1]], ids=str)
@pytest.mark.parametrize("name", [name for name in bh.preset_names() if bh.get_plan(name).groups[0].quant is not None])
def test_long_chunks_of_all_layouts(name: str, tiles: list[int]) -> None:
    quant = bh.get_plan(name).groups[0].quant
    s = head_set(quant, 64, (1, 0), [5, 5], tiles, [20, 20], torch.bfloat16, "cpu")
    q = torch.randn(2, 6, 9, 64).bfloat16()
    want = reference(q.double(), [s], 0.125)[0]
    for restored in (1, 1 << 23):
        got = attend_long_chunk(q, [s], 0.125, restored)
        assert got.dtype is torch.bfloat16 and (got.double() - want).norm() < 4 * (want.bfloat16().double() - want).norm()


def test_only_covered_chunks_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those with padding, nor those of which a sink took the first tokens."""
    asked: list[int] = []
    monkeypatch.setattr(chunks, "covers", lambda q, backend: True)
    monkeypatch.setattr(chunks, "attend_long_chunk", lambda q, *args: asked.append(q.shape[2]) or attend_long_chunk(q, *args))
    sets = long_sets("window", alike=False)
    for n, padded, in_blocks in ((9, False, True), (9, True, False), (10, False, False)):  # the shortest tail has 9 tokens
        q, asked[:] = torch.randn(3, 6, n, DIM), []
        hidden = torch.arange(n - 1, -1, -1).clamp(max=3).expand(3, -1) if padded else None
        out = attend_chunk(q, sets, 0.3, hidden, "reference")
        torch.testing.assert_close(out, reference(q, sets, 0.3, hidden)[0], atol=1e-5, rtol=1e-4)
        assert asked == [n] * (not padded) and (attend_long_chunk(q, sets, 0.3) is not None) == (in_blocks or padded)


@pytest.mark.parametrize("kind", ["packed", "salient", "whole"])
def test_sequences_in_parts_are_the_batch(kind: str) -> None:
    torch.manual_seed(0)
    sets = [build(kind, (0, 2), [10, 5, 7])[0], build("window", (1,), [9, 12, 6], window=4)[0]]
    q, hidden = torch.randn(3, 6, 2, DIM), torch.tensor([[1, 0], [0, 0], [2, 1]])
    for parts, whole in zip(_in_parts(q, sets, 0.2, hidden, "auto", 2), decode_attention(q, sets, 0.2, hidden), strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
