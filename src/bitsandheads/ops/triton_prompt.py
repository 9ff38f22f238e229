"""Statistics of a prompt in Triton: attention that tokens draw, moments, sums for the map back. See prompt_kernels."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..quant.codec import Basis, HalfCodec, principal_axes
from ..quant.tile import TileLayout
from . import cuda_basis
from . import prompt_kernels as kernels
from .backends import say_once
from .heads import numbers_on
from .pack import Which, pack, pack_with_kernels, source_places
from .triton_pack import multiprocessors, operand_dtype

LOG2E = 1.4426950408889634
BLOCK = 128  # query rows, and keys, of a program


def _operand(x: Tensor) -> triton.language.dtype:
    """The dtype in which queries and keys are multiplied: their own (float32 in the interpreter)."""
    if triton.knobs.runtime.interpret or x.dtype == torch.float32:
        return triton.language.float32
    return triton.language.bfloat16 if x.dtype == torch.bfloat16 else triton.language.float16


def padded(dim: int) -> int:
    """DP: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))


def attention_mass(q: Tensor, weight: Tensor, k: Tensor, counts: Tensor, longest: int, scale: float) -> Tensor:
    """Mean attention that each key draws from those of these queries that see it; the queries are those of the newest keys.

    Args:
        q: [B, h, query heads of a KV head, n, D]; weight: float32 [B, n], 0 for padding.
        k: [B, h, any, D]; counts: int32 [B], keys of each sequence; longest: their maximum.
        scale: factor of the scores.
    Returns:
        float32 [B, h, longest], 0 beyond a sequence's keys.
    """
    batch, heads, group, n, dim = q.shape
    q, rows = q.contiguous(), group * n
    blocks, bh = triton.cdiv(rows, BLOCK), batch * heads
    splits = max(1, min(triton.cdiv(longest, BLOCK), 4 * multiprocessors(q.device) // (blocks * bh)))
    sizes = {"D": dim, "DP": padded(dim), "R": rows, "N": n, "ROWS": BLOCK, "KEYS": BLOCK, "DOT": _operand(q)}
    options = {"num_warps": 4, "num_stages": 2} if dim <= 128 else {"num_warps": 8, "num_stages": 1}
    sums, norms = torch.empty(bh, splits, rows, device=q.device), torch.empty(bh, rows, device=q.device)
    kernels.query_sums[(blocks, splits, bh)](q, k, counts, sums, *k.stride()[:3], heads, scale * LOG2E, **sizes, **options)
    parts = triton.next_power_of_2(splits)
    kernels.row_norms[(blocks, bh)](sums, weight.contiguous(), norms, heads, splits, R=rows, N=n, ROWS=BLOCK, PARTS=parts)
    mass = torch.zeros(batch, heads, longest, device=q.device)
    kernels.key_mass[(triton.cdiv(longest, BLOCK), bh)](
        q, k, counts, norms, mass, *k.stride()[:3], *mass.stride()[:2], heads, scale * LOG2E, **sizes, **options
    )
    return mass


def _left_out(skip: Tensor | None) -> dict[str, int]:
    n = 0 if skip is None else skip.shape[2]
    return {"SKIP": n, "SKIP_PADDED": triton.next_power_of_2(max(n, 1))}


def _workers(x: Tensor, most: int, programs: int) -> int:
    return max(1, min(most, programs * multiprocessors(x.device) // (x.shape[0] * x.shape[1])))


def moments(x: Tensor, weight: Tensor | None, skip: Tensor | None, jobs: Tensor, most: int, tile: int, group: int) -> tuple[Tensor, Tensor]:
    """Sums over the tokens that are packed (`jobs`, `skip` as in ops.pack): float32 [B, h, D] of w x, and [B, h, D, D] of w d d^T, where d is
    the deviation from the mean of the token's group."""
    batch, heads, _, dim = x.shape
    dp, workers = padded(dim), _workers(x, most, 1)
    totals = torch.empty(batch, heads, workers, dp, device=x.device)
    grams = torch.empty(batch, heads, workers, dp, dp, device=x.device)
    kernels.moments[(workers, batch * heads)](
        x, x if weight is None else weight, x if skip is None else skip, jobs, totals, grams, *x.stride()[:3],
        *((0, 0) if weight is None else weight.stride()[:2]), batch, heads, **_left_out(skip),
        WEIGHTED=weight is not None, DOT=operand_dtype(), D=dim, DP=dp, TOKENS=tile, GROUP=group, num_warps=8, num_stages=2 if dp < 256 else 1,
    )  # fmt: skip
    return totals.sum(2)[..., :dim], grams.sum(2)[..., :dim, :dim]


def refit_sums(
    x: Tensor, kept: Tensor, mean: Tensor, weight: Tensor | None, skip: Tensor | None, jobs: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Sums of w y' y'^T and w y' (x - mean)^T, float32 [B, h, D, D], for the restored axes `kept` bfloat16 [B, h, tiles, DP, tile]."""
    batch, heads, _, dim = x.shape
    dp, workers = padded(dim), _workers(x, most, 1)
    both = torch.empty(2, batch, heads, workers, dp, dp, device=x.device)
    kernels.refit_sums[(workers, batch * heads)](
        x, kept, mean, x if weight is None else weight, x if skip is None else skip, jobs, both[0], both[1], *x.stride()[:3],
        *((0, 0) if weight is None else weight.stride()[:2]), batch, heads, kept.shape[2], **_left_out(skip),
        WEIGHTED=weight is not None, DOT=operand_dtype(), D=dim, DP=dp, TOKENS=kept.shape[-1], num_warps=8, num_stages=1,
    )  # fmt: skip
    gram, cross = both.sum(3)[..., :dim, :dim]
    return gram, cross


def _kernels_for_basis(like: Tensor) -> bool:
    """Whether the CUDA kernels for the algebra of a basis [..., D, D] run here. Where not, PyTorch does it, on a GPU many times slower: one log line."""
    if like.device.type != "cuda":
        return False
    why = cuda_basis.unsupported(like.shape[-1], like.device)
    if why is not None:
        say_once(f"The CUDA kernels for principal axes do not run ({why}); PyTorch's own linear algebra takes over, many times slower.")
    return why is None


@dataclass
class Begin:
    """Sequences that start to be packed. Lists are of B numbers.

    Attributes:
        k, v: [B, h, C, D]; counts: tokens of each sequence, 0 for one that does not start yet; tiles: how many are packed now.
        sink, heavy: first tokens, and tokens that draw the most attention, that stay whole.
        queries, weight, scale: the newest queries [B, h, query heads of a KV head, n, D], float32 [B, n], factor of the scores; None where the
            attention that tokens draw does not count.
        energy: float32 [B, h, D], mean squared query of each channel, or None: all alike.
        backend: see ops.pack.
    """

    k: Tensor
    v: Tensor
    counts: list[int]
    tiles: list[int]
    sink: int
    heavy: int
    queries: Tensor | None
    weight: Tensor | None
    scale: float
    energy: Tensor | None
    backend: str


@dataclass
class _Job:
    """What is packed, on the device: see ops.pack. tokens: float32 [B, 1], how many; weights: float32 [B, h, N] of keys and values, or None."""

    jobs: Tensor
    skip: Tensor | None
    tokens: Tensor
    most: int
    weights: tuple[Tensor | None, Tensor | None]


def start(
    begin: Begin, codecs: tuple[HalfCodec, HalfCodec], tiles: Tensor, layout: TileLayout, status: Tensor
) -> tuple[Tensor, tuple[Basis, Basis]]:
    """Choose the heavy tokens, find the basis and pack, for all sequences at once, each with its own number of tiles.

    Args:
        tiles: uint8 [B, h, capacity, bytes], written from the first tile on; status: see ops.pack.
    Returns:
        places of the heavy tokens int32 [B, h, heavy], and the bases of keys and values. What belongs to sequences with no tiles has no meaning.
    """
    tile, most = layout.tokens, max(begin.tiles)
    first, none = [begin.sink] * len(begin.tiles), [0] * len(begin.tiles)
    ends = [n * tile + begin.sink + begin.heavy for n in begin.tiles]
    table = numbers_on(begin.k.device, [begin.counts, ends, [max(n * tile, 1) for n in begin.tiles], first, begin.tiles, none])
    jobs = table[3:]
    mass = None
    if begin.queries is not None and begin.weight is not None:
        mass = attention_mass(begin.queries, begin.weight, begin.k, table[0], max(begin.counts), begin.scale)
    positions, weights = _choose(begin, codecs, mass, table[1], table[2], most * tile)
    job = _Job(jobs, positions if begin.heavy else None, table[2, :, None].float(), most, weights)
    bases = _axes(begin, codecs, job)
    halves: tuple[Which, Which] = ("keys", "values")
    for which, codec, x, basis, weight in zip(halves, codecs, (begin.k, begin.v), bases, weights, strict=True):
        if codec.layout.spec.refit or codec.layout.spec.noise_correction:
            _pack_and_refit(x, codec, basis, weight, job, tiles, layout, which, status, begin.backend)
        else:
            pack(x, tiles, jobs, most, layout, which, basis, skip=job.skip, weight=weight, status=status, backend=begin.backend)
    return positions, (bases[0], bases[1])


def _choose(
    begin: Begin, codecs: tuple[HalfCodec, HalfCodec], mass: Tensor | None, ends: Tensor, packed: Tensor, room: int
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Places of the heavy tokens, int32 [B, h, heavy], and the weights of keys and values (HalfCodec.weights), float32 [B, h, room], or None."""
    batch, heads = begin.k.shape[:2]
    if mass is None:
        first = torch.arange(begin.sink, begin.sink + begin.heavy, dtype=torch.int32, device=begin.k.device)
        return first.expand(batch, heads, -1).contiguous(), (None, None)
    positions = torch.empty(batch, heads, begin.heavy, dtype=torch.int32, device=mass.device)
    shares = [codec.layout.spec.attention_weight for codec in codecs]
    k, v = (torch.empty(batch, heads, room, device=mass.device) if share else None for share in shares)
    kernels.choose[(batch * heads,)](
        mass, ends, packed, positions, mass if k is None else k, mass if v is None else v, *mass.stride()[:2], heads, room, *map(float, shares),
        FIRST=begin.sink, HEAVY=begin.heavy, PADDED=triton.next_power_of_2(max(begin.heavy, 1)), KEYS=k is not None, VALUES=v is not None,
        BLOCK=4096 if mass.is_cuda else 64, num_warps=16,
    )  # fmt: skip
    return positions, (k, v)


def _axes(begin: Begin, codecs: tuple[HalfCodec, HalfCodec], job: _Job) -> list[Basis]:
    """Bases before any refit; the eigenvectors of both halves are found together."""
    found: list[Basis] = [{}, {}]
    waiting = []
    energy = torch.ones_like(begin.k[:, :, 0], dtype=torch.float32) if begin.energy is None else begin.energy
    for i, (codec, x, weight) in enumerate(zip(codecs, (begin.k, begin.v), job.weights, strict=True)):
        half = codec.layout
        if half.spec.transform == "principal":
            total, gram = moments(x, weight, job.skip, job.jobs, job.most, half.tokens, half.group_size)
            waiting.append((i, total / job.tokens[..., None], codec.metric(energy), gram))
        elif half.spec.order != "none":
            found[i] = _ranks(codec, x, energy, begin, job)
    if waiting:
        index, means, scales, grams = zip(*waiting, strict=True)
        gram = torch.stack(grams)
        find = cuda_basis.principal_axes if _kernels_for_basis(gram) else principal_axes
        turns = find(gram, torch.stack(scales)).contiguous()
        for i, mean, scale, turn in zip(index, means, scales, turns, strict=True):
            found[i] = codecs[i].principal_basis(mean, scale, turn)
    return found


def _ranks(codec: HalfCodec, x: Tensor, energy: Tensor, begin: Begin, job: _Job) -> Basis:
    """Channels by importance, in plain PyTorch, a sequence at a time."""
    order = torch.zeros(*x.shape[:2], x.shape[3], dtype=torch.uint8, device=x.device)
    for b, n in enumerate(begin.tiles):
        if n:
            own = slice(b, b + 1)
            place = source_places(begin.sink, n * codec.layout.tokens, None if job.skip is None else job.skip[own], x[own])
            tokens = x[own].gather(2, place[..., None].expand(-1, -1, -1, x.shape[3]))
            order[b] = codec.find_basis(tokens.float(), energy[own])["order"][0]
    return {"order": order}


def _pack_and_refit(
    x: Tensor,
    codec: HalfCodec,
    basis: Basis,
    weight: Tensor | None,
    job: _Job,
    tiles: Tensor,
    layout: TileLayout,
    which: str,
    status: Tensor,
    backend: str,
) -> None:
    """Pack, and finish the basis with what the codes restore to. The codes do not depend on the map back, so one pass is enough."""
    half = codec.layout
    shape = (*x.shape[:2], job.most, padded(half.head_dim))
    kept = torch.empty(*shape, half.tokens, dtype=torch.bfloat16, device=x.device)
    error = torch.zeros(shape, device=x.device)
    base = 0 if which == "keys" else layout.keys.nbytes
    pack_with_kernels(x, tiles, job.jobs, job.most, False, half, base, basis, job.skip, weight, kept, error, status, backend)
    if half.spec.noise_correction:
        basis["noise"] = (error.sum(2)[..., : half.head_dim] / job.tokens[..., None]).contiguous()
    if half.spec.refit:
        gram, cross = refit_sums(x, kept, basis["mean"], weight, job.skip, job.jobs, job.most)
        fast = _kernels_for_basis(gram)
        basis["axes"] = cuda_basis.map_back(basis["axes"], gram, cross) if fast else codec.refit(basis, gram, cross)
