"""Search for the codec of the `balanced` and `extreme` presets by fake quantization on a real language model.

For every window (a text, a character offset, a context length) the model is prefilled once in full precision and its keys,
values and query statistics are kept. A variant then restores the packed tokens from simulated codes, the next 256 tokens are
teacher-forced in one forward, and the row written holds the true bits of the variant and the KL divergence of its next-token
distribution to the full-precision one, beside that of KIVI 2-bit (`kivi-2`).

    python search_presets.py --model MODEL --texts a.txt:20000 b.py --contexts 1088 4096 --variants balanced extreme --out rows.json

Shapes: N KV heads of one layer, T cached tokens, P packed tokens, D head_dim, n groups, G tokens in a group. Maps act on rows:
y = (x - mean) @ forward. (One file of more than 450 lines: the codec of the search is kept apart from the library's on purpose,
so that the rows stay reproducible when the library moves on.)
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache

RESIDUAL, NEXT, LAST_QUERIES = 128, 256, 256
GAUSS_STEP = (0.0, 1.596, 0.9957, 0.586, 0.335, 0.188, 0.1041)  # optimal uniform step of 2^b levels on N(0, 1), in sigma
GAUSS_MSE = (1.0, 0.3634, 0.1188, 0.0374, 0.01154, 0.00349, 0.00104)  # its mean squared error

# ---------------------------------------------------------------------------------------------------------------- the codec


@dataclass(frozen=True)
class Side:
    """How the keys (or the values) of one KV head are coded.

    `classes`: (bits, share of axes), steepest first; None: water-filling of `slots`.
    """

    classes: tuple[tuple[int, float], ...] | None = None
    slots: tuple[float, float] = (0.5, 0.5)  # two-bit and one-bit slots per axis, for water-filling
    max_bits: int = 6
    offsets: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)  # the classes that keep a centre for each (group, axis)
    metadata: str = "fp8"  # "fp32" (free), "fp16", "fp8"
    unit: bool = True  # axes scaled to unit variance (folded into the maps) before metadata are rounded
    metric: str = "none"  # "none", "diag", "full"
    shrink: float = 0.0  # of the metric towards its diagonal
    eps: float = 0.01  # of its mean diagonal, added to it
    queries: str = "last"  # the queries that observe: "last", "spread", "stale"
    mass: float = 0.0  # share of the token weights that follows the attention of the last queries
    mass_by: str = "mass"  # "mass": mean probability, "energy": mean squared probability
    weighted_steps: bool = False  # the weights in the least squares of steps and centres too
    within: int = 0  # covariance of the deviations from the means of groups of so many tokens
    refit: float = 0.0  # ridge of the least-squares decoding map; 0: the map of the basis
    basis_tokens: int | None = None  # basis from the first so many packed tokens
    search: tuple[float, ...] = ()  # multipliers of the step to try
    refine: int = 1  # least-squares rounds of step and centre
    minmax: tuple[int, ...] = ()  # the classes coded from minimum to maximum
    fixed_step: tuple[int, ...] = ()  # the classes whose step is one for the head (no metadata)
    ternary: float = 0.0  # gamma: all axes ternary in place of classes


@dataclass(frozen=True)
class Codec:
    """A whole preset. `correction`: share of the variance correction 0.5 scale^2 q' diag(mse) q' added to packed logits."""

    name: str
    keys: Side | None = None
    values: Side | None = None
    group: int = 128
    sinks: int = 8
    sink_bits: int = 16
    correction: float = 0.0
    kivi: int = 0  # bits of KIVI in place of the above
    salient: int = 0  # tokens beyond the first `sinks` kept whole in each KV head: those with the largest attention mass
    salient_by: str = "mass"
    salient_queries: str = "last"


@dataclass
class Observed:
    """What a set of prefill queries tells of one layer."""

    queries: Tensor  # their second moments [N, D, D]
    mass: Tensor  # mean probability of each token [N, T]
    energy: Tensor  # mean squared probability [N, T]


@dataclass
class Layer:
    """What one layer of a window gives: keys and values [N, T, D], the metric of its values [N, D, D], what the queries observed."""

    keys: Tensor
    values: Tensor
    output_metric: Tensor
    observed: dict[str, Observed]


def matrix_power(a: Tensor, p: float) -> Tensor:
    """Symmetric power of a batch of positive matrices."""
    w, v = torch.linalg.eigh(a)
    return (v * w.clamp(min=1e-12 * w.max().item()).pow(p).unsqueeze(-2)) @ v.transpose(-1, -2)


def basis(x: Tensor, side: Side, metric: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean [N, 1, D], forward and back [N, D, D] with forward @ back = 1, and the axes' variances [N, D] before scaling to unit."""
    n, _, d = x.shape
    x = x[:, : side.basis_tokens]
    w = (
        torch.full(x.shape[:2], 1.0 / x.shape[1])
        if weights is None
        else weights[:, : x.shape[1]] / weights[:, : x.shape[1]].sum(1, keepdim=True)
    )
    mean = (w.unsqueeze(-1) * x).sum(1, keepdim=True)
    eye = torch.eye(d).expand(n, d, d)
    if metric is None or side.metric == "none":
        root, inverse = eye, eye
    else:
        diagonal = torch.diag_embed(metric.diagonal(dim1=1, dim2=2))
        shrink = 1.0 if side.metric == "diag" else side.shrink
        m = (1 - shrink) * metric + shrink * diagonal
        m = m + side.eps * m.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye
        root, inverse = matrix_power(m, 0.5), matrix_power(m, -0.5)
    z = (x - mean) @ root
    if side.within:  # every group keeps its own centre: what is left to code is the deviation from it
        parts = z.unflatten(1, (-1, side.within))
        local = (w.unflatten(1, (-1, side.within)).unsqueeze(-1) * parts).sum(2, keepdim=True) / w.unflatten(1, (-1, side.within)).sum(2)[
            :, :, None, None
        ]
        z = (parts - local).flatten(1, 2)
    cov = z.transpose(1, 2) @ (z * w.unsqueeze(-1))
    var, r = torch.linalg.eigh(cov)
    var, r = var.flip(1).clamp(min=0), r.flip(2)
    forward, back = root @ r, r.transpose(1, 2) @ inverse
    if side.unit:
        sigma = (var + 1e-6 * var.mean(1, keepdim=True)).sqrt()
        forward, back = forward / sigma[:, None, :], back * sigma[:, :, None]
    return mean, forward, back.bfloat16().float(), var


def allocate(var: Tensor, side: Side, run: int = 8) -> Tensor:
    """Bits of each axis [N, D]: fixed classes, or the best use (by dynamic programming) of a fixed number of slots in runs of 8 axes."""
    n, d = var.shape
    if side.classes is not None:
        bits = torch.cat([torch.full((round(share * d),), b) for b, share in side.classes])
        return F.pad(bits, (0, d - len(bits))).expand(n, d)
    energy = var.unflatten(1, (-1, run)).sum(2)
    blocks, n2, n1 = d // run, round(side.slots[0] * d / run), round(side.slots[1] * d / run)
    options = [(t, o) for t in range(4) for o in range(2) if 2 * t + o <= side.max_bits]
    cost = torch.full((n, n2 + 1, n1 + 1), math.inf)
    cost[:, 0, 0] = 0
    choices = []
    for i in range(blocks):
        tries = torch.full((len(options), n, n2 + 1, n1 + 1), math.inf)
        for j, (t, o) in enumerate(options):
            if t <= n2 and o <= n1:
                tries[j, :, t:, o:] = cost[:, : n2 + 1 - t, : n1 + 1 - o] + (energy[:, i] * GAUSS_MSE[2 * t + o])[:, None, None]
        cost, choice = tries.min(0)
        choices.append(choice)
    bits = torch.zeros(n, blocks, dtype=torch.long)
    for h in range(n):
        t, o = n2, n1
        for i in range(blocks - 1, -1, -1):
            a, b = options[int(choices[i][h, t, o])]
            bits[h, i] = 2 * a + b
            t, o = t - a, o - b
    return bits.repeat_interleave(run, 1)


def round_metadata(x: Tensor, kind: str) -> Tensor:
    """Metadata [N, n, 1, D] as stored: fp8 e4m3 has one fp16 factor for each (head, group)."""
    if kind == "fp16":
        return x.half().float()
    if kind == "fp8":
        factor = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-7).half().float()
        return (x / factor).clamp(-448, 448).to(torch.float8_e4m3fn).float() * factor
    return x


def code(y: Tensor, bits: Tensor, side: Side, weights: Tensor | None = None) -> Tensor:
    """Restored y [N, n, G, D], coded with bits [N, D]: levels centre + step * (code - (2^b - 1) / 2); token weights [N, n, G]."""
    if weights is None:
        average = lambda x: x.mean(2, keepdim=True)  # noqa: E731
    else:
        share = (weights / weights.sum(2, keepdim=True)).unsqueeze(-1)
        average = lambda x: (x * share).sum(2, keepdim=True)  # noqa: E731
    b = bits[:, None, None, :]
    top = (2**b - 1).float()
    mid = top / 2

    def chosen(classes: Sequence[int]) -> Tensor:
        return torch.isin(b, torch.tensor(list(classes)))

    keep = chosen(side.offsets)
    centre = torch.where(keep, average(y), 0.0)
    if side.ternary:
        keep = torch.zeros_like(keep)
        limit = side.ternary * y.abs().mean(2, keepdim=True)
        u = (y > limit).float() - (y < -limit).float()
        return u * round_metadata((u * y).sum(2, keepdim=True) / u.pow(2).sum(2, keepdim=True).clamp(min=1), side.metadata)
    centred = y - centre
    gauss = torch.tensor(GAUSS_STEP)[b]
    step = gauss * (average(centred.pow(2)).sqrt() + 1e-9)

    def codes(step: Tensor, centre: Tensor) -> Tensor:
        u = ((y - centre) / step.clamp(min=1e-9) + mid).round_()
        return torch.minimum(u.clamp_(min=0), top) - mid

    if side.search:
        best, best_step = torch.full_like(step, math.inf), step
        for factor in side.search:
            error = average((codes(step * factor, centre) * step * factor + centre - y).pow(2))
            best_step = torch.where(error < best, step * factor, best_step)
            best = torch.minimum(error, best)
        step = best_step
    for _ in range(side.refine):
        u = codes(step, centre)
        um, ym = average(u), average(y)
        slope_kept = (average(u * y) - um * ym) / (average(u.pow(2)) - um**2).clamp(min=1e-9)
        slope_free = average(u * y) / average(u.pow(2)).clamp(min=1e-9)
        slope = torch.where(keep, slope_kept, slope_free)
        step = torch.where((b > 0) & (slope > 0), slope, step)
        centre = torch.where(keep, ym - step * um, centre)
    if side.minmax:
        low, high = y.amin(2, keepdim=True), y.amax(2, keepdim=True)
        step = torch.where(chosen(side.minmax), (high - low) / top.clamp(min=1), step)
        centre = torch.where(chosen(side.minmax), (high + low) / 2, centre)
    if side.fixed_step:
        one = gauss * y.pow(2).mean((1, 2), keepdim=True).sqrt()
        step = torch.where(chosen(side.fixed_step), one, step)
    step, centre = round_metadata(step, side.metadata), round_metadata(centre, side.metadata)
    return codes(step, centre) * step + centre


def restore(x: Tensor, side: Side, group: int, metric: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed tokens [N, P, D] as restored from their codes, and the second moment of the error in the original coordinates [N, D, D]
    (axes taken as uncorrelated)."""
    mean, forward, back, var = basis(x, side, metric, weights)
    bits = allocate(var, side)
    y = (x - mean) @ forward
    grouped = weights.unflatten(1, (-1, group)) if side.weighted_steps and weights is not None else None
    y_hat = code(y.unflatten(1, (-1, group)), bits, side, grouped).flatten(1, 2)
    if side.refit:  # the decoding map by least squares given the codes, drawn towards the one that belongs to the basis
        w = (torch.ones_like(x[..., :1]) if weights is None else weights.unsqueeze(-1) * x.shape[1]).sqrt()
        a, target = w * y_hat, w * (x - mean - y_hat @ back)
        ridge = side.refit * x.shape[1] * torch.eye(x.shape[2])
        back = (back + torch.linalg.solve(a.transpose(1, 2) @ a + ridge, a.transpose(1, 2) @ target)).bfloat16().float()
    mse = (y - y_hat).pow(2).mean(1)
    return y_hat @ back + mean, back.transpose(1, 2) @ (mse[:, :, None] * back)


def asymmetric(x: Tensor, bits: int, dim: int) -> Tensor:
    """Restored x of KIVI's codes: from minimum to maximum along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def side_bits(side: Side, d: int, group: int) -> float:
    """Bits of one packed element of keys or values, metadata included, basis not."""
    if side.ternary:
        return 1.6 + (8 if side.metadata == "fp8" else 16) / group
    if side.classes is not None:
        counts = [(b, round(s * d) / d) for b, s in side.classes]
        counts.append((0, 1 - sum(s for _, s in counts)))
        stored = sum(b * s for b, s in counts)
        steps = sum(s for b, s in counts if b > 0 and b not in side.fixed_step)
        centres = sum(s for b, s in counts if b in side.offsets)
    else:  # the numbers of axes depend on the head: there is room for every slot to be an axis of its own
        stored = 2 * side.slots[0] + side.slots[1]
        steps = min(1.0, sum(side.slots))
        centres = 1.0 if 0 in side.offsets else steps if 1 in side.offsets else min(1.0, side.slots[0])
    each = {"fp32": 0, "fp16": 16, "fp8": 8}[side.metadata]
    factors = 16 * ((steps > 0) + (centres > 0)) / d if side.metadata == "fp8" else 0
    return stored + (each * (steps + centres) + factors) / group


def true_bits(codec: Codec, d: int, tokens: int, matrices: bool = False) -> float:
    """Bits per element held, residual not counted, for a context of `tokens`; `matrices`: the D x D maps (bf16) too."""
    if codec.kivi:
        return codec.kivi + 32 / codec.group
    keys = side_bits(codec.keys, d, codec.group) if codec.keys else 16.0
    values = side_bits(codec.values, d, codec.group) if codec.values else 16.0
    whole = codec.sinks + codec.salient
    packed = (tokens - RESIDUAL - whole) // codec.group * codec.group
    maps = sum(
        2 if side and side.refit else 1 for side in (codec.keys, codec.values)
    )  # a refitted decoding map is not the inverse of the coding one
    extra = maps * d * d * 16 / (2 * d) if matrices else 0
    return (whole * codec.sink_bits + packed * (keys + values) / 2 + extra) / (packed + whole)


# ---------------------------------------------------------------------------------------------------------------- the model


class Probe:
    """The attention function and its state: it captures during prefill; while the next tokens are forced it adds the correction."""

    def __init__(self) -> None:
        self.capture: list[Layer] | None = None
        self.quadratic: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> packed tokens [N, P], [N, D, D]: bias = q^T B q on their logits

    def __call__(self, module, q, k, v, mask, scaling=None, **kwargs):
        """Attention of [B, H, T, D]; B = 1."""
        b, hq, n, d = q.shape
        hk, t = k.shape[1], k.shape[2]
        r = hq // hk
        scaling = d**-0.5 if scaling is None else scaling
        if self.capture is not None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            self.capture.append(self.statistics(module, q, k, v, scaling))
            return out.transpose(1, 2), None
        q = q.reshape(hk, r * n, d)
        causal = torch.ones(n, t, dtype=torch.bool).tril(t - n).repeat(r, 1)
        k, v = k[0], v[0]
        if module.layer_idx in self.quadratic:
            packed, matrix = self.quadratic[module.layer_idx]
            column = ((q @ matrix) * q).sum(-1, keepdim=True) / scaling
            flag = torch.zeros(hk, t, 1)
            flag.scatter_(1, packed[:, :, None], 1.0)
            pad = lambda x, extra: torch.cat([x, extra, x.new_zeros(hk, x.shape[1], 7)], -1)  # noqa: E731
            q, k, v = pad(q, column), pad(k, flag), F.pad(v, (0, 8))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=causal, scale=scaling)[..., :d]
        return out.reshape(b, hq, n, d).transpose(1, 2), None

    @staticmethod
    def statistics(module, q, k, v, scaling) -> Layer:
        """Queries that observe: the last 256; 256 spread over the prefill; 256 that ended 768 tokens ago."""
        _, hq, t, d = q.shape
        hk, n = k.shape[1], LAST_QUERIES
        q = q[0].unflatten(0, (hk, -1))
        positions = {"last": torch.arange(t - n, t), "spread": torch.linspace(64, t - 1, n).long()}
        positions["mixed"] = torch.cat([torch.linspace(64, t - n // 2 - 1, n // 2).long(), torch.arange(t - n // 2, t)])
        if t > 2 * n + 512:
            positions["stale"] = torch.arange(t - 768 - n, t - 768).clamp(min=0)
        observed = {}
        for name, at in positions.items():
            some = q[:, :, at]  # [N, r, n, D]
            visible = at[:, None] >= torch.arange(t)
            p = (some @ k[0, :, None].transpose(2, 3) * scaling).masked_fill(~visible, -math.inf).softmax(-1)
            seen = visible.sum(0).clamp(min=1)
            flat = some.flatten(1, 2)
            observed[name] = Observed(flat.transpose(1, 2) @ flat / flat.shape[1], p.sum(2).mean(1) / seen, p.pow(2).sum(2).mean(1) / seen)
        w = module.o_proj.weight.float().unflatten(1, (hk, hq // hk, d)).permute(1, 2, 0, 3)  # [N, r, hidden, D]
        return Layer(k[0].clone(), v[0].clone(), (w.transpose(2, 3) @ w).sum(1), observed)


@dataclass
class Window:
    """A prefilled context and what followed it."""

    name: str
    context: int
    ids: Tensor  # the next tokens [1, NEXT]
    layers: list[Layer]
    full: Tensor  # log probabilities [1, NEXT - 1, vocabulary]
    kivi: float = math.nan


class Bench:
    """The model, its attention seen through a `Probe`."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.probe = Probe()
        AttentionInterface.register("search", self.probe)
        AttentionMaskInterface.register("search", lambda *args, **kwargs: None)
        self.model.set_attn_implementation("search")

    @torch.no_grad()
    def window(self, text: str, context: int) -> Window:
        """Prefill `context` tokens of FILE[:OFFSET] and keep what the variants need.

        FILE:OFFSET+FILE:OFFSET: the next tokens come from the second text, and so ask for something else than the last queries did.
        """
        tokens, names = [], []
        for part in text.split("+"):
            path, _, offset = part.partition(":")
            words = Path(path).read_text(errors="ignore")[int(offset or 0) :][: 8 * (context + NEXT)]
            tokens.append(self.tokenizer(words, return_tensors="pt").input_ids)
            names.append(f"{Path(path).name}:{offset or 0}")
        ids = torch.cat([tokens[0][:, :context], tokens[1][:, :NEXT]], 1) if len(tokens) > 1 else tokens[0][:, : context + NEXT]
        assert ids.shape[1] == context + NEXT, f"{text} is too short for a context of {context}"
        self.probe.capture, self.probe.quadratic = [], {}
        self.model(ids[:, :context], use_cache=False, logits_to_keep=1)
        window = Window("+".join(names), context, ids[:, context:], self.probe.capture, torch.empty(0))
        self.probe.capture = None
        window.full = self.forced(window, [(x.keys, x.values) for x in window.layers])
        return window

    def forced(self, window: Window, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Log probabilities of the next tokens with the given keys and values [N, T, D] of each layer as the past."""
        cache = DynamicCache(config=self.model.config)
        for i, (k, v) in enumerate(states):
            cache.update(k[None], v[None], i)
        return torch.log_softmax(self.model(window.ids, past_key_values=cache).logits[:, :-1].float(), -1)

    @torch.no_grad()
    def measure(self, codec: Codec, window: Window) -> dict:
        """One row: the KL divergence of a variant on a window."""
        start = time.time()
        states = []
        self.probe.quadratic = {}
        for i, layer in enumerate(window.layers):
            d = layer.keys.shape[2]
            part, k, v = self.packed_tokens(codec, layer), layer.keys.clone(), layer.values.clone()
            index = part[:, :, None].expand(-1, -1, d)
            x, y = k.gather(1, index), v.gather(1, index)
            if codec.kivi:
                x = asymmetric(x.unflatten(1, (-1, codec.group)), codec.kivi, 2).flatten(1, 2)
                y = asymmetric(y.unflatten(2, (-1, codec.group)), codec.kivi, 3).flatten(2, 3)
            if codec.keys:
                metric = layer.observed[codec.keys.queries].queries
                x, error = restore(x, codec.keys, codec.group, metric, self.mixed(layer, part, codec.keys))
                if codec.correction:
                    scaling = self.model.model.layers[i].self_attn.scaling
                    self.probe.quadratic[i] = part, 0.5 * codec.correction * scaling**2 * error
            if codec.values:
                y, _ = restore(y, codec.values, codec.group, layer.output_metric, self.mixed(layer, part, codec.values))
            k.scatter_(1, index, x), v.scatter_(1, index, y)
            states.append((k, v))
        log_probs = self.forced(window, states)
        kl = (window.full.exp() * (window.full - log_probs)).sum(-1).mean().item()
        top1 = (log_probs.argmax(-1) == window.full.argmax(-1)).float().mean().item()
        return {
            "variant": codec.name,
            "window": window.name,
            "context": window.context,
            "kl": round(kl, 5),
            "kl_ratio": 1.0 if math.isnan(window.kivi) else round(kl / window.kivi, 4),
            "top1": round(top1, 4),
            "bits": round(true_bits(codec, window.layers[0].keys.shape[2], window.context), 4),
            "seconds": round(time.time() - start, 1),
        }

    @staticmethod
    def packed_tokens(codec: Codec, layer: Layer) -> Tensor:
        """Indices [N, P] of the tokens each KV head packs: not the first `sinks`, not its `salient` ones, not the newest."""
        whole = codec.sinks + codec.salient
        end = whole + (layer.keys.shape[1] - RESIDUAL - whole) // codec.group * codec.group
        score = getattr(layer.observed[codec.salient_queries], codec.salient_by)[:, codec.sinks : end]
        order = score.argsort(1, descending=True)[:, codec.salient :]
        return order.sort(1).values + codec.sinks

    @staticmethod
    def mixed(layer: Layer, part: Tensor, side: Side) -> Tensor | None:
        """Token weights [N, P] with sum 1, or None where they are uniform."""
        if not side.mass:
            return None
        mass = getattr(layer.observed[side.queries], side.mass_by).gather(1, part)
        return (1 - side.mass) / mass.shape[1] + side.mass * mass / mass.sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- the variants

KIVI = Codec("kivi-2", kivi=2, group=32, sinks=0)
STEEP = ((4, 0.125), (3, 0.125), (2, 0.125), (1, 0.375), (0, 0.25))
QUARTERS = ((3, 0.25), (2, 0.25), (1, 0.25), (0, 0.25))
ALL = (0, 1, 2, 3, 4, 5, 6)
edit = dataclasses.replace


def both(codec: Codec, name: str, **changes) -> Codec:
    """The codec under another name, with the changes made to keys and values."""
    return edit(codec, name=name, keys=edit(codec.keys, **changes), values=edit(codec.values, **changes))


def ladder() -> list[Codec]:
    """From the first transform coder to `balanced`, one change at a time; then `extreme`, and what was tried beside them."""
    plain = Side(metadata="fp32", unit=False)
    first = Codec(
        "transform, 32 first, min-max",
        edit(plain, classes=STEEP, metric="diag", minmax=(3, 4)),
        edit(plain, classes=QUARTERS, minmax=(3, 4)),
        sinks=32,
    )
    sigma = edit(both(first, "sigma steps, 8 first", minmax=()), sinks=8)
    salient = edit(sigma, name="+ whole tokens by attention 1+7", sinks=1, salient=7)
    fp8 = both(salient, "+ fp8 metadata", metadata="fp8", unit=True)
    mass = edit(
        fp8,
        name="+ token weights",
        keys=edit(fp8.keys, mass=0.25, weighted_steps=True),
        values=edit(fp8.values, mass=0.7, weighted_steps=True),
    )
    water = both(mass, "+ water-filling", classes=None)
    within = both(water, "+ covariance within groups", within=128)
    corrected = edit(within, name="+ variance correction", correction=0.8)
    refitted = both(corrected, "+ decoding map by least squares", refit=0.01)
    balanced = edit(refitted, name="balanced", sinks=1, salient=3)
    extreme = edit(
        balanced,
        name="extreme",
        keys=edit(balanced.keys, slots=(0.5, 0.25), offsets=(1, 2, 3, 4, 5, 6)),
        values=edit(balanced.values, slots=(0.25, 0.5), offsets=(1, 2, 3, 4, 5, 6)),
    )
    lean = both(balanced, "extreme, 1.0 + 1.0 code bits")
    lean = edit(lean, keys=edit(lean.keys, slots=(0.5, 0.0)), values=edit(lean.values, slots=(0.25, 0.5)))
    stale = edit(both(extreme, "extreme, stale observers", queries="stale"), salient_queries="stale")
    return [
        *(KIVI, first, sigma, salient, fp8, mass, water, within, corrected, refitted, balanced),
        edit(both(balanced, "balanced, spread observers", queries="spread"), salient_queries="spread"),
        extreme,
        lean,
        edit(extreme, name="extreme without variance correction", correction=0.0),
        stale,
        both(balanced, "balanced, basis from 512 tokens", basis_tokens=512, refit=0.0),
        edit(balanced, name="balanced, ternary values", values=edit(balanced.values, ternary=0.7)),
    ]


def tried(balanced: Codec) -> list[Codec]:
    """Changes of `balanced` that brought nothing, or too little; run by name only."""
    keys, values = balanced.keys, balanced.values
    return [
        edit(balanced, name="full query metric", keys=edit(keys, metric="full", shrink=0.3)),
        edit(balanced, name="values by the output projection", values=edit(values, metric="full", shrink=0.3)),
        both(balanced, "weights by squared probability", mass_by="energy"),
        edit(balanced, name="whole tokens by squared probability", salient_by="energy"),
        both(balanced, "search of step multipliers", search=(0.8, 0.9, 1.0, 1.1, 1.25)),
        both(balanced, "one-bit axes with one step per head", fixed_step=(1,)),
        both(balanced, "centres from 2 bits on", offsets=(2, 3, 4, 5, 6)),
        both(balanced, "no centres", offsets=(), within=0),
        both(balanced, "fp16 metadata", metadata="fp16"),
        both(balanced, "at most 4 bits", max_bits=4),
        both(balanced, "basis from 128 tokens", basis_tokens=128, refit=0.0),
        both(balanced, "basis from 256 tokens", basis_tokens=256, refit=0.0),
        edit(balanced, name="keys only", values=None),
        edit(balanced, name="values only", keys=None, correction=0.0),
    ]


def shift_error(codec: Codec, layer: Layer, norm: float = 10.0) -> float:
    """Relative change of the keys' error when a constant vector of `norm` times their norm is added to all (which changes no softmax)."""
    x = layer.keys[:, 8:904]
    metric = layer.observed["last"].queries
    constant = torch.randn(x.shape[0], 1, x.shape[2], generator=torch.Generator().manual_seed(0))
    constant = constant / constant.norm(dim=2, keepdim=True) * norm * x.norm(dim=2).pow(2).mean().sqrt()
    error = (restore(x, codec.keys, codec.group, metric, None)[0] - x).pow(2).mean()
    shifted = (restore(x + constant, codec.keys, codec.group, metric, None)[0] - x - constant).pow(2).mean()
    return (shifted / error - 1).item()


def pooled(rows: list[dict]) -> list[dict]:
    """Of each variant and context: the sum of the KLs over the sum of those of `kivi-2`, and the worst window's ratio."""
    reference = {(row["window"], row["context"]): row["kl"] for row in rows if row["variant"] == "kivi-2"}
    gathered: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        gathered.setdefault((row["variant"], row["context"]), []).append((row["kl"], reference[row["window"], row["context"]]))
    return [
        {
            "variant": variant,
            "context": context,
            "windows": len(pairs),
            "pooled_ratio": round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 4),
            "worst_ratio": round(max(a / b for a, b in pairs), 4),
        }
        for (variant, context), pairs in sorted(gathered.items(), key=lambda item: item[0][1])
    ]


def main() -> None:
    """Run the variants over the windows; the file is written after each window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", nargs="+", required=True, help="FILE[:OFFSET] or FILE:OFFSET+FILE:OFFSET")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1088])
    parser.add_argument("--variants", nargs="+", help="names (default: the ladder); kivi-2 is always run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = {codec.name: codec for codec in ladder()}
    default = list(known)
    known |= {codec.name: codec for codec in tried(known["balanced"])}
    if unknown := set(args.variants or []) - set(known):
        parser.error(f"unknown variants {sorted(unknown)}; known: {sorted(known)}")
    codecs = [known[name] for name in args.variants or default if name != "kivi-2"]
    bench = Bench(args.model)
    d = bench.model.config.head_dim
    report = {
        "model": Path(args.model).name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "residual": RESIDUAL,
        "next_tokens": NEXT,
        "variants": {},
        "rows": [],
    }
    if args.append and args.out.exists():
        report = json.loads(args.out.read_text())
    for codec in [KIVI, *codecs]:
        bits = {str(t): round(true_bits(codec, d, t), 4) for t in (1024, 2048, 4096)}
        report["variants"][codec.name] = {
            "bits": bits | {"32768 with matrices": round(true_bits(codec, d, 32768, matrices=not codec.kivi), 4)},
            "codec": dataclasses.asdict(codec),
        }
    for context in args.contexts:
        for text in args.texts:
            window = bench.window(text, context)
            row = bench.measure(KIVI, window)
            window.kivi = row["kl"]
            report["rows"].append(row)
            for codec in codecs:
                row = bench.measure(codec, window)
                report["rows"].append(row)
                figures = f"bits {row['bits']:.3f}  KL {row['kl']:.4f}  ratio {row['kl_ratio']:.3f}  top-1 {row['top1']:.3f}"
                print(f"{window.name:28.28s} {context:5d} {codec.name:44s} {figures}", flush=True)
            if codecs:
                report["rows"][-1]["key_shift_error"] = shift_error(codecs[-1], window.layers[len(window.layers) // 2])
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    report["pooled"] = pooled(report["rows"])
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["pooled"]:
        print(f"{row['context']:5d} {row['variant']:52s} pooled {row['pooled_ratio']:.3f}  worst {row['worst_ratio']:.3f}")


if __name__ == "__main__":
    main()
