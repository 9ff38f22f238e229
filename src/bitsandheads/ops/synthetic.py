"""Head sets with random contents, for tests and benchmarks."""

import torch
from torch import Tensor

from ..quant.codec import HalfCodec
from ..quant.spec import KVQuant
from ..quant.tile import HalfLayout, TileLayout
from .heads import HeadSet


def _random_half(layout: HalfLayout, lead: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Random codes (trits stay in range) with steps near 0.5 and centres near 0."""
    data = torch.randint(0, 256, (*lead, layout.nbytes), dtype=torch.uint8, device=device, generator=generator)
    offset, n = layout.sections["trits"]
    data[..., offset : offset + n] %= 243
    groups, (steps, centres) = layout.groups, layout.counts

    def put(name: str, x: Tensor) -> None:
        start, size = layout.sections[name]
        data[..., start : start + size] = x.contiguous().view(torch.uint8).flatten(-2)[..., :size]

    scale = 448.0 if layout.fmt == "fp8" else 1.0
    stored = torch.float8_e4m3fn if layout.fmt == "fp8" else torch.float16
    uniform = lambda n: torch.rand(*lead, groups, n, device=device, generator=generator)  # noqa: E731
    put("steps", ((0.25 + 0.5 * uniform(steps)) * scale).to(stored))
    put("centres", ((uniform(centres) - 0.5) * scale).to(stored))
    if layout.fmt == "fp8":
        put("factors", torch.full((*lead, groups, 2), 1 / scale, dtype=torch.float16, device=device))
    return data


def _basis(layout: HalfLayout, batch: int, heads: int, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    spec, dim = layout.spec, layout.head_dim
    normal = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    if spec.transform == "principal":
        axes = torch.linalg.qr(normal(batch, heads, dim, dim))[0].to(torch.bfloat16).contiguous()
        basis = {"axes": axes, "mean": 0.3 * normal(batch, heads, dim)}
        if spec.noise_correction:
            basis["noise"] = 0.1 * normal(batch, heads, dim).square()
        return basis
    if spec.order == "none":
        return {}
    return {"order": normal(batch, heads, dim).argsort(-1).to(torch.uint8)}


def head_set(
    quant: KVQuant | None,
    dim: int,
    kv_heads: tuple[int, ...],
    sinks: list[int],
    tiles: list[int],
    tails: list[int],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seed: int = 0,
    window: int | None = None,
    packed: tuple[Tensor, Tensor] | None = None,
) -> HeadSet:
    """A head set with random tokens.

    Args:
        sinks, tiles, tails: lengths of every sequence (B entries each); without `quant` tiles are ignored.
        packed: keys and values float32 [B, h, tokens, D] to quantize in place of random bytes.
    """
    device = torch.device(device)
    g = torch.Generator(device=device).manual_seed(seed)
    batch, h = len(tails), len(kv_heads)
    raw = lambda n: torch.randn(batch, h, n, dim, device=device, generator=g).to(dtype)  # noqa: E731
    lengths = torch.tensor([sinks, tiles if quant else [0] * batch, tails], dtype=torch.int32, device=device)
    capacity = max(*tails, 1) + 3
    out = HeadSet(kv_heads, raw(capacity), raw(capacity), lengths, window=window)
    if max(sinks):
        out.sink_k, out.sink_v = raw(max(sinks)), raw(max(sinks))
    if quant is None:
        return out
    out.layout = TileLayout.of(quant, dim)
    if packed is None:
        halves = [_random_half(x, (batch, h, max(*tiles, 1)), device, g) for x in (out.layout.keys, out.layout.values)]
        out.key_basis = _basis(out.layout.keys, batch, h, device, g)
        out.value_basis = _basis(out.layout.values, batch, h, device, g)
    else:
        codecs = [HalfCodec(out.layout.keys), HalfCodec(out.layout.values)]
        energy = torch.ones(batch, h, dim, device=device)
        out.key_basis, out.value_basis = (c.find_basis(x, energy) for c, x in zip(codecs, packed, strict=True))
        halves = [c.pack(x, b) for c, x, b in zip(codecs, packed, (out.key_basis, out.value_basis), strict=True)]
    out.tiles = torch.cat(halves, -1)
    return out
