"""Quantized heads: sink | packed tiles, written once | residual of the newest tokens, whole.

Longer than other files: waiting, starting, packing, crop, fixed capacity and saving all work on the same counts and buffers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CacheStateError, NotFiniteError
from ..ops.heads import HeadSet, numbers_on
from ..ops.pack import Which, kernels_failed, pack, packing_backend
from ..ops.step import Held, Ring
from ..quant.codec import Basis, HalfCodec
from ..quant.metadata import LIMITS, unstorable
from ..quant.spec import KVQuant
from ..quant.tile import TileLayout
from .base import NEVER, Memory, Prompt, Store
from .tail import Tail, check_counts, check_tensor

RECENT_QUERIES = 256  # newest queries whose energy and attention steer the codes
MASS_ELEMENTS = 1 << 25  # scores that attention_mass holds at once


class Bank:
    """Tiles of one layout [B, h, capacity, bytes]; count[b] of sequence b are in use. Written once, never changed."""

    def __init__(self, layout: TileLayout, batch: int, heads: int, device: torch.device) -> None:
        self.layout = layout
        self.tiles = torch.zeros(batch, heads, 0, layout.nbytes, dtype=torch.uint8, device=device)
        self.count = [0] * batch

    def reserve(self, tiles: int) -> None:
        """Make room for `tiles` tiles of every sequence; growth is geometric."""
        if tiles > self.tiles.shape[2]:
            capacity = tiles if self.tiles.shape[2] == 0 else tiles * 9 // 8 + 1
            grown = self.tiles.new_zeros(*self.tiles.shape[:2], capacity, self.tiles.shape[3])
            grown[:, :, : self.tiles.shape[2]] = self.tiles
            self.tiles = grown

    def fix(self, tiles: int) -> None:
        """Move to a buffer of exactly this many tiles, unless it is there already."""
        if tiles != self.tiles.shape[2]:
            used = max(self.count)
            fixed = self.tiles.new_zeros(*self.tiles.shape[:2], tiles, self.tiles.shape[3])
            fixed[:, :, :used] = self.tiles[:, :, :used]
            self.tiles = fixed

    def append(self, rows: list[int], new: Tensor) -> None:
        """Add tiles [rows, h, n, bytes] to sequences that all have the same count."""
        n, start = new.shape[2], self.count[rows[0]]
        self.reserve(start + n)
        index = slice(None) if len(rows) == len(self.count) else torch.tensor(rows, device=new.device)
        self.tiles[index, :, start : start + n] = new
        for b in rows:
            self.count[b] += n

    def select(self, index: Tensor) -> None:
        """Keep these sequences."""
        self.tiles = self.tiles.index_select(0, index.to(self.tiles.device))
        self.count = [self.count[i] for i in index.tolist()]


@dataclass
class Recent:
    """The newest queries, kept until packing starts. q: [B, h, query heads of a KV head, n, D]; weight: float32 [B, n], 0 for padding."""

    q: Tensor
    weight: Tensor

    def drop(self, remove: list[int]) -> None:
        """Forget the queries of the newest remove[b] real tokens; the newest one that is left becomes the last."""
        for b, r in enumerate(remove):
            if r:
                newest = self.weight[b].flip(0).cumsum(0)
                k = min(int((newest < r).sum()) + 1, len(newest))
                self.q[b] = self.q[b].roll(k, -2)
                self.weight[b] = self.weight[b].roll(k)
                self.weight[b, :k] = 0

    def energy(self, index: slice | Tensor) -> Tensor:
        """Mean squared query of each channel, float32 [rows, h, D]."""
        q, w = self.q[index].float(), self.weight[index]
        total = torch.einsum("bhgnd,bn->bhd", q.square(), w) / q.shape[2]
        return total / w.sum(1).clamp(min=1)[:, None, None]

    def attention_mass(self, index: slice | Tensor, k: Tensor, scale: float) -> Tensor:
        """Mean attention that each key draws from those of these queries that see it; the queries are those of the newest keys.

        k: [rows, h, T, D]; scale: factor of the scores -> float32 [rows, h, T].
        """
        q, w = self.q[index], self.weight[index]
        total, n = k.shape[2], q.shape[3]
        mass = torch.zeros(k.shape[:3], device=k.device)
        step = max(1, MASS_ELEMENTS // (q.shape[0] * q.shape[1] * q.shape[2] * total))
        place = torch.arange(total, device=k.device)
        for i in range(0, n, step):
            scores = torch.einsum("bhgnd,bhtd->bhgnt", q[:, :, :, i : i + step], k).float() * scale
            own = (torch.arange(i, min(i + step, n), device=k.device) + total - n).clamp(min=0)  # padding rows, weight 0, see one key
            scores = scores.masked_fill(place > own[:, None], -torch.inf)
            mass += torch.einsum("bhgnt,bn->bht", scores.softmax(-1), w[:, i : i + step])
        seen_by = (total - place).clamp(max=n)  # newest tokens are seen by fewer of the queries
        return mass / seen_by


class PackedStore(Store):
    """One head group under a KVQuant. See quant.spec.KVQuant for the rules, quant.tile for the bytes."""

    def __init__(self, kv_heads: tuple[int, ...], k: Tensor, v: Tensor, quant: KVQuant, backend: str) -> None:
        super().__init__(kv_heads, k, v, backend)
        batch, heads, _, dim = k.shape
        self.quant = quant
        self.layout = TileLayout.of(quant, dim)
        self.codecs = HalfCodec(self.layout.keys), HalfCodec(self.layout.values)
        self.first = Tail(k, v)
        self.bank = Bank(self.layout, batch, heads, k.device)
        self.salient: Bank | None = None
        if quant.salience is not None:
            better = replace(quant.values, classes=quant.salience.classes)
            self.salient = Bank(TileLayout.of(quant, dim, better), batch, heads, k.device)
        self.basis: tuple[Basis, Basis] = ({}, {})
        self.started = [False] * batch
        self.recent: Recent | None = None
        self.positions = torch.zeros(batch, heads, quant.heavy, dtype=torch.int32, device=k.device)
        self.start_tiles = [0] * batch
        self.leave = quant.tile
        self.ring: Ring | None = None
        self.query_group = 0
        self.status = torch.zeros(1, dtype=torch.int32, device=k.device)
        self.unchecked = False  # tiles whose status nobody has read yet

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """See Store.append."""
        self.tail.append(k, v, valid)
        self._sync()

    def _host_counts(self) -> list[list[int]]:
        limits = [self.quant.residual + self.quant.tile if started else NEVER for started in self.started]
        return [self.first.count, self.bank.count, self.tail.count, limits]

    @property
    def wants_prompt(self) -> bool:
        """Whether `compress` looks at the chunk's queries and scores."""
        return not all(self.started)

    def compress(self, prompt: Prompt | None) -> None:
        """Pack every full tile that is older than the residual."""
        self._observe(prompt)
        quant = self.quant
        start = [0 if s else quant.start_tiles(c) for s, c in zip(self.started, self.tail.count, strict=True)]
        over = [max(c - quant.residual, 0) for c in self.tail.count]  # crop may have left fewer
        due = [o // quant.tile if s else 0 for s, o in zip(self.started, over, strict=True)]
        if any(start):
            self._start(start, prompt)
            self._sync()
        if max(due) == 1 and not self.tail.borrowed:
            self._pack_oldest(due)
        elif max(due) > 0:
            self._pack_tail(due)
            self._sync()
        self.tail.own()
        self.tail.trim(quant.residual + quant.tile)
        if all(self.started):
            self.recent = None

    def _observe(self, prompt: Prompt | None) -> None:
        """Remember the chunk's newest queries, while a sequence has not started."""
        if prompt is None or not self.quant.needs_queries or all(self.started):
            return
        q, w = prompt.queries.to(self.tail.k.dtype), prompt.weight
        self.query_group = q.shape[2]
        if self.recent is None and not prompt.padded:
            newest = q[:, :, :, -RECENT_QUERIES:].clone(memory_format=torch.contiguous_format)  # a view would keep all queries alive
            self.recent = Recent(newest, w[:, -RECENT_QUERIES:])
            return
        if self.recent is not None:
            q, w = torch.cat([self.recent.q, q], 3), torch.cat([self.recent.weight, w], 1)
        order = w.bool().int().argsort(dim=1, stable=True)[:, -RECENT_QUERIES:]  # padding first: the last queries belong to the last keys
        self.recent = Recent(q.gather(3, order[:, None, None, :, None].expand(*q.shape[:3], -1, q.shape[4])), w.gather(1, order))

    def _pack_oldest(self, due: list[int]) -> None:
        """Pack the oldest tile of the sequences whose tail has grown to its limit: decided on the device, the host only counts along."""
        self.bank.reserve(max(c + d for c, d in zip(self.bank.count, due, strict=True)))
        self._pack(self.counts, 1, due=True)
        self._let_oldest_leave()
        self._count_packed(due)
        self.tail.count = [c - d * self.quant.tile for c, d in zip(self.tail.count, due, strict=True)]

    def _pack_tail(self, due: list[int]) -> None:
        """Pack the oldest due[b] tiles of each sequence."""
        self.bank.reserve(max(c + d for c, d in zip(self.bank.count, due, strict=True)))
        jobs = numbers_on(self.tail.k.device, [[0] * len(due), due, self.bank.count])
        self._pack(jobs, max(due), due=False)
        self._count_packed(due)
        self.tail.drop_front([d * self.quant.tile for d in due], self.quant.residual + self.quant.tile)

    def _pack(self, jobs: Tensor, most: int, due: bool) -> None:
        """Keys and values of the tail into the bank, see ops.pack; tokens that cannot be packed are an error before anything is counted."""
        halves: list[tuple[Which, Tensor, Basis]] = [("keys", self.tail.k, self.basis[0]), ("values", self.tail.v, self.basis[1])]
        if self._packer == "reference":
            self._check_finite()
        for which, x, basis in halves:
            pack(x, self.bank.tiles, jobs, most, self.layout, which, basis, due=due, status=self.status, backend=self.backend)
        self._check_status()

    @property
    def _packer(self) -> str:
        return packing_backend(self.tail.k, self.backend)

    def _count_packed(self, tiles: list[int]) -> None:
        self.bank.count = [c + n for c, n in zip(self.bank.count, tiles, strict=True)]

    def _start(self, tiles: list[int], prompt: Prompt | None) -> None:
        """Find the basis of the sequences with tiles[b] > 0, and pack their first tiles[b] tiles."""
        if self._packer == "triton" and self.salient is None:
            from triton.errors import TritonError

            try:
                self._start_together(tiles, prompt)
                return
            except TritonError as e:
                kernels_failed(e, f"pack a prompt of head_dim {self.tail.k.shape[3]} in {self.tail.k.dtype}", self.backend)
        alike: dict[tuple[int, int], list[int]] = {}
        for b, n in enumerate(tiles):
            if n:
                alike.setdefault((self.tail.count[b], n), []).append(b)
        for (count, n), rows in alike.items():
            self._start_alike(rows, count, n, prompt)

    def _started(self, tiles: list[int]) -> None:
        """Note which sequences have started, and that their tokens have left the tail."""
        whole = self.quant.sink + self.quant.heavy
        self.tail.drop_front([n * self.quant.tile + whole if n else 0 for n in tiles], self.quant.residual + self.quant.tile)
        for b, n in enumerate(tiles):
            if n:
                self.first.count[b], self.started[b] = whole, True

    def _start_alike(self, rows: list[int], count: int, n: int, prompt: Prompt | None) -> None:
        """In plain PyTorch, for sequences of one length."""
        quant = self.quant
        everyone = len(rows) == len(self.tail.count)
        index = slice(None) if everyone else torch.tensor(rows, device=self.tail.k.device)
        end = n * quant.tile + quant.sink + quant.heavy
        self._check_finite()
        mass = self._mass(rows, index, count, prompt)
        k, v, mass = self._set_apart(index, self.tail.k[index, :, :end], self.tail.v[index, :, :end], mass)
        k, v = k.float(), v.float()
        self._find_basis(index, k, v, mass)
        basis = tuple({name: t[index] for name, t in half.items()} for half in self.basis)
        salient = round(quant.salience.share * n) if quant.salience is not None and mass is not None else 0
        for b in rows:
            self.start_tiles[b] = n - salient
        if salient and self.salient is not None and mass is not None:
            chosen = salient * quant.tile
            order = mass.argsort(dim=-1, descending=True, stable=True)
            order = torch.cat([order[..., :chosen].sort(-1)[0], order[..., chosen:].sort(-1)[0]], -1)[..., None]
            k, v = k.gather(2, order.expand_as(k)), v.gather(2, order.expand_as(v))
            mass = mass.gather(2, order[..., 0])
            early = self._tiles(self.salient.layout, k[:, :, :chosen], v[:, :, :chosen], basis, mass[..., :chosen])
            self.salient.append(rows, early)
            k, v, mass = k[:, :, chosen:], v[:, :, chosen:], mass[..., chosen:]
        if k.shape[2]:  # all tiles of a short prompt may be salient
            self.bank.append(rows, self._tiles(self.layout, k, v, basis, mass))
        self._started([n if b in rows else 0 for b in range(len(self.started))])

    def _start_together(self, tiles: list[int], prompt: Prompt | None) -> None:
        """With kernels, for all sequences at once, each with its own number of tiles."""
        from ..ops import triton_prompt

        quant, device = self.quant, self.tail.k.device
        whole = quant.sink + quant.heavy
        self.bank.reserve(max(tiles))
        recent = self.recent
        begin = triton_prompt.Begin(
            self.tail.k, self.tail.v, [c if n else 0 for c, n in zip(self.tail.count, tiles, strict=True)], tiles, quant.sink, quant.heavy,
            queries=recent.q if recent and quant.needs_mass else None, weight=recent.weight if recent and quant.needs_mass else None,
            scale=prompt.scale if prompt else 1.0, energy=recent.energy(slice(None)) if recent else None, backend=self.backend,
        )  # fmt: skip
        positions, found = triton_prompt.start(begin, self.codecs, self.bank.tiles, self.layout, self.status)
        self.unchecked = True  # to wait for the kernels here would keep the host from starting the next layer
        self.first.reserve(whole)
        first = torch.arange(quant.sink, device=device).expand(*positions.shape[:2], -1)
        place = torch.cat([first, positions.long()], -1)[..., None]
        index = slice(None) if all(tiles) else numbers_on(device, [b for b, n in enumerate(tiles) if n]).long()
        for buffer, x in ((self.first.k, self.tail.k), (self.first.v, self.tail.v)):
            buffer[index, :, :whole] = x.gather(2, place.expand(-1, -1, -1, x.shape[3]))[index]
        self.positions[index] = positions[index]
        for half, basis in zip(self.basis, found, strict=True):
            self._keep_basis(half, index, {name: t[index] for name, t in basis.items()})
        for b, n in enumerate(tiles):
            if n:
                self.start_tiles[b] = n
        self._count_packed(tiles)
        self._started(tiles)

    @staticmethod
    def _tiles(layout: TileLayout, k: Tensor, v: Tensor, basis: tuple[Basis, ...], mass: Tensor | None) -> Tensor:
        """Pack k, v float32 [rows, h, T, D]; mass [rows, h, T] or None."""
        codecs = HalfCodec(layout.keys), HalfCodec(layout.values)
        return torch.cat([c.pack(x, b, c.weights(mass)) for c, x, b in zip(codecs, (k, v), basis, strict=True)], -1)

    def _mass(self, rows: list[int], index: slice | Tensor, count: int, prompt: Prompt | None) -> Tensor | None:
        """Salience [rows, h, count] of all tokens in the tail, or None when the plan does not ask for it."""
        quant = self.quant
        if quant.salience is not None and quant.salience.scored:
            assert prompt is not None and prompt.scores is not None  # see CompressedLayer._take_scores
            given = torch.stack([prompt.scores[b][:count] for b in rows]).to(self.tail.k.device)
            return given.float()[:, None].expand(-1, self.tail.k.shape[1], -1)
        if self.recent is None or prompt is None or not quant.needs_mass:
            return None
        return self.recent.attention_mass(index, self.tail.k[index, :, :count], prompt.scale)

    def _set_apart(self, index: slice | Tensor, k: Tensor, v: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Move sink and heavy tokens to the whole ones; returns what is left to pack, in order."""
        sink, heavy, end = self.quant.sink, self.quant.heavy, k.shape[2]
        if not sink + heavy:
            return k, v, None if mass is None else mass[..., :end]
        order = torch.arange(end, device=k.device).expand(*k.shape[:2], end)
        if heavy and mass is not None:
            top = (mass[..., sink:end].topk(heavy, -1)[1] + sink).sort(-1)[0]
            chosen = torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device).scatter_(2, top, True)
            chosen[..., :sink] = True
            order = chosen.logical_not().int().argsort(dim=-1, stable=True)
        whole = order[..., : sink + heavy]
        self.positions[index] = whole[..., sink:].to(torch.int32)
        self.first.reserve(sink + heavy)
        parts = []
        for buffer, x in ((self.first.k, k), (self.first.v, v)):
            wide = order[..., None].expand_as(x)
            sorted_x = x.gather(2, wide)
            buffer[index, :, : sink + heavy] = sorted_x[:, :, : sink + heavy]
            parts.append(sorted_x[:, :, sink + heavy :])
        rest = None if mass is None else mass[..., :end].gather(2, order)[..., sink + heavy :]
        return parts[0], parts[1], rest

    def _find_basis(self, index: slice | Tensor, k: Tensor, v: Tensor, mass: Tensor | None) -> None:
        energy = torch.ones_like(k[:, :, 0]) if self.recent is None else self.recent.energy(index)
        for half, codec, x in zip(self.basis, self.codecs, (k, v), strict=True):
            self._keep_basis(half, index, codec.find_basis(x, energy, codec.weights(mass)))

    def _keep_basis(self, half: Basis, index: slice | Tensor, found: Basis) -> None:
        for name, t in found.items():
            if name not in half and isinstance(index, slice):
                half[name] = t.contiguous()
                continue
            if name not in half:
                half[name] = t.new_zeros(len(self.started), *t.shape[1:])
            half[name][index] = t

    def _check_finite(self) -> None:
        """Raise NotFiniteError where the tail holds what cannot be quantized."""
        limit, used = LIMITS[self.quant.metadata], max(self.tail.count)
        for what, x in (("keys", self.tail.k), ("values", self.tail.v)):
            low, high = torch.stack(torch.aminmax(x[:, :, :used])).tolist()
            if not -limit <= low <= high <= limit:
                raise NotFiniteError(
                    f"The {what} of KV heads {self.kv_heads} hold {low} to {high}; quantization needs finite numbers of magnitude at most"
                    f" {limit:.0f}. Look for an overflow in the model (float16 weights? try bfloat16) or keep these heads whole in the plan."
                )

    def _check_status(self) -> None:
        """Raise NotFiniteError where the kernels met a step or centre that cannot be stored."""
        self.unchecked = False
        largest = self.status.view(torch.float32).item()
        if not largest <= LIMITS[self.quant.metadata]:
            self.status.zero_()
            self._check_finite()
            raise unstorable(largest, self.quant.metadata)

    def check_crop(self, remove: list[int]) -> None:
        """See Store.check_crop. Impossible into a prompt whose salient tokens were sorted when it was packed."""
        for b, r in enumerate(remove):
            in_order = (self.bank.count[b] - self.start_tiles[b]) * self.layout.tokens
            beyond = r - self.tail.count[b]
            if beyond > in_order and self.salient is not None and self.salient.count[b]:
                raise CacheStateError(
                    f"crop would remove {r} tokens of sequence {b}, of which only the newest {self.tail.count[b] + in_order} lie in order: "
                    "the prompt's salient tokens were sorted when it was packed. Crop less, or reset() the cache."
                )

    def crop(self, remove: list[int]) -> None:
        """See Store.crop. Packed tokens are opened again, a tile at a time, and wait in the residual to be packed anew."""
        if self.recent is not None:
            self.recent.drop(remove)
        for b, r in enumerate(remove):
            beyond = r - self.tail.count[b]
            if beyond <= 0:
                self.tail.count[b] -= r
                continue
            self.tail.count[b] = 0
            self._open(b, beyond)
        self._sync()

    def _open(self, b: int, beyond: int) -> None:
        tokens = self.layout.tokens
        tiles = -(-beyond // tokens)
        if tiles > self.bank.count[b] - self.start_tiles[b]:
            self._open_all(b, beyond)
            return
        last = self.bank.count[b]
        k, v = self._unpack(b, last - tiles, last)
        self.bank.count[b] = last - tiles
        keep = tiles * tokens - beyond
        self.tail.put_front(b, k[:, :keep], v[:, :keep])

    def _unpack(self, b: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tiles first..last of sequence b, restored: [h, tokens, D]."""
        halves = self.layout.split(self.bank.tiles[b : b + 1, :, first:last])
        parts = [
            codec.unpack(half, {name: t[b : b + 1] for name, t in basis.items()})[0]
            for codec, half, basis in zip(self.codecs, halves, self.basis, strict=True)
        ]
        return parts[0], parts[1]

    def _open_all(self, b: int, beyond: int) -> None:
        """Restore the whole sequence, in order, without its newest `beyond` tokens; it is packed anew when it is long enough."""
        whole = self.first.count[b]
        packed = self._unpack(b, 0, self.bank.count[b]) if self.bank.count[b] else (self.tail.k[b, :, :0], self.tail.v[b, :, :0])
        total = whole + packed[0].shape[1]
        heavy = self.positions[b].long()
        taken = torch.zeros(heavy.shape[0], total, dtype=torch.bool, device=heavy.device).scatter_(1, heavy, True)
        taken[:, : whole - heavy.shape[1]] = True
        place = taken.logical_not().int().argsort(dim=-1, stable=True)  # places of: sink, heavy, packed tokens
        parts = []
        for first, rest in zip((self.first.k, self.first.v), packed, strict=True):
            tokens = torch.cat([first[b, :, :whole].float(), rest.float()], 1)
            parts.append(torch.empty_like(tokens).scatter_(1, place[..., None].expand_as(tokens), tokens)[:, : total - beyond])
        self.first.count[b], self.bank.count[b], self.start_tiles[b], self.started[b] = 0, 0, 0, False
        self.tail.put_front(b, *parts)

    def heads(self) -> HeadSet:
        """See Store.heads."""
        out = self._view(any(self.bank.count), self.salient is not None and any(self.salient.count))
        out.known = self._host_counts()[:3]
        return out

    def _view(self, tiles: bool, salient: bool) -> HeadSet:
        if self.unchecked:
            self._check_status()
        extra: tuple[HeadSet, ...] = ()
        if salient and self.salient is not None:
            none = [0] * len(self.salient.count)
            known = [none, self.salient.count, none]
            empty = self.tail.k.new_empty(*self.tail.k.shape[:2], 0, self.tail.k.shape[3])
            lengths = numbers_on(self.counts.device, known)
            tiles_of = self.salient.tiles, self.salient.layout, *self.basis
            extra = (HeadSet(self.kv_heads, empty, empty, lengths, None, None, *tiles_of, known=known),)
        return HeadSet(
            self.kv_heads, self.tail.k, self.tail.v, self.lengths, self.first.k, self.first.v, self.bank.tiles if tiles else None, self.layout,
            *self.basis, extra=extra,
        )  # fmt: skip

    # -- fixed capacity ------------------------------------------------------------------------------------------------------------

    def fix(self, capacity: int) -> Held:
        """See Store.fix. Where a sequence waits for its basis, the buffers are those that it needs after its start, and queries are remembered."""
        quant = self.quant
        whole = quant.sink + quant.heavy
        waits, begins = not all(self.started), capacity >= quant.start_length
        self.tail.fix(min(max(self.tail.keep, quant.start_length if waits else quant.residual + quant.tile), capacity))
        if begins:
            self.first.fix(whole)
            self.bank.fix((capacity - whole - quant.residual) // quant.tile)
            for codec, half in zip(self.codecs, self.basis, strict=True):
                self._make_room(codec, half)
        if begins and self.salient is not None and quant.salience is not None:
            later = round(quant.salience.share * quant.start_tiles(quant.start_length)) if waits else 0
            self.salient.fix(max(later, *self.salient.count))
        if waits and begins and quant.needs_queries:
            self._fill_ring()
        view = self._view(begins, begins and self.salient is not None and self.salient.tiles.shape[2] > 0)
        return Held(view, self.counts, self.leave, self.status, self.ring)

    def _make_room(self, codec: HalfCodec, half: Basis) -> None:
        """Zeros in place of a basis that is not found yet."""
        if not half:
            like = torch.arange(codec.layout.tokens * codec.head_dim).float().sin().view(1, 1, -1, codec.head_dim)
            for name, t in codec.find_basis(like, torch.ones(1, 1, codec.head_dim)).items():
                half[name] = torch.zeros(*self.tail.k.shape[:2], *t.shape[2:], dtype=t.dtype, device=self.tail.k.device)

    def _fill_ring(self) -> None:
        batch, heads, _, dim = self.tail.k.shape
        if self.ring is None:
            q = self.tail.k.new_zeros(batch, heads, self.query_group, RECENT_QUERIES, dim)
            weight = torch.zeros(batch, RECENT_QUERIES, device=q.device)
            self.ring = Ring(q, weight, torch.zeros(1, dtype=torch.int64, device=q.device))
        for buffer in (self.ring.q, self.ring.weight, self.ring.place):
            buffer.zero_()
        if self.recent is not None:
            known = self.recent.weight.shape[1]
            self.ring.q[:, :, :, RECENT_QUERIES - known :] = self.recent.q
            self.ring.weight[:, RECENT_QUERIES - known :] = self.recent.weight

    def adopt(self, counts: list[list[int]], tokens: int) -> None:
        """See Store.adopt."""
        super().adopt(counts, tokens)
        self.bank.count = counts[1]
        self._check_status()
        if self.ring is not None and self.wants_prompt:
            oldest = int(self.ring.place)
            self.recent = Recent(self.ring.q.roll(-oldest, 3), self.ring.weight.roll(-oldest, 1))

    def steps_to_start(self) -> int | None:
        """How many tokens are missing until the next sequence finds its basis; None: all have theirs."""
        return min((self.quant.start_length - c for s, c in zip(self.started, self.tail.count, strict=True) if not s), default=None)

    def steps_to_pack(self) -> set[int]:
        """How many tokens are missing until a sequence packs its next tile; each further one comes `quant.tile` tokens later."""
        return {self.quant.residual + self.quant.tile - c for s, c in zip(self.started, self.tail.count, strict=True) if s}

    @property
    def lossless(self) -> bool:
        """True before the first tile is packed, while all sequences have the same length."""
        return not any(self.started) and self.tail.uniform is not None

    def select(self, index: Tensor) -> None:
        """See Store.select."""
        super().select(index)
        self.first.select(index)
        self.bank.select(index)
        if self.salient is not None:
            self.salient.select(index)
        for half in self.basis:
            for name, t in half.items():
                half[name] = t.index_select(0, index.to(t.device))
        where = index.to(self.positions.device)
        if self.recent is not None:
            self.recent = Recent(self.recent.q.index_select(0, where), self.recent.weight.index_select(0, where))
        self.positions = self.positions.index_select(0, where)
        self.start_tiles = [self.start_tiles[i] for i in index.tolist()]
        self.started = [self.started[i] for i in index.tolist()]
        self.ring = None

    def appended(self) -> list[int]:
        """See Store.appended."""
        salient = [0] * len(self.started) if self.salient is None else self.salient.count
        counts = zip(self.first.count, self.bank.count, salient, self.tail.count, strict=True)
        return [first + (tiles + more) * self.quant.tile + tail for first, tiles, more, tail in counts]

    def memory(self) -> Memory:
        """See Store.memory."""
        out = Memory()
        out.add("sink", sum(self.first.count) * self.first.token_bytes, self.first.k.nbytes + self.first.v.nbytes)
        for bank in (self.bank, self.salient):
            if bank is None:
                continue
            heads, capacity = bank.tiles.shape[1:3]
            codes = bank.layout.code_bytes
            used, held = sum(bank.count) * heads, len(bank.count) * capacity * heads
            out.add("codes", used * codes, held * codes)
            out.add("metadata", used * (bank.layout.nbytes - codes), held * (bank.layout.nbytes - codes))
        out.add("residual", sum(self.tail.count) * self.tail.token_bytes, self.tail.k.nbytes + self.tail.v.nbytes)
        basis = sum(t.nbytes for half in self.basis for t in half.values()) + (self.positions.nbytes if any(self.started) else 0)
        out.add("basis", basis, basis)
        statistics = 0 if self.recent is None else self.recent.q.nbytes + self.recent.weight.nbytes
        ring = 0 if self.ring is None else self.ring.q.nbytes + self.ring.weight.nbytes
        out.add("statistics", statistics, statistics + ring)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """See Store.tensors."""
        if self.unchecked:
            self._check_status()
        out = self.first.tensors("sink") | self.tail.tensors("tail")
        out["tiles"] = self.bank.tiles[:, :, : max(self.bank.count)]
        if self.salient is not None:
            out["salient"] = self.salient.tiles[:, :, : max(self.salient.count)]
        for which, half in zip(("key", "value"), self.basis, strict=True):
            out |= {f"{which}_basis.{name}": t for name, t in half.items()}
        out["positions"] = self.positions
        if self.recent is not None:
            out |= {"queries": self.recent.q, "weight": self.recent.weight}
        return out

    def state(self) -> dict[str, object]:
        """See Store.state."""
        salient = [] if self.salient is None else self.salient.count
        packed = {"tiles": self.bank.count, "salient": salient, "started": self.started, "start_tiles": self.start_tiles}
        return self.first.state("sink") | self.tail.state("tail") | packed

    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """See Store.restore."""
        self.first.restore("sink", tensors, state)
        self.tail.restore("tail", tensors, state)
        batch, heads, _, dim = self.tail.k.shape
        for name, bank in (("tiles", self.bank), ("salient", self.salient)):
            if bank is not None:
                bank.count = check_counts(name, state[name], batch)
                bank.tiles = check_tensor(name, tensors[name], (batch, heads, max(bank.count), bank.layout.nbytes), torch.uint8)
        self.started = [bool(x) for x in check_counts("started", state["started"], batch)]
        self.start_tiles = check_counts("start_tiles", state["start_tiles"], batch)
        like = torch.arange(self.layout.tokens * dim).float().sin().view(1, 1, self.layout.tokens, dim)
        for which, half, codec in zip(("key", "value"), self.basis, self.codecs, strict=True):
            known = any(self.started) or any(n.startswith(f"{which}_basis.") for n in tensors)
            expected = codec.find_basis(like, torch.ones(1, 1, dim)) if known else {}
            for name, t in expected.items():
                saved = f"{which}_basis.{name}"
                half[name] = check_tensor(saved, tensors[saved], (batch, heads, *t.shape[2:]), t.dtype)
        self.positions = check_tensor("positions", tensors["positions"], (batch, heads, self.quant.heavy), torch.int32)
        if "queries" in tensors:
            q, weight = tensors["queries"], tensors["weight"]
            if q.ndim != 5:
                raise ValueError(f"queries have shape {list(q.shape)}")
            check_tensor("queries", q, (batch, heads, q.shape[2], q.shape[3], dim), self.tail.k.dtype)
            self.recent = Recent(q, check_tensor("weight", weight, (batch, q.shape[3]), torch.float32))
        self._sync()
