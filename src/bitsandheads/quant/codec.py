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
RIDGE = 0.01  # of each axis's energy, against over-fitting the map back
METRIC_FLOOR = 0.01  # share of the mean squared query that every channel counts at least


def principal_axes(gram: Tensor, scale: Tensor) -> Tensor:
    """Eigenvectors of a sum of products [..., D, D] of channels that are scaled by `scale` [..., D]: float32 [..., D, D], by falling eigenvalue."""
    scaled = gram.double() * scale[..., None] * scale[..., None, :]
    return torch.linalg.eigh(scaled)[1].flip(-1).float()


@dataclass(frozen=True)
class HalfCodec:
    """Codes one half (keys or values) of a tile.

    A basis is found once for each (sequence, KV head) and then kept, as tensors with leading [B, H]:
        order: uint8 [D], channels in order of falling importance (ranked specs)
        axes: bfloat16 [D, D], channels x axes by falling variance: x' = y' @ axes^T + mean; mean: float32 [D]
        forward: bfloat16 [D, D], y = (x - mean) @ forward, for query-weighted or refitted specs; without it axes is
            orthonormal and y = (x - mean) @ axes
        noise: float32 [D], mean squared error of each axis (specs with a noise correction)
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

    def weights(self, mass: Tensor | None) -> Tensor | None:
        """Token weights float32 [B, H, T] with mean 1 from the attention that tokens draw, or None where all count alike."""
        share = self.layout.spec.attention_weight
        if mass is None or not share:
            return None
        return 1 - share + share * mass / mass.mean(-1, keepdim=True).clamp(min=1e-30)

    def find_basis(self, x: Tensor, energy: Tensor, weights: Tensor | None = None) -> Basis:
        """Ranks or principal axes for these tokens.

        Args:
            x: float32 [B, H, T, D], the tokens that are packed first.
            energy: float32 [B, H, D], mean squared query of each channel over the query heads of the group.
            weights: float32 [B, H, T] with mean 1, or None ("principal" only).
        """
        spec = self.layout.spec
        if spec.transform == "principal":
            return self._principal(x, energy, weights)
        if spec.order == "none":
            return {}
        if spec.order == "range":
            weight = x.amax(2) - x.amin(2)
        else:
            weight = x.var(2, unbiased=False)
            if spec.order == "query":
                weight = weight * energy
        return {"order": weight.argsort(dim=-1, descending=True, stable=True).to(torch.uint8)}

    def _principal(self, x: Tensor, energy: Tensor, weights: Tensor | None) -> Basis:
        spec = self.layout.spec
        mean, gram = self.moments(x, weights)
        scale = self.metric(energy)
        basis = self.principal_basis(mean, scale, principal_axes(gram, scale))
        if spec.refit or spec.noise_correction:
            y = self.encode(x, basis)
            kept = self.layout.read(self.pack(x, basis, weights)).flatten(2, 3)
            if spec.refit:
                left = (kept if weights is None else kept * weights[..., None]).transpose(-1, -2)
                basis["axes"] = self.refit(basis, left @ kept, left @ (x - mean[:, :, None]))
            if spec.noise_correction:
                basis["noise"] = (y - kept).square().mean(2)
        return basis

    def moments(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted mean [B, H, D] of x [B, H, T, D], and the sum of the products of weighted deviations from the groups' means, [B, H, D, D].

        Every group stores its centres, so what is left to code is the deviation from the group's mean.
        """
        w = torch.ones_like(x[..., :1]) if weights is None else weights[..., None]
        mean = (x * w).mean(2)
        local, share = (t.unflatten(2, (-1, self.layout.group_size)) for t in (x - mean[:, :, None], w))
        local = local - (local * share).sum(3, keepdim=True) / share.sum(3, keepdim=True)
        local = (local * share.sqrt()).flatten(2, 3)
        return mean, local.transpose(-1, -2) @ local

    def metric(self, energy: Tensor) -> Tensor:
        """What a deviation of each channel counts, float32 [B, H, D] with mean 1 (query-weighted specs), from mean squared queries."""
        if not self.layout.spec.query_weighted:
            return torch.ones_like(energy)
        scale = (energy + METRIC_FLOOR * energy.mean(-1, keepdim=True)).clamp(min=1e-12).sqrt()
        return scale / scale.mean(-1, keepdim=True)

    def principal_basis(self, mean: Tensor, scale: Tensor, turn: Tensor) -> Basis:
        """A basis (before `refit`) from the mean, the metric and the principal axes in that metric."""
        if not self.layout.spec.query_weighted and not self.layout.spec.refit:
            return {"mean": mean, "axes": turn.to(torch.bfloat16)}
        forward, back = scale[..., None] * turn, turn / scale[..., None]
        return {"mean": mean, "forward": forward.to(torch.bfloat16), "axes": back.to(torch.bfloat16)}

    def refit(self, basis: Basis, gram: Tensor, cross: Tensor) -> Tensor:
        """The map from axes back to channels by ridge regression: bfloat16 [B, H, D, D], channels x axes.

        Args:
            basis: with the inverse of the map to the axes as "axes".
            gram, cross: sums over the packed tokens of w y' y'^T and w y' (x - mean)^T, y' the restored axes; float32 [B, H, D, D].
        """
        gram, cross = gram.double(), cross.double()
        gram = 0.5 * (gram + gram.mT)
        back = basis["axes"].double().transpose(-1, -2)
        power = gram.diagonal(dim1=-2, dim2=-1)
        ridge = RIDGE * power + 1e-6 * power.mean(-1, keepdim=True) + 1e-30
        factor = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge))[0]
        back = back + torch.cholesky_solve(cross - gram @ back, factor)
        return back.transpose(-1, -2).to(torch.bfloat16)

    def encode(self, x: Tensor, basis: Basis) -> Tensor:
        """Channels float32 [B, H, T, D] -> axes, sorted by class, of the same shape."""
        if "axes" in basis:
            return (x - basis["mean"][:, :, None]) @ basis.get("forward", basis["axes"]).float()
        if "order" in basis:
            x = x.gather(-1, basis["order"].long()[:, :, None].expand_as(x))
        if self._turned:
            keep, turn = x.split([self.head_dim - self._turned, self._turned], -1)
            x = torch.cat([keep, turn @ self._rotation(x).T], -1)
        return x

    def decode(self, y: Tensor, basis: Basis) -> Tensor:
        """Inverse of `encode`."""
        if "axes" in basis:
            return y @ basis["axes"].float().transpose(-1, -2) + basis["mean"][:, :, None]
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
            return q @ basis["axes"].float(), constant
        return self.encode(q, basis), torch.zeros_like(q[..., 0])

    def correction(self, q: Tensor, basis: Basis, scale: float, turned: Tensor | None = None) -> Tensor:
        """What packed scores are raised by (TensorQuant.noise_correction): float32 [B, H, Q] for queries q [B, H, Q, D].

        turned: the same queries over the axes, as `query` gives them, where they are at hand.
        E[exp(s + e)] = exp(s + var(e) / 2) for a normal error e of the score s = scale * q . k (log-normal mean).
        """
        share = self.layout.spec.noise_correction
        if not share:
            return torch.zeros(q.shape[:-1], device=q.device)
        if turned is None:
            turned = self.query(q.float(), basis)[0]
        return 0.5 * share * scale**2 * (turned.square() @ basis["noise"][..., None]).squeeze(-1)

    def _rotation(self, like: Tensor) -> Tensor:
        return fixed_rotation(self.layout.spec.transform, self._turned, like.device)

    def pack(self, x: Tensor, basis: Basis, weights: Tensor | None = None) -> Tensor:
        """Tokens float32 [B, H, T, D], weights as `weights` makes them or None -> uint8 [B, H, N, half's bytes]."""
        layout = self.layout
        y = self.encode(x, basis)
        if layout.spec.per == "token":
            return self._pack_per_token(y)
        y = y.unflatten(2, (-1, layout.groups, layout.group_size))  # [B, H, N, groups, G, D]
        share = None
        if weights is not None:
            grouped = weights.unflatten(2, (-1, layout.groups, layout.group_size))
            share = grouped / grouped.sum(-1, keepdim=True)
        step, centre, first = [], [], 0
        for cls, n in zip(layout.spec.classes, layout.sizes, strict=True):
            s, c = fit(y[..., first : first + n], cls, share)
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
            codes.append(quantize(y[..., part], step_all[..., None, part], centre_all[..., None, part], top, cls.levels == "ternary"))
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
