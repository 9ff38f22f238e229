"""Packing tokens into tiles: one op for both halves, in plain PyTorch (`HalfCodec.pack`) and in Triton.

`pack` is also the custom operator `torch.ops.bitsandheads.pack`. Shape letters: B sequences, h KV heads of a store, C places of a buffer of tokens,
D head_dim, S places that are left out.
"""

from typing import Literal

import torch
from torch import Tensor

from ..errors import BackendError
from ..quant.codec import Basis, HalfCodec
from ..quant.tile import HalfLayout, TileLayout
from .backends import resolve_packing, say_once

Which = Literal["keys", "values"]
CUDA_PACKS = ("auto", "cuda")  # backends that pack with the CUDA kernel where it covers the tokens


def kernels_failed(error: Exception, what: str, backend: str) -> None:
    """A Triton kernel cannot be built for these shapes (registers, shared memory): one log line, and the reference takes over.

    Raises:
        BackendError: "triton" was asked for by name.
    """
    why = f"{type(error).__name__}: {str(error)[:500]}"
    if backend == "triton":
        raise BackendError(f'The "triton" backend cannot {what}: {why}. Use backend="reference" or "auto".') from error
    say_once(f"The triton backend cannot {what} ({why}); the plain PyTorch reference takes over.")


def packing_backend(x: Tensor, backend: str) -> str:
    """Who packs tokens like x [B, h, C, D]: "triton" or "reference".

    Raises:
        BackendError: a backend was named that cannot run here or does not cover these tokens.
    """
    if resolve_packing(backend, x.device) == "reference":
        return "reference"
    from . import triton_pack

    why = triton_pack.unsupported(x)
    if why is None:
        return "triton"
    if backend == "triton":
        raise BackendError(f'The "triton" backend does not pack {why}; use backend="reference" or "auto".')
    say_once(f"The triton backend does not pack {why}; the plain PyTorch reference takes over.")
    return "reference"


def pack(
    x: Tensor, tiles: Tensor, jobs: Tensor, most: int, layout: TileLayout, which: Which, basis: Basis, *, due: bool = False,
    skip: Tensor | None = None, weight: Tensor | None = None, status: Tensor, backend: str = "auto",
) -> None:  # fmt: skip
    """Pack full tiles of the keys or the values of every sequence into their places, in one launch.

    Args:
        x: [B, h, C, D], D contiguous.
        tiles: uint8 [B, h, capacity, layout.nbytes]; only the bytes of this half are written.
        jobs: int32 [3, B] on the device: first token, number of tiles, first tile's index; or with `due` the counts of a store [4, B] (see
            ops.append.Growing): the tail's oldest tokens become the tile after the last, where the tail has grown to its limit.
        most: the largest number of tiles of a sequence.
        basis: see quant.codec.HalfCodec.
        skip: int32 [B, h, S], ascending: places of x that are left out; the first token is counted without them.
        weight: float32 [B, h, at least most * tile], what the error of each packed token counts, in the order of packing, or None: all alike.
        status: int32 [1]; raised to the bits of the largest |step or centre| as a float32, infinity where one cannot be stored or is NaN
            (Triton; the reference raises at once).
    Raises:
        NotFiniteError: the reference met a step or centre that cannot be stored.
        BackendError: a backend was named that cannot run here or does not cover these tokens.
    """
    torch.ops.bitsandheads.pack(
        x, tiles, jobs, most, due, layout.number, which, ",".join(basis), list(basis.values()), skip, weight, status, backend
    )


def pack_with_kernels(
    x: Tensor, tiles: Tensor, jobs: Tensor, most: int, due: bool, half: HalfLayout, base: int, basis: Basis, skip: Tensor | None,
    weight: Tensor | None, kept: Tensor | None, error: Tensor | None, status: Tensor, backend: str,
) -> None:  # fmt: skip
    """One launch, by the CUDA kernel where it packs such tokens, else by the Triton kernel.

    Args:
        half: of a tile, from byte `base` on.
        kept: bfloat16 [B, h, tiles, DP, tile], gets the restored axes; error: float32 [B, h, tiles, DP], their squared error. Or None.
    """
    from . import cuda_pack, triton_pack

    in_cuda = backend in CUDA_PACKS and not due and cuda_pack.unsupported(x, half, weight) is None
    pack_half = cuda_pack.pack_half if in_cuda else triton_pack.pack_half
    pack_half(x, tiles, jobs, most, due, half, base, basis, skip, weight, kept, error, status)


@torch.library.custom_op("bitsandheads::pack", mutates_args=("tiles", "status"))
def _pack(
    x: Tensor, tiles: Tensor, jobs: Tensor, most: int, due: bool, layout: int, which: str, names: str, basis: list[Tensor],
    skip: Tensor | None, weight: Tensor | None, status: Tensor, backend: str,
) -> None:  # fmt: skip
    keys, values = TileLayout.numbered(layout).keys, TileLayout.numbered(layout).values
    half, base = (keys, 0) if which == "keys" else (values, keys.nbytes)
    named = dict(zip(names.split(",") if names else [], basis, strict=True))
    if packing_backend(x, backend) == "triton":
        from triton.errors import TritonError

        try:
            pack_with_kernels(x, tiles, jobs, most, due, half, base, named, skip, weight, None, None, status, backend)
            return
        except TritonError as e:
            kernels_failed(e, f"pack {which} of head_dim {x.shape[3]} in {x.dtype}", backend)
    _reference(x, tiles, jobs, due, half, base, named, skip, weight)


@_pack.register_fake
def _(
    x: Tensor, tiles: Tensor, jobs: Tensor, most: int, due: bool, layout: int, which: str, names: str, basis: list[Tensor],
    skip: Tensor | None, weight: Tensor | None, status: Tensor, backend: str,
) -> None:  # fmt: skip
    return None


def source_places(first: int, tokens: int, skip: Tensor | None, like: Tensor) -> Tensor:
    """Places int64 [B, h, tokens] of the tokens that are packed, for places `skip` that are left out."""
    place = torch.arange(first, first + tokens, device=like.device).expand(*like.shape[:2], tokens)
    for left_out in () if skip is None else skip.split(1, -1):
        place = place + (place >= left_out)
    return place


def _reference(
    x: Tensor, tiles: Tensor, jobs: Tensor, due: bool, half: HalfLayout, base: int, basis: Basis, skip: Tensor | None, weight: Tensor | None
) -> None:
    if due:
        _, places, tails, limits = jobs.tolist()
        work = [(0, int(tail >= limit), place) for place, tail, limit in zip(places, tails, limits, strict=True)]
    else:
        work = list(zip(*jobs.tolist(), strict=True))
    alike: dict[tuple[int, int], list[int]] = {}
    for b, (first, n, _) in enumerate(work):
        if n:
            alike.setdefault((first, n), []).append(b)
    for (first, n), rows in alike.items():
        index = torch.tensor(rows, device=x.device)
        own = {name: t[index] for name, t in basis.items()}
        left_out = None if skip is None else skip[index]
        place = source_places(first, n * half.tokens, left_out, x[index])
        tokens = x[index].gather(2, place[..., None].expand(-1, -1, -1, x.shape[3]))
        w = None if weight is None else weight[index, :, : place.shape[2]]
        data = HalfCodec(half).pack(tokens.float(), own, w)
        for row, b in enumerate(rows):
            start = work[b][2]
            tiles[b, :, start : start + n, base : base + half.nbytes] = data[row]
