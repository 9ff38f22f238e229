"""Random lives of a layer (append, crop, select, repeat, reset; with and without padding) against a plain list of its tokens.

One file: the oracle, the random lives and the cases found by them share the same helpers.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsandheads.errors import CacheStateError
from bitsandheads.layer import CompressedLayer, read_mask
from bitsandheads.ops.reference import unpack_tiles
from bitsandheads.plan import HeadGroup, LayerShape, Window
from bitsandheads.quant.spec import AxisClass, KVQuant, Salience, TensorQuant
from bitsandheads.stores.packed import PackedStore
from bitsandheads.stores.whole import WholeStore
from bitsandheads.stores.window import WindowStore

DIM, GROUP = 16, 2
TWO = TensorQuant((AxisClass(2, 1.0, "minmax"),))
MIXED = TensorQuant((AxisClass(3, 0.5), AxisClass(1, 0.5)), transform="principal", query_weighted=True)
TRITS = TensorQuant((AxisClass("ternary", 1.0, "ternary", centre=False),))
RANKED = TensorQuant((AxisClass(2, 0.5, "minmax"), AxisClass(1, 0.5, "sign")), transform="fourier", last_class_only=True, order="range")
SHORT = dict(group_size=16, tile=16, residual=8, sink=3, basis_tokens=20)
QUANTS = {
    "minmax": KVQuant(TWO, TWO, **SHORT),
    "no-sink-no-residual": KVQuant(TWO, TWO, **(SHORT | {"sink": 0, "residual": 0})),
    "principal-heavy-fp8": KVQuant(MIXED, MIXED, metadata="fp8", heavy=2, **SHORT),
    "ranked-salient": KVQuant(RANKED, TRITS, salience=Salience(0.3), **SHORT),
}


def layouts(quant: KVQuant) -> dict[str, tuple[HeadGroup, ...]]:
    return {
        "one": (HeadGroup((0, 1, 2, 3), quant=quant),),
        "mixed": (HeadGroup((3, 1), quant=quant), HeadGroup((2,), window=Window(3, 5)), HeadGroup((0,))),
    }


# -- the oracle ------------------------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """What a store holds of one sequence, in time order where it can be told."""

    k: Tensor  # [h, n, D]
    v: Tensor
    index: Tensor | None  # int64 [h, n], which token of the sequence; None when the order was sorted by salience


def held(store, b: int, real: int) -> Held:
    """Everything that sequence b of a store holds; `real` tokens were appended to it."""
    tail = store.tail.k[b, :, : store.tail.count[b]], store.tail.v[b, :, : store.tail.count[b]]
    heads, n_tail = tail[0].shape[:2]
    if isinstance(store, WholeStore):
        return Held(*tail, torch.arange(real).expand(heads, -1))
    first = store.first.k[b, :, : store.first.count[b]], store.first.v[b, :, : store.first.count[b]]
    newest = torch.arange(real - n_tail, real).expand(heads, -1)
    n_first = first[0].shape[1]
    if isinstance(store, WindowStore):
        index = torch.cat([torch.arange(n_first).expand(heads, -1), newest], 1)
        return Held(torch.cat([first[0], tail[0]], 1), torch.cat([first[1], tail[1]], 1), index)
    view, parts = store.heads(), []
    for part in (view, *view.extra):
        if part.tiles is not None:
            n = int(part.lengths[1, b]) * part.layout.tokens
            parts.append([x[b, :, :n] for x in unpack_tiles(part)])
    k = torch.cat([first[0], *(p[0] for p in parts), tail[0]], 1)
    v = torch.cat([first[1], *(p[1] for p in parts), tail[1]], 1)
    if view.extra and int(view.extra[0].lengths[1, b]):
        return Held(k, v, None)
    old = torch.arange(real - n_tail).expand(heads, -1)
    if n_first:
        whole = torch.zeros_like(old, dtype=torch.bool)
        whole[:, : store.quant.sink] = True
        whole.scatter_(1, store.positions[b].long(), True)
        old = old.gather(1, whole.logical_not().int().argsort(dim=1, stable=True))
    return Held(k, v, torch.cat([old, newest], 1))


class Life:
    """A layer and, beside it, the plain list of all tokens of every sequence."""

    def __init__(self, groups: tuple[HeadGroup, ...], seed: int) -> None:
        self.layer = CompressedLayer(0, groups, LayerShape(4 * GROUP, 4, DIM), "reference")
        self.random = torch.Generator().manual_seed(seed)
        self.scale = torch.rand(2, 1, 4, 1, DIM, generator=self.random) * 3 + 0.2  # channels of different ranges
        self.shift = torch.randn(2, 1, 4, 1, DIM, generator=self.random) * 2
        self.k: list[list[Tensor]] = []  # per store, per sequence: [h, real, D]
        self.v: list[list[Tensor]] = []
        self.valid = torch.zeros(0, 0, dtype=torch.bool)  # [B, logical tokens]
        self.waiting = False  # a crop may leave full tiles in the residual until the next tokens come
        self.tiles: list[list[Tensor]] = []  # per packed store, per sequence: the bytes of its tiles when they were first seen

    @property
    def packed(self) -> list[PackedStore]:
        return [s for s in self.layer.stores if isinstance(s, PackedStore)]

    def append(self, batch: int, n: int, pads: list[tuple[int, int]] | None) -> None:
        layer, self.waiting = self.layer, False
        first = not layer.segments
        if first:
            self.valid = torch.zeros(batch, 0, dtype=torch.bool)
        batch = self.valid.shape[0]
        new = torch.ones(batch, n, dtype=torch.bool)
        for b in range(batch if pads else 0):
            left, right = pads[b % len(pads)]
            new[b, : min(left, n)] = False
            new[b, max(n - right, 0) :] = False
        x = torch.randn(2, batch, 4, n, DIM, generator=self.random) * self.scale + self.shift
        q = torch.randn(batch, 4 * GROUP, n, DIM, generator=self.random)
        self.valid = torch.cat([self.valid, new], 1)
        total = self.valid.shape[1]
        causal = torch.arange(total) <= torch.arange(total - n, total)[:, None]
        mask = (causal & self.valid[:, None])[:, None]
        before = [[held(s, b, len(self.k[i][b][0])) for b in range(batch)] for i, s in enumerate(layer.stores)]
        calls = []

        def base(qs: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append(k.shape[2])
            scores = (qs @ k.repeat_interleave(GROUP, 1).mT) * DIM**-0.5
            return (scores.masked_fill(~mask, -1e9).softmax(-1) @ v.repeat_interleave(GROUP, 1)).transpose(1, 2)

        layer.stage(*x)
        assert layer.tokens == total
        out = layer.attend(q, read_mask(mask if pads else None, n), DIM**-0.5, base)
        assert calls == [total] if first else calls in ([], [total])
        assert layer.staged is None and layer.tokens == total
        if first:
            self.k = [[x[0][b, list(s.kv_heads), :0] for b in range(batch)] for s in layer.stores]
            self.v = [[x[1][b, list(s.kv_heads), :0] for b in range(batch)] for s in layer.stores]
            self.tiles = [[torch.zeros(2, 0)] * batch for _ in self.packed]
        for i, store in enumerate(layer.stores):
            for b in range(batch):
                kept = new[b].nonzero().squeeze(1)
                k, v = (y[b, list(store.kv_heads)][:, kept] for y in x)
                old = before[i][b] if before else None
                self.check_attention(store, old, k, v, q[b], out[b], kept, len(self.k[i][b][0]))
                self.k[i][b], self.v[i][b] = torch.cat([self.k[i][b], k], 1), torch.cat([self.v[i][b], v], 1)

    def check_attention(self, store, old: Held | None, k: Tensor, v: Tensor, q: Tensor, out: Tensor, kept: Tensor, real: int) -> None:
        """Attention in float64 over what was held before and the chunk, with the rule of visibility written out."""
        n = k.shape[1]
        heads = [h * GROUP + g for h in store.kv_heads for g in range(GROUP)]
        index = torch.arange(real, real + n).expand(k.shape[0], -1)
        if old is not None:
            known = torch.full((k.shape[0], old.k.shape[1]), -1) if old.index is None else old.index
            k, v, index = torch.cat([old.k, k], 1), torch.cat([old.v, v], 1), torch.cat([known, index], 1)
        t = torch.arange(real, real + n)[:, None]
        seen = index[:, None] <= t  # [h, n, T]
        if old is not None and isinstance(store, WindowStore):
            seen &= (index[:, None] < store.sink) | (index[:, None] > t - store.recent)
        qs = q[heads][:, kept].unflatten(0, (-1, GROUP)).double()
        scores = torch.einsum("hgnd,htd->hgnt", qs, k.double()) * DIM**-0.5
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        expected = torch.einsum("hgnt,htd->hgnd", weights, v.double()).flatten(0, 1)
        torch.testing.assert_close(out.transpose(0, 1)[heads][:, kept].double(), expected, atol=2e-4, rtol=2e-4)

    def crop(self, remove: int) -> None:
        left = max(self.valid.shape[1] - remove, 0)
        counts = self.valid[:, left:].sum(1).tolist()
        try:
            self.layer.check_crop(remove)
        except CacheStateError:
            with pytest.raises(CacheStateError):
                self.layer.crop(remove)
            assert self.crop_needs_what_is_gone(counts)
            return
        started = [list(s.started) if isinstance(s, PackedStore) else None for s in self.layer.stores]
        self.layer.crop(remove)
        if left == 0:
            self.__dict__.update(k=[], v=[], tiles=[], valid=torch.zeros(0, 0, dtype=torch.bool))
            return
        self.valid = self.valid[:, :left]
        self.waiting = True
        for i, store in enumerate(self.layer.stores):
            for b, count in enumerate(counts):
                real = self.k[i][b].shape[1] - count
                spread = [(x[i][b] - x[i][b].mean(1, keepdim=True)).square().mean().sqrt() for x in (self.k, self.v)]
                self.k[i][b], self.v[i][b] = self.k[i][b][:, :real], self.v[i][b][:, :real]
                if isinstance(store, PackedStore):  # opened tokens come back as the codec kept them, and are packed anew from there
                    n, opened = store.tail.count[b], started[i] is not None and started[i][b] and not store.started[b]
                    for truth, buffer, scale in zip((self.k, self.v), (store.tail.k, store.tail.v), spread, strict=True):
                        back, original = buffer[b, :, :n], truth[i][b][:, real - n :]
                        assert not n or (back - original).square().mean().sqrt() <= 2 * scale
                        if opened:  # tokens that were whole come back whole, at their own places
                            assert n == real and torch.equal(back[:, : store.quant.sink], original[:, : store.quant.sink])
                            for h, heavy in enumerate(store.positions[b].tolist()):
                                at = [p for p in heavy if p < real]
                                assert torch.equal(back[h, at], original[h, at])
                        truth[i][b] = torch.cat([truth[i][b][:, : real - n], back], 1)
        for store, kept in zip(self.packed, self.tiles, strict=True):
            for b in range(len(kept)):
                kept[b] = kept[b][:, : store.bank.count[b]]

    def crop_needs_what_is_gone(self, counts: list[int]) -> bool:
        for i, store in enumerate(self.layer.stores):
            for b, count in enumerate(counts):
                real = self.k[i][b].shape[1]
                oldest = real - store.tail.count[b]
                if isinstance(store, WindowStore) and store.sink < oldest and real - count - store.recent < oldest:
                    return True
                if isinstance(store, PackedStore) and store.salient is not None and store.salient.count[b]:
                    in_order = (store.bank.count[b] - store.start_tiles[b]) * store.layout.tokens
                    if count > store.tail.count[b] + in_order:
                        return True
        return False

    def select(self, rows: list[int]) -> None:
        self.layer.select(torch.tensor(rows))
        self.valid = self.valid[rows]
        self.k, self.v, self.tiles = ([[x[r] for r in rows] for x in per] for per in (self.k, self.v, self.tiles))

    def reset(self) -> None:
        self.layer.reset()
        self.__dict__.update(k=[], v=[], tiles=[], valid=torch.zeros(0, 0, dtype=torch.bool))

    def check(self) -> None:
        layer = self.layer
        assert layer.tokens == self.valid.shape[1]
        assert layer.real_tokens() == self.valid.sum(1).tolist()
        for i, store in enumerate(layer.stores):
            for b in range(self.valid.shape[0]):
                self.check_store(store, b, self.k[i][b], self.v[i][b])
        for store, kept in zip(self.packed, self.tiles, strict=True):
            for b, known in enumerate(kept):
                now = store.bank.tiles[b, :, : store.bank.count[b]]
                assert now.shape[1] >= known.shape[1]
                assert torch.equal(now[:, : known.shape[1]], known) or not known.numel(), "a packed tile was changed"
                kept[b] = now.clone()
        memory = layer.memory()
        assert all(0 <= memory.in_use[part] <= memory.allocated[part] for part in memory.in_use)

    def check_store(self, store, b: int, k: Tensor, v: Tensor) -> None:
        real, tail = k.shape[1], store.tail.count[b]
        lengths = [int(x) for x in store.lengths[:, b]]
        assert torch.equal(store.tail.k[b, :, :tail], k[:, real - tail :])
        assert torch.equal(store.tail.v[b, :, :tail], v[:, real - tail :])
        if isinstance(store, WholeStore):
            assert lengths == [0, 0, real]
        elif isinstance(store, WindowStore):
            first = min(real, store.sink)
            assert lengths == [first, 0, tail]
            assert torch.equal(store.first.k[b, :, :first], k[:, :first]) and torch.equal(store.first.v[b, :, :first], v[:, :first])
            assert tail >= min(real - first, store.recent - 1), "the next query's window is not complete"
            assert tail < store.recent + 32
        else:
            self.check_packed(store, b, k, v, lengths)

    def check_packed(self, store: PackedStore, b: int, k: Tensor, v: Tensor, lengths: list[int]) -> None:
        quant, real, tail = store.quant, k.shape[1], store.tail.count[b]
        salient = store.salient.count[b] if store.salient is not None else 0
        assert lengths == [store.first.count[b], store.bank.count[b], tail]
        assert real == lengths[0] + (lengths[1] + salient) * quant.tile + tail, "a token was lost or doubled"
        if not store.started[b]:
            assert real == tail
            assert self.waiting or tail < quant.sink + quant.heavy + quant.residual + -(-quant.basis_tokens // quant.tile) * quant.tile
            return
        assert lengths[0] == quant.sink + quant.heavy
        assert self.waiting or tail < quant.residual + quant.tile
        if salient:
            assert torch.equal(store.first.k[b, :, : quant.sink], k[:, : quant.sink])
            return
        order = held(store, b, real).index[..., None]
        k, v = k.gather(1, order.expand_as(k)), v.gather(1, order.expand_as(v))
        end = lengths[0]
        assert torch.equal(store.first.k[b, :, :end], k[:, :end]) and torch.equal(store.first.v[b, :, :end], v[:, :end])
        stored = store.layout.split(store.bank.tiles[b : b + 1, :, : lengths[1]])
        for x, half, codec, basis in zip((k, v), stored, store.codecs, store.basis, strict=True):
            mine = {name: t[b : b + 1] for name, t in basis.items()}
            packed = x[None, :, end : end + lengths[1] * quant.tile]
            if lengths[1]:
                again = codec.unpack(codec.pack(packed, mine), mine)
                same = torch.isclose(codec.unpack(half, mine), again, atol=1e-4, rtol=1e-4)
                assert same.float().mean() > 0.97, "a tile holds other tokens than those of its place"


# -- random lives ------------------------------------------------------------------------------------------------------------------

PADS = st.none() | st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=3)
STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 60), PADS),
    st.tuples(st.just("append"), st.integers(1, 20), st.none()),
    st.tuples(st.just("decode"), st.integers(1, 20)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("crop"), st.floats(0, 0.2)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    st.tuples(st.just("repeat")),
    st.tuples(st.just("reset")),
)


@pytest.mark.parametrize("layout", ["one", "mixed"])
@pytest.mark.parametrize("name", QUANTS)
@settings(max_examples=20)
@given(first=st.tuples(st.integers(1, 3), st.integers(1, 120), PADS), steps=st.lists(STEPS, max_size=10), seed=st.integers(0, 2**16))
@example(first=(2, 1, None), steps=[("append", 42, None), ("crop", 0.0625), ("append", 19, [(0, 0), (11, 6)])], seed=0)
@example(first=(2, 118, [(0, 0), (6, 0)]), steps=[("append", 1, None), ("crop", 0.09375), ("append", 31, [(0, 0), (21, 6)])], seed=0)
def test_random_lives(name: str, layout: str, first: tuple, steps: list[tuple], seed: int) -> None:
    life = Life(layouts(QUANTS[name])[layout], seed)
    life.append(*first)
    life.check()
    for what, *more in steps:
        batch, total = life.valid.shape
        if what == "append":
            life.append(first[0], *more)
        elif what == "decode":
            for _ in range(more[0]):
                life.append(first[0], 1, None)
                life.check()
        elif what == "crop":
            life.crop(round(more[0] * total))
        elif what == "select" and total:
            life.select([r % batch for r in more[0]])
        elif what == "repeat" and total and batch <= 3:
            life.select([r for r in range(batch) for _ in range(2)])
        elif what == "reset":
            life.reset()
        life.check()


# -- what random lives would seldom meet --------------------------------------------------------------------------------------------


def test_each_group_is_packed_once_over_a_long_generation() -> None:
    life = Life(layouts(QUANTS["minmax"])["one"], 0)
    life.append(2, 40, None)
    for _ in range(200):
        life.append(2, 1, None)
        if life.layer.tokens % 5 == 0:
            life.check()
    store = life.packed[0]
    assert store.bank.count == [(240 - 3 - 8) // 16] * 2


@pytest.mark.parametrize("window", [Window(0, 1), Window(2, 8), Window(8, 2)], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 30])
@pytest.mark.parametrize("prompt", [1, 3, 40])
def test_windows_follow_their_rule(window: Window, chunk: int, prompt: int) -> None:
    """Also where a later chunk fills the sink, or is longer than the window. `append` compares with the written-out rule."""
    for pads in (None, [(0, 0), (prompt, 0)], [(prompt + 1, 0), (0, 1)]):
        life = Life((HeadGroup((0, 1, 2, 3), window=window),), 0)
        life.append(2, prompt, pads)
        for i in range(max(60 // chunk, 2)):
            life.append(2, chunk, pads if i == 0 else None)
            life.check()


def test_a_window_holds_fixed_memory() -> None:
    life = Life((HeadGroup((0, 1, 2, 3), window=Window(2, 8)),), 0)
    life.append(1, 500, None)
    allocated = set()
    for i in range(200):
        life.append(1, 1, None)
        if i > 50:
            allocated.add(life.layer.memory().allocated["window"])
    token = 2 * 4 * DIM * 4
    assert len(allocated) == 1 and max(allocated) < token * (2 + 8 + 5 * 16)


def test_stores_share_no_memory_with_the_model() -> None:
    """A first chunk is not copied before it was attended to, but the caller may overwrite it afterwards."""
    for groups in (*layouts(QUANTS["minmax"]).values(), (HeadGroup(),), (HeadGroup((0, 1, 2, 3), window=Window(0, 100)),)):
        groups = tuple(replace(g, kv_heads=(0, 1, 2, 3)) if g.kv_heads is None else g for g in groups)
        layer = CompressedLayer(0, groups, LayerShape(8, 4, DIM), "reference")
        k, v, q = torch.randn(2, 4, 90, DIM), torch.randn(2, 4, 90, DIM), torch.randn(2, 8, 90, DIM)
        layer.stage(k, v)
        layer.attend(q, read_mask(None, 90), 0.25, lambda q, k, v: q.transpose(1, 2))
        before = [t.clone() for s in layer.stores for t in s.tensors().values()]
        k.zero_(), v.zero_(), q.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, (t for s in layer.stores for t in s.tensors().values()), strict=True))


def test_stores_keep_nothing_alive_but_their_own_tensors() -> None:
    """A small view of a large tensor keeps all of it; what is reported as allocated is all that there is."""
    for groups in (*layouts(QUANTS["no-sink-no-residual"]).values(), *layouts(QUANTS["principal-heavy-fp8"]).values()):
        for length in (5, 500):
            life = Life(groups, 0)
            life.append(2, length, None)
            for store in life.layer.stores:
                held = [store.tail.k, store.tail.v, *(() if isinstance(store, WholeStore) else (store.first.k, store.first.v))]
                held += [store.recent.q, store.recent.weight] if isinstance(store, PackedStore) and store.recent is not None else []
                assert all(t.untyped_storage().nbytes() == t.nbytes for t in held)


def test_selected_sequences_share_no_memory() -> None:
    life = Life(layouts(QUANTS["principal-heavy-fp8"])["mixed"], 0)
    life.append(1, 60, None)
    life.select([0, 0])
    life.append(1, 30, [(0, 0), (0, 9)])
    life.check()
    life.append(1, 30, [(0, 7), (0, 0)])
    life.check()


def test_crop_is_all_or_nothing() -> None:
    """The windowed head refuses; the packed head beside it must not have been cropped."""
    life = Life(layouts(QUANTS["minmax"])["mixed"], 0)
    life.append(2, 100, None)
    before = [t.clone() for s in life.layer.stores for t in s.tensors().values()]
    with pytest.raises(CacheStateError, match="at most 16 can be removed"):
        life.layer.crop(40)
    after = [t for s in life.layer.stores for t in s.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    life.check()
    life.crop(16)
    life.check()
    assert life.layer.tokens == 84


@pytest.mark.parametrize("pads", [None, [[True] * 8 + [False] * 2, [False] * 4 + [True] * 6]])
def test_cropped_tokens_leave_no_trace_in_the_codes(pads: list | None) -> None:
    """Their queries steer neither axes nor the choice of heavy tokens: the same bytes as if they had never been."""
    x, q = torch.randn(3, 2, 4, 80, DIM), torch.randn(2, 8, 80, DIM)
    stores = []
    for extra in (0, 10):
        layer = CompressedLayer(0, layouts(QUANTS["principal-heavy-fp8"])["one"], LayerShape(8, 4, DIM), "reference")
        for part in (slice(0, 20), slice(70, 70 + extra), slice(20, 50), slice(50, 60)):
            n = part.stop - part.start
            if not n:
                continue
            mask = torch.tensor(pads) if pads and n == 10 and part.start == 70 else None
            layer.stage(x[0][:, :, part], x[1][:, :, part])
            layer.attend(q[:, :, part], read_mask(mask, n), 0.25, lambda q, k, v: q.transpose(1, 2))
            if part.start == 70:
                layer.crop(10)
        stores.append(layer.stores[0])
    assert stores[0].bank.count == [2, 2]
    assert torch.equal(stores[0].positions, stores[1].positions) and torch.equal(stores[0].bank.tiles, stores[1].bank.tiles)
    assert all(torch.equal(a, b) for a, b in zip(stores[0].basis[0].values(), stores[1].basis[0].values(), strict=True))


def test_salient_tokens_are_those_of_most_attention() -> None:
    """The values of the tokens with the highest given scores come back better than the others."""
    quant = KVQuant(TWO, TRITS, **(SHORT | {"sink": 0, "residual": 0}), salience=Salience(0.25, "given", (AxisClass(6, 1.0, "minmax"),)))
    layer = CompressedLayer(0, (HeadGroup((0, 1, 2, 3), quant=quant),), LayerShape(8, 4, DIM), "reference")
    k, v, q = torch.randn(2, 4, 64, DIM), torch.randn(2, 4, 64, DIM), torch.randn(2, 8, 64, DIM)
    layer.token_scores = torch.rand(2, 64)
    chosen = layer.token_scores.topk(16, -1)[1].sort(-1)[0]
    layer.stage(k, v)
    layer.attend(q, read_mask(None, 64), 0.25, lambda q, k, v: q.transpose(1, 2))
    extra = layer.stores[0].heads().extra[0]
    got = unpack_tiles(extra)[1]
    for b in range(2):
        assert (got[b] - v[b][:, chosen[b]]).norm() < 0.05 * v[b][:, chosen[b]].norm()


@pytest.mark.parametrize("remove", [41, 52, 58])
def test_opening_the_start_puts_whole_tokens_back_in_their_places(remove: int) -> None:
    life = Life(layouts(QUANTS["principal-heavy-fp8"])["one"], 0)
    life.append(2, 61, None)
    assert life.packed[0].started == [True, True]
    life.crop(remove)
    life.check()
    assert life.packed[0].started == [False, False]
    life.append(2, 61, None)
    life.check()
