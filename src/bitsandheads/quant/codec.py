"""Keys or values of a head group <-> the bytes of a tile: basis, ranks, steps, codes.

The plain PyTorch specification that the kernels are tested against. Shape letters: B batch, H KV heads of the group,
T tokens (a multiple of the tile), D head_dim, N = T / tile.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import metadata as meta
from .levels import fit, quantize
from .spec import TERNARY, channel_block
from .tile import HalfLayout
from .transforms import fixed_rotation

Basis = dict[str, Tensor]
METRIC_FLOOR = 0.01  # share of the mean squared query that every channel counts at least


@dataclass(frozen=True)
class HalfCodec:
    """Codes one half (keys or values) of a tile.

    A basis is found once for each (sequence, KV head) and then kept, as tensors with leading [B, H]:
        order: uint8 [D], channels in order of falling importance (ranked specs)
        axes: bfloat16 [D, D], columns are the principal axes, by falling variance; mean: float32 [D];
        scale: float32 [D], what channels are multiplied by before the rotation (query-weighted specs)
    """

    layout: HalfLayout

    @property
    def head_dim(self) -> int:
        """D."""
        return self.layout.head_dim

    @cached_property
    def _turned(self) -> int:
        """How many of the last axes a fixed rotation turns."""
        spec = self.layout.spec
        if spec.transform in ("none", "principal"):
            return 0
        return self.layout.sizes[-1] if spec.last_class_only else self.head_dim

    def find_basis(self, x: Tensor, energy: Tensor) -> Basis:
        """Ranks or principal axes for these tokens.

        Args:
            x: float32 [B, H, T, D], the tokens that are packed first.
            energy: float32 [B, H, D], mean squared query of each channel over the query heads of the group.
        """
        spec = self.layout.spec
        if spec.transform == "principal":
            mean = x.mean(2)
            z = x - mean[:, :, None]
            basis = {"mean": mean}
            if spec.query_weighted:
                floor = METRIC_FLOOR * energy.mean(-1, keepdim=True)
                basis["scale"] = (energy + floor).clamp(min=1e-12).sqrt()
                z = z * basis["scale"][:, :, None]
            covariance = (z.transpose(-1, -2) @ z).double()
            basis["axes"] = torch.linalg.eigh(covariance)[1].flip(-1).to(torch.bfloat16)
            return basis
        if spec.order == "none":
            return {}
        if spec.order == "range":
            weight = x.amax(2) - x.amin(2)
        else:
            weight = x.var(2, unbiased=False)
            if spec.order == "query":
                weight = weight * energy
        return {"order": weight.argsort(dim=-1, descending=True, stable=True).to(torch.uint8)}

    def encode(self, x: Tensor, basis: Basis) -> Tensor:
        """Channels float32 [B, H, T, D] -> axes, sorted by class, of the same shape."""
        if "axes" in basis:
            z = x - basis["mean"][:, :, None]
            if "scale" in basis:
                z = z * basis["scale"][:, :, None]
            return z @ basis["axes"].float()
        if "order" in basis:
            x = x.gather(-1, basis["order"].long()[:, :, None].expand_as(x))
        if self._turned:
            keep, turn = x.split([self.head_dim - self._turned, self._turned], -1)
            x = torch.cat([keep, turn @ self._rotation(x).T], -1)
        return x

    def decode(self, y: Tensor, basis: Basis) -> Tensor:
        """Inverse of `encode`."""
        if "axes" in basis:
            z = y @ basis["axes"].float().transpose(-1, -2)
            if "scale" in basis:
                z = z / basis["scale"][:, :, None]
            return z + basis["mean"][:, :, None]
        if self._turned:
            keep, turn = y.split([self.head_dim - self._turned, self._turned], -1)
            y = torch.cat([keep, turn @ self._rotation(y)], -1)
        if "order" in basis:
            y = torch.empty_like(y).scatter_(-1, basis["order"].long()[:, :, None].expand_as(y), y)
        return y

    def query(self, q: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
        """Turn queries instead of keys: q . decode(y) = q' . y + constant.

        Args:
            q: float32 [B, H, Q, D], the query heads (and tokens) of each KV head.
        Returns:
            q' float32 [B, H, Q, D] over the axes, and the constant float32 [B, H, Q].
        """
        if "axes" in basis:
            constant = (q @ basis["mean"][..., None]).squeeze(-1)
            if "scale" in basis:
                q = q / basis["scale"][:, :, None]
            return q @ basis["axes"].float(), constant
        return self.encode(q, basis), torch.zeros_like(q[..., 0])

    def _rotation(self, like: Tensor) -> Tensor:
        return fixed_rotation(self.layout.spec.transform, self._turned, like.device)

    def pack(self, x: Tensor, basis: Basis) -> Tensor:
        """Tokens float32 [B, H, T, D] -> uint8 [B, H, N, half's bytes]."""
        layout = self.layout
        y = self.encode(x, basis)
        if layout.spec.per == "token":
            return self._pack_per_token(y)
        y = y.unflatten(2, (-1, layout.groups, layout.group_size))  # [B, H, N, groups, G, D]
        step, centre, first = [], [], 0
        for cls, n in zip(layout.spec.classes, layout.sizes, strict=True):
            s, c = fit(y[..., first : first + n], cls)
            step.append(s)
            centre.append(c)
            first += n
        step_all, centre_all = torch.cat(step, -1), torch.cat(centre, -1)  # [B, H, N, groups, D]
        step_bytes, step_factor, step_kept = meta.encode(step_all[..., layout.step_axes], layout.fmt)
        centre_bytes, centre_factor, centre_kept = meta.encode(centre_all[..., layout.centre_axes], layout.fmt)
        step_all, centre_all = torch.zeros_like(step_all), torch.zeros_like(centre_all)
        step_all[..., layout.step_axes] = step_kept
        centre_all[..., layout.centre_axes] = centre_kept
        codes, first = [], 0
        for cls, n in zip(layout.spec.classes, layout.sizes, strict=True):
            part = slice(first, first + n)
            top = 2 if cls.bits == TERNARY else 2 ** int(cls.bits) - 1
            codes.append(
                quantize(y[..., part], step_all[..., None, part], centre_all[..., None, part], top, cls.levels == "ternary")
            )
            first += n
        flat = torch.cat(codes, -1).flatten(3, 4).transpose(-1, -2)  # [B, H, N, D, tile]
        return layout.write(flat, step_bytes, centre_bytes, torch.cat([step_factor, centre_factor], -1))

    def _pack_per_token(self, y: Tensor) -> Tensor:
        layout, cls = self.layout, self.layout.spec.classes[0]
        block = channel_block(self.head_dim)
        y = y.unflatten(-1, (-1, block)).unflatten(2, (-1, layout.tokens))  # [B, H, N, tokens, blocks, block]
        step, centre = fit(y.transpose(-1, -2), cls)  # [..., blocks]
        lead = y.shape[:3]
        step_bytes, step_factor, step_kept = meta.encode(step.reshape(*lead, 1, -1), layout.fmt)
        centre_bytes, centre_factor, centre_kept = meta.encode(centre.reshape(*lead, 1, -1), layout.fmt)
        codes = quantize(y, step_kept.view_as(step)[..., None], centre_kept.view_as(centre)[..., None], 2 ** int(cls.bits) - 1)
        factors = torch.cat([step_factor, centre_factor], -1)
        return layout.write(codes.flatten(-2).transpose(-1, -2), step_bytes, centre_bytes if cls.centre else centre_bytes[..., :0], factors)

    def unpack(self, data: Tensor, basis: Basis) -> Tensor:
        """uint8 [B, H, N, half's bytes] -> restored tokens float32 [B, H, N * tile, D]."""
        return self.decode(self.layout.read(data).flatten(2, 3), basis)
