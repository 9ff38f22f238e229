"""What a quantizer is told: immutable descriptions without tensors and without state.

Every code restores as  x' = centre + step * (code - top / 2)  with code in 0..top, for each axis (a channel, or a rotated
direction) and group of tokens; top = 2^bits - 1, or 2 for ternary codes.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from ..errors import PlanError
from .metadata import MetadataFormat

Transform = Literal["none", "hadamard", "dct", "fourier", "principal"]
Order = Literal["none", "range", "variance", "query"]
Levels = Literal["minmax", "gaussian", "sign", "ternary"]
SalienceBy = Literal["attention", "embedding", "given"]

TERNARY = "ternary"
AXIS_MULTIPLE = 8
TILE_SIZES = (16, 32, 64, 128)


def channel_block(head_dim: int) -> int:
    """Neighbouring channels that share a step with per="token": 32, or the largest divisor that 32 and head_dim share."""
    return math.gcd(head_dim, 32)


def _one_of(name: str, value: object, allowed: Any) -> None:
    choices = get_args(allowed) or allowed
    if not any(value == c and type(value) is type(c) for c in choices):  # neither 128.0 nor True is a whole number
        raise PlanError(f"{name} is {value!r}; allowed are {', '.join(map(repr, choices))}.")


def _whole(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise PlanError(f"{name} is {value!r}; give a whole number of at least {low}.")


@dataclass(frozen=True)
class AxisClass:
    """A share of a head's axes that are coded alike.

    Attributes:
        bits: 0 to 6, or "ternary" (three levels, five codes to a byte).
        share: share of the head's axes, above 0 and at most 1.
        levels: "minmax" (2^bits levels from minimum to maximum), "gaussian" (a uniform step that is optimal for a normal
            distribution of the group's variance), "sign" (1 bit: mean +- least-squares step), "ternary"
            (threshold gamma * mean|x|, least-squares step; VidKV, arXiv 2503.16257, section 3.3, with its scale mended).
        centre: whether a centre is stored for each axis and group; without it codes lie around the head's own mean
            (or around zero), at no cost. A 0-bit axis with a centre restores to the group's mean.
    Raises:
        PlanError: a value that is not allowed, or bits and levels that do not go together.
    """

    bits: int | Literal["ternary"]
    share: float
    levels: Levels = "gaussian"
    centre: bool = True

    def __post_init__(self) -> None:
        _one_of("AxisClass.bits", self.bits, (0, 1, 2, 3, 4, 5, 6, TERNARY))
        _one_of("AxisClass.levels", self.levels, Levels)
        _one_of("AxisClass.centre", self.centre, (True, False))
        if not 0 < self.share <= 1:
            raise PlanError(f"AxisClass.share is {self.share!r}; give a number above 0 and at most 1.")
        if (self.bits == TERNARY) != (self.levels == "ternary") or (self.levels == "sign" and self.bits != 1):
            raise PlanError(
                f"AxisClass(bits={self.bits!r}, levels={self.levels!r}) do not fit: ternary bits take ternary levels "
                'and "sign" takes 1 bit.'
            )
        if self.levels == "minmax" and not self.centre and self.bits != 0:
            raise PlanError('AxisClass(levels="minmax") needs centre=True: the minimum is not where the mean is.')


@dataclass(frozen=True)
class TensorQuant:
    """How the keys, or the values, of a head group are coded.

    Attributes:
        classes: axis classes, the most important first; the shares sum to 1.
        per: "channel": step and centre for each axis over group_size tokens; "token": for each token over blocks of
            32 channels (KIVI's values, arXiv 2402.02750); takes one class of 1 to 4 bits and no transform.
        transform: "none"; "hadamard", "dct", "fourier": a fixed orthonormal real rotation; "principal": the principal
            axes of the packed tokens, found once for each sequence and KV head.
        last_class_only: apply a fixed rotation to the channels of the last class only (VidKV rotates its 1-bit channels).
        order: how channels are ranked into classes when the transform is not "principal": by range, by variance, by
            variance times mean squared query ("query"), or not at all.
        query_weighted: "principal" only: axes that minimise the error of q . k under the prompt's last queries.
        refit: "principal" only: the map from axes back to channels by least squares on the decoded codes, in place of the
            inverse of the map to the axes (costs one more D x D matrix).
        attention_weight: share of a prompt token's weight in means, axes, steps and centres that follows the attention it draws
            from the newest queries (the rest is the same for all tokens); tokens packed later count alike.
        noise_correction: keys, "principal" only: codes have less variance than the keys they stand for, so exp(q . k) is
            underestimated; packed scores are raised by this share of half the variance of the error of scale * q . k.
    Raises:
        PlanError: shares that do not sum to 1, or options that do not go together.
    """

    classes: tuple[AxisClass, ...]
    per: Literal["channel", "token"] = "channel"
    transform: Transform = "none"
    last_class_only: bool = False
    order: Order = "none"
    query_weighted: bool = False
    refit: bool = False
    noise_correction: float = 0.0
    attention_weight: float = 0.0

    def __post_init__(self) -> None:
        _one_of("TensorQuant.per", self.per, ("channel", "token"))
        _one_of("TensorQuant.transform", self.transform, Transform)
        _one_of("TensorQuant.order", self.order, Order)
        for name in ("last_class_only", "query_weighted", "refit"):
            _one_of(f"TensorQuant.{name}", getattr(self, name), (True, False))
        if not self.classes or abs(sum(c.share for c in self.classes) - 1) > 1e-6:
            raise PlanError(f"The shares of TensorQuant.classes sum to {sum(c.share for c in self.classes)}; they must sum to 1.")
        ternary = [i for i, c in enumerate(self.classes) if c.bits == TERNARY]
        if ternary and ternary[-1] - ternary[0] >= len(ternary):
            raise PlanError(f"Classes {ternary} of TensorQuant.classes are ternary; put ternary classes side by side, as neighbours.")
        if self.per == "token" and (len(self.classes) != 1 or self.transform != "none" or self.classes[0].bits not in (1, 2, 3, 4)):
            raise PlanError('TensorQuant(per="token") takes one class of 1 to 4 bits and transform="none".')
        for name in ("query_weighted", "refit", "noise_correction"):
            if getattr(self, name) and self.transform != "principal":
                raise PlanError(f'TensorQuant.{name} needs transform="principal".')
        for name in ("noise_correction", "attention_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"TensorQuant.{name} is {getattr(self, name)!r}; give a share from 0 to 1.")
        if self.last_class_only and self.transform not in ("hadamard", "dct", "fourier"):
            raise PlanError('TensorQuant.last_class_only needs transform "hadamard", "dct" or "fourier".')


@dataclass(frozen=True)
class Salience:
    """Prompt tokens whose values get more bits (VidKV's semantic token protection).

    Attributes:
        share: share of the packed prompt tokens, above 0 and below 1 (the paper: 0.2).
        by: "attention": mass of attention from the last prompt queries, for each KV head; "embedding": similarity of a visual token's
            embedding with the text tokens' (the paper's way, see methods.vidkv.semantic_scores; the first chunk of a prompt, of which the
            model must be given the `input_ids`); "given": scores handed to the cache with `set_token_scores`.
        classes: the classes of a salient token's values; the transform is that of the other tokens.
    Raises:
        PlanError: a value that is not allowed.
    """

    share: float
    by: SalienceBy = "attention"
    classes: tuple[AxisClass, ...] = (AxisClass(2, 1.0, "minmax"),)

    def __post_init__(self) -> None:
        _one_of("Salience.by", self.by, SalienceBy)
        if not 0 < self.share < 1:
            raise PlanError(f"Salience.share is {self.share!r}; give a number between 0 and 1.")
        total = sum(c.share for c in self.classes)
        if abs(total - 1) > 1e-6:
            raise PlanError(f"The shares of Salience.classes sum to {total}; they must sum to 1.")

    @property
    def scored(self) -> bool:
        """Whether scores come from outside, one for each token and the same for all heads."""
        return self.by != "attention"


@dataclass(frozen=True)
class KVQuant:
    """Fewer bits: how a head group's tokens are stored.

    Attributes:
        keys, values: the codes.
        group_size: tokens that share a step and a centre; 16, 32, 64 or 128, at most `tile`.
        tile: tokens that are packed at once; 16, 32, 64 or 128.
        residual: the newest tokens that stay whole: `residual` to residual + tile - 1 of them.
        sink: the first real tokens, which stay whole.
        heavy: further whole tokens of each KV head: those that draw the most attention from the newest queries when packing
            starts (heavy hitters; they are taken out of the packed tokens, whose order does not matter to attention).
        basis_tokens: packing starts when this many tokens (beside sink and residual) are there, so that ranks and
            rotations rest on enough of them; later groups keep the basis that was found then.
        metadata: "fp16" or "fp8" (e4m3 with one fp16 factor for each head, group and array).
        salience: prompt tokens whose values get more bits, or None.
    Raises:
        PlanError: a value that is not allowed, or options that do not go together.
    """

    keys: TensorQuant
    values: TensorQuant
    group_size: int = 128
    tile: int = 128
    residual: int = 128
    sink: int = 32
    heavy: int = 0
    basis_tokens: int = 128
    metadata: MetadataFormat = "fp16"
    salience: Salience | None = None

    @property
    def needs_queries(self) -> bool:
        """Whether the newest queries steer the codes, so that they must be kept until packing starts."""
        ranked = any(s.query_weighted or s.order == "query" for s in (self.keys, self.values))
        return ranked or self.needs_mass

    @property
    def needs_mass(self) -> bool:
        """Whether the attention that tokens draw steers the codes."""
        weighted = self.keys.attention_weight > 0 or self.values.attention_weight > 0
        return weighted or self.heavy > 0 or (self.salience is not None and self.salience.by == "attention")

    def start_tiles(self, tokens: int) -> int:
        """Tiles that are packed when packing starts with `tokens` real tokens; 0: it does not start yet."""
        return (tokens - self.sink - self.heavy - self.residual) // self.tile if tokens >= self.start_length else 0

    @property
    def start_length(self) -> int:
        """Real tokens with which packing starts."""
        return self.sink + self.heavy + self.residual + -(-self.basis_tokens // self.tile) * self.tile

    def __post_init__(self) -> None:
        _one_of("KVQuant.tile", self.tile, TILE_SIZES)
        _one_of("KVQuant.group_size", self.group_size, TILE_SIZES)
        _one_of("KVQuant.metadata", self.metadata, MetadataFormat)
        _whole("KVQuant.residual", self.residual, 0)
        _whole("KVQuant.sink", self.sink, 0)
        _whole("KVQuant.heavy", self.heavy, 0)
        _whole("KVQuant.basis_tokens", self.basis_tokens, 1)
        if self.group_size > self.tile:
            raise PlanError(f"KVQuant.group_size {self.group_size} is larger than the tile of {self.tile} tokens; make the tile larger.")
        if self.values.noise_correction:
            raise PlanError("KVQuant.values.noise_correction is set, but only scores can be corrected; set it for the keys.")
        if self.salience is not None:
            if self.salience.scored and (self.heavy or self.keys.attention_weight or self.values.attention_weight):
                raise PlanError(
                    f'Salience(by="{self.salience.by}") does not go with heavy tokens or attention weights; use by="attention".'
                )
            replace(self.values, classes=self.salience.classes)  # raises where they do not fit


def class_sizes(classes: tuple[AxisClass, ...], head_dim: int) -> list[int]:
    """Axes of each class: the cumulative shares rounded to multiples of 8, so that class borders fall on slot runs."""
    borders, total = [0], 0.0
    for c in classes:
        total += c.share
        borders.append(round(total * head_dim / AXIS_MULTIPLE + 1e-9) * AXIS_MULTIPLE)
    borders[-1] = head_dim
    return [b - a for a, b in pairwise(borders)]
