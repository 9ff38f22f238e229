"""Quantized heads: sink | packed tiles, written once | residual of the newest tokens, whole."""

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CacheStateError, NotFiniteError
from ..ops.heads import HeadSet
from ..quant.codec import Basis, HalfCodec
from ..quant.metadata import FP16_MAX
from ..quant.spec import KVQuant
from ..quant.tile import TileLayout
from .base import Memory, Prompt, Store
from .tail import Tail

RECENT_QUERIES = 256  # newest queries of a chunk whose energy and attention steer the codes


class Bank:
    """Tiles of one layout [B, h, capacity, bytes]; count[b] of sequence b are in use. Written once, never changed."""

    def __init__(self, layout: TileLayout, batch: int, heads: int, device: torch.device) -> None:
        self.layout = layout
        self.tiles = torch.zeros(batch, heads, 0, layout.nbytes, dtype=torch.uint8, device=device)
        self.count = [0] * batch

    def append(self, rows: list[int], new: Tensor) -> None:
        """Add tiles [rows, h, n, bytes] to sequences that all have the same count."""
        n, start = new.shape[2], self.count[rows[0]]
        if start + n > self.tiles.shape[2]:
            capacity = start + n if self.tiles.shape[2] == 0 else max(start + n, (start + n) * 9 // 8 + 1)
            grown = self.tiles.new_zeros(*self.tiles.shape[:2], capacity, self.tiles.shape[3])
            grown[:, :, : self.tiles.shape[2]] = self.tiles
            self.tiles = grown
        index = slice(None) if len(rows) == len(self.count) else torch.tensor(rows, device=new.device)
        self.tiles[index, :, start : start + n] = new
        for b in rows:
            self.count[b] += n

    def select(self, index: Tensor) -> None:
        """Keep these sequences."""
        self.tiles = self.tiles.index_select(0, index.to(self.tiles.device))
        self.count = [self.count[i] for i in index.tolist()]


class PackedStore(Store):
    """One head group under a KVQuant. See quant.spec.KVQuant for the rules, quant.tile for the bytes."""

    def __init__(self, kv_heads: tuple[int, ...], k: Tensor, v: Tensor, quant: KVQuant) -> None:
        super().__init__(kv_heads, k, v)
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
        self.energy: Tensor | None = torch.zeros(batch, heads, dim + 1, device=k.device) if self._needs_energy else None

    @property
    def _needs_energy(self) -> bool:
        return any(s.query_weighted or s.order == "query" for s in (self.quant.keys, self.quant.values))

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """See Store.append."""
        self.tail.append(k, v, valid)
        self._sync()

    def _sync(self) -> None:
        self._sync_lengths(self.first.count, self.bank.count)

    def compress(self, prompt: Prompt | None) -> None:
        """Pack every full tile that is older than the residual."""
        self._observe(prompt)
        quant = self.quant
        least = -(-quant.basis_tokens // quant.tile) * quant.tile
        due: dict[tuple[int, int, bool, int], list[int]] = {}
        for b, count in enumerate(self.tail.count):
            sink = 0 if self.started[b] else quant.sink
            if count - sink - quant.residual >= (quant.tile if self.started[b] else least):
                key = (count, self.bank.count[b], self.started[b], self.salient.count[b] if self.salient else 0)
                due.setdefault(key, []).append(b)
        for (count, _, started, _), rows in due.items():
            self._pack(rows, count, started, prompt)
        self.tail.own()
        if due:
            self._sync()
        if all(self.started):
            self.energy = None

    def _observe(self, prompt: Prompt | None) -> None:
        """Add the chunk's newest queries to the statistics, while a sequence has no basis yet."""
        if self.energy is None or prompt is None:
            return
        q, w = prompt.queries.float(), prompt.weight
        self.energy[..., :-1] += torch.einsum("bhgnd,bn->bhd", q.square(), w) / q.shape[2]
        self.energy[..., -1] += w.sum(1)[:, None]

    def _pack(self, rows: list[int], count: int, started: bool, prompt: Prompt | None) -> None:
        quant = self.quant
        everyone = len(rows) == len(self.tail.count)
        index = slice(None) if everyone else torch.tensor(rows, device=self.tail.k.device)
        sink = 0 if started else quant.sink
        n = (count - sink - quant.residual) // quant.tile
        end = sink + n * quant.tile
        whole_k, whole_v = self.tail.k[index, :, :end], self.tail.v[index, :, :end]
        k, v = whole_k[:, :, sink:].float(), whole_v[:, :, sink:].float()
        self._check_finite(k, "keys")
        self._check_finite(v, "values")
        if not started:
            self._start(rows, index, whole_k[:, :, :sink], whole_v[:, :, :sink], k, v)
        basis = tuple({name: t[index] for name, t in half.items()} for half in self.basis)
        salient = 0
        if self.salient is not None and not started and prompt is not None:
            salient = round(quant.salience.share * n) if quant.salience else 0
        if salient and self.salient is not None:
            order = self._salience(rows, index, prompt, k, sink).argsort(dim=-1, descending=True, stable=True)
            chosen = salient * quant.tile
            order = torch.cat([order[..., :chosen].sort(-1)[0], order[..., chosen:].sort(-1)[0]], -1)[..., None]
            k, v = k.gather(2, order.expand_as(k)), v.gather(2, order.expand_as(v))
            self.salient.append(rows, self._tiles(self.salient.layout, k[:, :, :chosen], v[:, :, :chosen], basis))
            k, v = k[:, :, chosen:], v[:, :, chosen:]
        self.bank.append(rows, self._tiles(self.layout, k, v, basis))
        self.tail.drop_front(rows, end, quant.residual + quant.tile)

    @staticmethod
    def _tiles(layout: TileLayout, k: Tensor, v: Tensor, basis: tuple[Basis, ...]) -> Tensor:
        halves = HalfCodec(layout.keys).pack(k, basis[0]), HalfCodec(layout.values).pack(v, basis[1])
        return torch.cat(halves, -1)

    def _check_finite(self, x: Tensor, what: str) -> None:
        largest = x.abs().max().item()
        limit = FP16_MAX if self.quant.metadata == "fp16" else float("inf")
        if not largest <= limit or largest == float("inf"):
            raise NotFiniteError(
                f"The {what} of KV heads {self.kv_heads} hold {largest} (largest magnitude); quantization needs finite numbers"
                f"{f' of at most {FP16_MAX:.0f}' if limit == FP16_MAX else ''}. Look for an overflow in the model (float16 weights? "
                "try bfloat16) or keep these heads whole in the plan."
            )

    def _start(self, rows: list[int], index: slice | Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor) -> None:
        """Fill the sink and find the basis of sequences that are packed for the first time."""
        if self.quant.sink:
            self.first.reserve(self.quant.sink)
            self.first.k[index, :, : self.quant.sink] = sink_k
            self.first.v[index, :, : self.quant.sink] = sink_v
        energy = torch.ones_like(k[:, :, 0])
        if self.energy is not None:
            counted = self.energy[index]
            energy = counted[..., :-1] / counted[..., -1:].clamp(min=1)
        for half, codec, x in zip(self.basis, self.codecs, (k, v), strict=True):
            for name, t in codec.find_basis(x, energy).items():
                if name not in half:
                    half[name] = t.new_zeros(len(self.started), *t.shape[1:])
                half[name][index] = t
        for b in rows:
            self.first.count[b] = self.quant.sink
            self.started[b] = True

    def _salience(self, rows: list[int], index: slice | Tensor, prompt: Prompt | None, k: Tensor, sink: int) -> Tensor:
        """Scores [rows, h, T] of the tokens that are packed now."""
        assert self.quant.salience is not None and prompt is not None
        if self.quant.salience.by == "given":
            if prompt.scores is None:
                raise CacheStateError(
                    'The plan protects salient tokens by given scores (Salience.by="given"), but none were given. Call '
                    'cache.set_token_scores(scores) with float scores [batch, prompt tokens] before the prompt, or use by="attention".'
                )
            given = torch.stack([prompt.scores[b][sink : sink + k.shape[2]] for b in rows]).to(k.device)
            return given[:, None].expand(-1, k.shape[1], -1)
        q = prompt.queries[index].float()
        weight = prompt.weight[index][:, None, None, :, None]
        scores = torch.einsum("bhgnd,bhtd->bhgnt", q, k) * k.shape[-1] ** -0.5
        return (scores.softmax(-1) * weight).sum((2, 3))

    def crop(self, remove: list[int]) -> None:
        """See Store.crop. Packed tokens are opened again, a tile at a time, and wait in the residual to be packed anew."""
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
        if tiles > self.bank.count[b]:
            if self.salient is not None and self.salient.count[b]:
                raise CacheStateError(
                    f"crop would remove {beyond} packed tokens of sequence {b}, of which only the newest {self.bank.count[b] * tokens} "
                    "lie in order: the prompt's salient tokens were sorted when it was packed. Crop less, or reset() the cache."
                )
            beyond -= self.bank.count[b] * tokens
            self.bank.count[b] = 0
            left = self.first.count[b] - beyond
            self.first.count[b], self.started[b] = 0, False
            self.tail.put_front(b, self.first.k[b, :, :left], self.first.v[b, :, :left])
            if self._needs_energy and self.energy is None:
                shape = (len(self.started), self.tail.k.shape[1], self.tail.k.shape[3] + 1)
                self.energy = torch.zeros(shape, device=self.tail.k.device)
            if self.energy is not None:
                self.energy[b] = 0
            return
        last = self.bank.count[b]
        data = self.bank.tiles[b : b + 1, :, last - tiles : last]
        self.bank.count[b] = last - tiles
        keep = tiles * tokens - beyond
        parts = [
            codec.unpack(half, {name: t[b : b + 1] for name, t in basis.items()})[0, :, :keep]
            for codec, half, basis in zip(self.codecs, self.layout.split(data), self.basis, strict=True)
        ]
        self.tail.put_front(b, *parts)

    def heads(self) -> HeadSet:
        """See Store.heads."""
        extra: tuple[HeadSet, ...] = ()
        if self.salient is not None and any(self.salient.count):
            lengths = torch.zeros_like(self.lengths)
            lengths[1] = torch.tensor(self.salient.count, dtype=torch.int32)
            empty = self.tail.k[:, :, :0], self.tail.v[:, :, :0]
            extra = (
                HeadSet(self.kv_heads, *empty, lengths, None, None, self.salient.tiles, self.salient.layout, *self.basis),
            )
        tiles = self.bank.tiles if any(self.bank.count) else None
        return HeadSet(
            self.kv_heads, self.tail.k, self.tail.v, self.lengths, self.first.k, self.first.v, tiles, self.layout, *self.basis, extra=extra
        )

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
        if self.energy is not None:
            self.energy = self.energy.index_select(0, index.to(self.energy.device))
        self.started = [self.started[i] for i in index.tolist()]

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
        basis = sum(t.nbytes for half in self.basis for t in half.values())
        out.add("basis", basis, basis)
        statistics = 0 if self.energy is None else self.energy.nbytes
        out.add("statistics", statistics, statistics)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """See Store.tensors."""
        used = max(self.tail.count)
        out = {"sink_k": self.first.k, "sink_v": self.first.v}
        out |= {"tail_k": self.tail.k[:, :, :used], "tail_v": self.tail.v[:, :, :used]}
        out["tiles"] = self.bank.tiles[:, :, : max(self.bank.count)]
        if self.salient is not None:
            out["salient"] = self.salient.tiles[:, :, : max(self.salient.count)]
        for which, half in zip(("key", "value"), self.basis, strict=True):
            out |= {f"{which}_basis.{name}": t for name, t in half.items()}
        if self.energy is not None:
            out["energy"] = self.energy
        return out

    def state(self) -> dict[str, object]:
        """See Store.state."""
        salient = [] if self.salient is None else self.salient.count
        return {"sink": self.first.count, "tail": self.tail.count, "tiles": self.bank.count, "salient": salient, "started": self.started}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """See Store.restore."""
        counts: dict[str, list[int]] = state  # type: ignore[assignment]
        self.first.k, self.first.v, self.first.count = tensors["sink_k"], tensors["sink_v"], list(counts["sink"])
        self.tail.k, self.tail.v, self.tail.count = tensors["tail_k"], tensors["tail_v"], list(counts["tail"])
        self.bank.tiles, self.bank.count = tensors["tiles"], list(counts["tiles"])
        if self.salient is not None:
            self.salient.tiles, self.salient.count = tensors["salient"], list(counts["salient"])
        for which, half in zip(("key", "value"), self.basis, strict=True):
            half.update({n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{which}_basis.")})
        self.energy = tensors.get("energy")
        self.started = [bool(x) for x in counts["started"]]
        self._sync()
