"""Statistics of a prompt in Triton: attention that tokens draw, moments, sums for the map back. See prompt_kernels."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..quant.codec import Basis, HalfCodec, principal_axes
from ..quant.tile import TileLayout
from . import prompt_kernels as kernels
from .pack import Which, pack, source_places
from .triton_pack import multiprocessors, operand_dtype, pack_half

LOG2E = 1.4426950408889634
BLOCK = 128  # query rows, and keys, of a program
JACOBI_WARPS = 16
SWEEPS = 6  # of Jacobi rotations: the distortion is then within 0.1% of the exact axes' for spectra of four decades


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
    splits = max(1, min(triton.cdiv(longest, BLOCK), 2 * multiprocessors(q.device) // (blocks * bh)))
    sizes = {"D": dim, "DP": padded(dim), "R": rows, "N": n, "BLOCK": BLOCK, "DOT": _operand(q)}
    options = {"num_warps": 8, "num_stages": 2 if dim <= 128 else 1}
    most, sums = torch.empty(2, bh, splits, rows, device=q.device)
    kernels.query_sums[(blocks, splits, bh)](q, k, counts, most, sums, *k.stride()[:3], heads, scale * LOG2E, **sizes, **options)
    lse = torch.logsumexp((most + sums.log2()) / LOG2E, 1) * LOG2E
    mass = torch.zeros(batch, heads, longest, device=q.device)
    kernels.key_mass[(triton.cdiv(longest, BLOCK), bh)](
        q, k, counts, lse, weight.contiguous(), mass, *k.stride()[:3], *mass.stride()[:2], heads, scale * LOG2E, **sizes, **options
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
    grams, crosses = torch.empty(2, batch, heads, workers, dp, dp, device=x.device)
    kernels.refit_sums[(workers, batch * heads)](
        x, kept, mean, x if weight is None else weight, x if skip is None else skip, jobs, grams, crosses, *x.stride()[:3],
        *((0, 0) if weight is None else weight.stride()[:2]), batch, heads, kept.shape[2], **_left_out(skip),
        WEIGHTED=weight is not None, DOT=operand_dtype(), D=dim, DP=dp, TOKENS=kept.shape[-1], num_warps=8, num_stages=1,
    )  # fmt: skip
    return grams.sum(2)[..., :dim, :dim], crosses.sum(2)[..., :dim, :dim]


def jacobi_axes(gram: Tensor, scale: Tensor) -> Tensor:
    """quant.codec.principal_axes by Jacobi rotations in float32, all matrices at once; the order of equal eigenvalues is its own."""
    dim = gram.shape[-1]
    scaled = (gram * scale[..., None] * scale[..., None, :]).float()
    matrices = (0.5 * (scaled + scaled.mT) / scaled.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]).contiguous()
    vectors = torch.eye(dim, device=gram.device).expand_as(matrices).contiguous()
    kernels.diagonalize[(matrices.shape[:-2].numel(),)](
        matrices, vectors, SWEEPS, D=dim, HALF=triton.next_power_of_2(dim) // 2, num_warps=JACOBI_WARPS
    )
    order = matrices.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return vectors.gather(-2, order[..., None].expand_as(vectors)).mT


@dataclass
class Begin:
    """Sequences that start to be packed. Lists are of B numbers.

    Attributes:
        k, v: [B, h, C, D]; counts: tokens of each sequence, 0 for one that does not start yet; tiles: how many are packed now.
        sink, heavy: first tokens, and tokens that draw the most attention, that stay whole.
        queries, weight, scale: the newest queries [B, h, query heads of a KV head, n, D], float32 [B, n], factor of the scores; None where the
            attention that tokens draw does not count.
        energy: float32 [B, h, D], mean squared query of each channel, or None: all alike.
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


@dataclass
class _Job:
    """What is packed, on the device: see ops.pack. place: int64 [B, h, N], where the packed tokens lie; tokens: float32 [B, 1]."""

    jobs: Tensor
    skip: Tensor | None
    place: Tensor
    tokens: Tensor
    most: int


def start(
    begin: Begin, codecs: tuple[HalfCodec, HalfCodec], tiles: Tensor, layout: TileLayout, status: Tensor
) -> tuple[Tensor, tuple[Basis, Basis]]:
    """Choose the heavy tokens, find the basis and pack, for all sequences at once, each with its own number of tiles.

    Args:
        tiles: uint8 [B, h, capacity, bytes], written from the first tile on; status: see ops.pack.
    Returns:
        places of the heavy tokens int32 [B, h, heavy], and the bases of keys and values. What belongs to sequences with no tiles has no meaning.
    """
    device, tile = begin.k.device, layout.tokens
    counts, ends, numbers = torch.tensor(
        [begin.counts, [n * tile + begin.sink + begin.heavy for n in begin.tiles], begin.tiles], dtype=torch.int32
    ).to(device)
    most = max(begin.tiles)
    mass = None
    if begin.queries is not None and begin.weight is not None:
        mass = attention_mass(begin.queries, begin.weight, begin.k, counts, max(begin.counts), begin.scale)
    positions = _heavy(begin, mass, ends)
    jobs = torch.stack([torch.full_like(numbers, begin.sink), numbers, torch.zeros_like(numbers)])
    skip = positions if begin.heavy else None
    place = source_places(begin.sink, most * tile, skip, begin.k).clamp(max=begin.k.shape[2] - 1)
    job = _Job(jobs, skip, place, (numbers * tile).clamp(min=1).float()[:, None], most)
    weights = [_weights(codec, mass, job) for codec in codecs]
    bases = _axes(begin, codecs, weights, job)
    halves: tuple[Which, Which] = ("keys", "values")
    for which, codec, x, basis, weight in zip(halves, codecs, (begin.k, begin.v), bases, weights, strict=True):
        if codec.layout.spec.refit or codec.layout.spec.noise_correction:
            _pack_and_refit(x, codec, basis, weight, job, tiles, layout, which, status)
        else:
            pack(x, tiles, jobs, most, layout, which, basis, skip=skip, weight=weight, status=status, backend="triton")
    return positions, (bases[0], bases[1])


def _heavy(begin: Begin, mass: Tensor | None, ends: Tensor) -> Tensor:
    if mass is None:
        first = torch.arange(begin.sink, begin.sink + begin.heavy, dtype=torch.int32, device=begin.k.device)
        return first.expand(*begin.k.shape[:2], -1).contiguous()
    place = torch.arange(mass.shape[2], device=mass.device)
    open_to_all = (place >= begin.sink) & (place < ends[:, None, None])
    return mass.masked_fill(~open_to_all, -1.0).topk(begin.heavy, -1)[1].sort(-1)[0].to(torch.int32).contiguous()


def _weights(codec: HalfCodec, mass: Tensor | None, job: _Job) -> Tensor | None:
    """HalfCodec.weights for sequences of their own lengths: float32 [B, h, N] in the order of packing."""
    share = codec.layout.spec.attention_weight
    if mass is None or not share:
        return None
    drawn = mass.gather(2, job.place.clamp(max=mass.shape[2] - 1))
    packed = torch.arange(drawn.shape[2], device=mass.device) < job.tokens[..., None]
    mean = (drawn * packed).sum(-1) / job.tokens
    return 1 - share + share * drawn / mean.clamp(min=1e-30)[..., None]


def _axes(begin: Begin, codecs: tuple[HalfCodec, HalfCodec], weights: list[Tensor | None], job: _Job) -> list[Basis]:
    """Bases before any refit; the eigenvectors of both halves are found together."""
    found: list[Basis] = [{}, {}]
    waiting = []
    energy = torch.ones_like(begin.k[:, :, 0], dtype=torch.float32) if begin.energy is None else begin.energy
    for i, (codec, x, weight) in enumerate(zip(codecs, (begin.k, begin.v), weights, strict=True)):
        half = codec.layout
        if half.spec.transform == "principal":
            total, gram = moments(x, weight, job.skip, job.jobs, job.most, half.tokens, half.group_size)
            waiting.append((i, total / job.tokens[..., None], codec.metric(energy), gram))
        elif half.spec.order != "none":
            found[i] = _ranks(codec, x, energy, begin.tiles, job)
    if waiting:
        index, means, scales, grams = zip(*waiting, strict=True)
        find = principal_axes if triton.knobs.runtime.interpret else jacobi_axes  # the interpreter takes a minute for a head
        turns = find(torch.stack(grams), torch.stack(scales))
        for i, mean, scale, turn in zip(index, means, scales, turns, strict=True):
            found[i] = codecs[i].principal_basis(mean, scale, turn)
    return found


def _ranks(codec: HalfCodec, x: Tensor, energy: Tensor, tiles: list[int], job: _Job) -> Basis:
    """Channels by importance, in plain PyTorch, a sequence at a time."""
    order = torch.zeros(*x.shape[:2], x.shape[3], dtype=torch.uint8, device=x.device)
    for b, n in enumerate(tiles):
        if n:
            place = job.place[b : b + 1, :, : n * codec.layout.tokens, None].expand(-1, -1, -1, x.shape[3])
            order[b] = codec.find_basis(x[b : b + 1].gather(2, place).float(), energy[b : b + 1])["order"][0]
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
) -> None:
    """Pack, and finish the basis with what the codes restore to. The codes do not depend on the map back, so one pass is enough."""
    half = codec.layout
    shape = (*x.shape[:2], job.most, padded(half.head_dim))
    kept = torch.empty(*shape, half.tokens, dtype=torch.bfloat16, device=x.device)
    error = torch.zeros(shape, device=x.device)
    base = 0 if which == "keys" else layout.keys.nbytes
    pack_half(x, tiles, job.jobs, job.most, False, half, base, basis, job.skip, weight, kept, error, status)
    if half.spec.noise_correction:
        basis["noise"] = (error.sum(2)[..., : half.head_dim] / job.tokens[..., None]).contiguous()
    if half.spec.refit:
        basis["axes"] = codec.refit(basis, *refit_sums(x, kept, basis["mean"], weight, job.skip, job.jobs, job.most))
