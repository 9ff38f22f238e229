"""Plans: immutable data that say how every KV head of every layer is stored. Methods only build plans."""

import dataclasses
import json
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from .errors import PlanError
from .quant.spec import AxisClass, KVQuant, Salience, TensorQuant
from .quant.tile import TileLayout
from .stores.packed import RECENT_QUERIES
from .stores.window import ROLLBACK

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Window:
    """Fewer heads: only the first `sink` real tokens and the newest `recent` ones are kept, whole.

    A query at real position t sees the tokens j <= t with j < sink or j > t - recent (StreamingLLM, arXiv 2309.17453; RLKV,
    arXiv 2510.08525). The prompt itself is processed with full attention.

    Raises:
        PlanError: sink is no whole number of at least 0, or recent none of at least 1.
    """

    sink: int = 32
    recent: int = 128

    def __post_init__(self) -> None:
        for name in ("sink", "recent"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name == "recent"):
                raise PlanError(f"Window.{name} is {value!r}; give a whole number of at least {int(name == 'recent')}.")


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that are stored alike.

    Attributes:
        kv_heads: their indices, or None for all heads of the layer.
        window: keep only sink and recent tokens, or None for all tokens.
        quant: how tokens are coded, or None for the model's dtype. A group has a window or a quantizer, not both.
    Raises:
        PlanError: both, or heads that are named twice or not at all.
    """

    kv_heads: tuple[int, ...] | None = None
    window: Window | None = None
    quant: KVQuant | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.quant is not None:
            raise PlanError("A HeadGroup has a window or a quantizer, not both: windowed tokens are few and stay whole.")
        whole = self.kv_heads is None or all(isinstance(h, Integral) and not isinstance(h, bool) for h in self.kv_heads)
        if self.kv_heads is not None and (not self.kv_heads or not whole or len(set(self.kv_heads)) != len(self.kv_heads)):
            raise PlanError(f"HeadGroup.kv_heads is {self.kv_heads!r}; give different head indices, at least one, or None for all.")


class Sparsity(NamedTuple):
    """How sparse a plan is, in both ways of counting.

    windowed: share of the KV heads (of compressed layers) that have a window: the papers' sparsity s.
    bytes_saved: share of the bytes that the model's own dtype would take at a length, sink and window counted.
    """

    windowed: float
    bytes_saved: float

    def __str__(self) -> str:
        return f"{self.windowed:.1%} of the KV heads windowed, {self.bytes_saved:.1%} of the bytes saved"


@dataclass(frozen=True)
class LayerShape:
    """What a plan must know of a layer: compressed False means that transformers' own layer class keeps it."""

    q_heads: int
    kv_heads: int
    head_dim: int
    compressed: bool = True


def _check_partition(groups: tuple[HeadGroup, ...], shape: LayerShape, layer: int) -> tuple[HeadGroup, ...]:
    everything = tuple(range(shape.kv_heads))
    full = tuple(dataclasses.replace(g, kv_heads=everything) if g.kv_heads is None else g for g in groups)
    named = sorted(h for g in full for h in g.kv_heads or ())
    if named != list(everything):
        raise PlanError(
            f"Layer {layer}: the head groups name the KV heads {named}, but must name each of 0..{shape.kv_heads - 1} once. "
            "Give every head to exactly one group."
        )
    for g in full:
        if g.quant is not None and (shape.head_dim % 8 or shape.head_dim > 256):
            raise PlanError(f"Layer {layer}: head_dim is {shape.head_dim}; quantized heads need a multiple of 8 of at most 256.")
    return full


@dataclass(frozen=True)
class CachePlan:
    """How a cache stores every head. Model-independent until `resolve`.

    Attributes:
        name: what tables call it.
        groups: head groups of every layer that `layers` does not name.
        layers: layer index -> head groups of that layer.
        note: where the plan comes from (paper, search, head scores).
        strict: `layers` must name exactly the compressed layers of the model, as in plans from head scores, which belong to one model.
    Raises:
        PlanError: a layer without head groups. Whether heads and layers exist is seen when the plan meets a model, see `resolve`.
    """

    name: str
    groups: tuple[HeadGroup, ...] = (HeadGroup(),)
    layers: dict[int, tuple[HeadGroup, ...]] = dataclasses.field(default_factory=dict)
    note: str = ""
    strict: bool = False

    def __post_init__(self) -> None:
        for groups in (self.groups, *self.layers.values()):
            if not groups:
                raise PlanError(f"Plan {self.name!r} has a layer without head groups; give at least one, for example HeadGroup().")

    def __hash__(self) -> int:
        return hash(self.to_json())

    # -- JSON -----------------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` restores an equal plan."""
        data = dataclasses.asdict(self) | {"format": "bitsandheads-plan", "version": FORMAT_VERSION}
        return json.dumps(data, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CachePlan":
        """Inverse of `to_json`. Raises PlanError for a foreign or newer file."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"This is not a plan: it is not JSON ({error}).") from error
        if not isinstance(data, dict) or data.get("format") != "bitsandheads-plan":
            raise PlanError('This is not a plan: it has no "format": "bitsandheads-plan". Write plans with CachePlan.save.')
        if not isinstance(data.get("version"), int) or data["version"] > FORMAT_VERSION:
            raise PlanError(
                f"The plan has format version {data.get('version')!r}; this release reads up to {FORMAT_VERSION}. Update bitsandheads."
            )
        try:
            layers = {int(i): tuple(map(_group, groups)) for i, groups in data["layers"].items()}
            rest = {k: v for k, v in data.items() if k not in ("format", "version")}
            return cls(**(rest | {"groups": tuple(map(_group, data["groups"])), "layers": layers}))
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"The plan file is incomplete or has unknown fields: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(self.to_json() + "\n", "utf-8")
        part.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "CachePlan":
        """Read a plan file. Raises PlanError where it is none, OSError where it cannot be read."""
        try:
            text = Path(path).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not a plan: it is not text ({error}). Write plans with CachePlan.save.") from error
        return cls.from_json(text)

    # -- against a model --------------------------------------------------------------------------------------------------------

    def resolve(self, config: Any) -> "ResolvedPlan":
        """Fit the plan to a model.

        Args:
            config: a transformers configuration, or a list of LayerShape.
        Raises:
            PlanError: the heads do not partition a layer, a layer index is out of range, a strict plan is for other layers, or head_dim
                does not fit.
        """
        if isinstance(config, list):
            shapes = config
        else:
            from .seam import layer_shapes

            shapes = layer_shapes(config)
        unknown = sorted(i for i in self.layers if not 0 <= i < len(shapes))
        if unknown:
            raise PlanError(f"Plan {self.name!r} names layers {unknown}, but the model has layers 0..{len(shapes) - 1}.")
        compressed = [i for i, shape in enumerate(shapes) if shape.compressed]
        if self.strict and sorted(self.layers) != compressed:
            raise PlanError(
                f"Plan {self.name!r} is for a model with full attention in the layers {_ranges(sorted(self.layers))}, this model has it in "
                f"{_ranges(compressed)}. Use head scores of this model."
            )
        layers = [
            _check_partition(self.layers.get(i, self.groups), shape, i) if shape.compressed else None for i, shape in enumerate(shapes)
        ]
        return ResolvedPlan(self, tuple(shapes), tuple(layers))

    def bytes_for(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 2, generated: int = 0) -> int:
        """Bytes in use of a cache that holds `tokens` unpadded tokens for each of `batch` sequences.

        Args:
            config: a transformers configuration, or a list of LayerShape, here and below.
            itemsize: bytes of an element of the model's dtype. Layers that transformers' own classes keep are not counted.
            generated: how many of the tokens came one at a time after the prompt.
        """
        return self.resolve(config).bytes_for(tokens, batch, itemsize, generated)

    def bits_for(self, config: Any, tokens: int, itemsize: int = 2) -> float:
        """Bits per cached element at this length, everything included: 8 * bytes / (2 * heads * tokens * head_dim)."""
        return self.resolve(config).bits_for(tokens, itemsize)

    def sparsity(self, config: Any, tokens: int, itemsize: int = 2) -> Sparsity:
        """Share of windowed heads, and true share of bytes saved by a cache of `tokens` tokens; sink and window counted."""
        return self.resolve(config).sparsity(tokens, itemsize)

    def table(self, config: Any, tokens: int = 32768) -> str:
        """A readable table: for each kind of layer its head groups, bytes and bits at `tokens` tokens."""
        return self.resolve(config).table(tokens)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan fitted to a model: head groups with explicit heads for each compressed layer, None for the others."""

    plan: CachePlan
    shapes: tuple[LayerShape, ...]
    layers: tuple[tuple[HeadGroup, ...] | None, ...]

    def bytes_for(self, tokens: int, batch: int = 1, itemsize: int = 2, generated: int = 0) -> int:
        """See CachePlan.bytes_for."""
        return batch * sum(
            group_bytes(g, s, tokens, itemsize, generated) for s, groups in zip(self.shapes, self.layers, strict=True) for g in groups or ()
        )

    def capacity_bytes(self, capacity: int, batch: int = 1, itemsize: int = 2) -> int:
        """Bytes that a cache of fixed capacity takes once its prompt is packed: what the longest sequence needs, with the residual at its longest.

        An upper bound for plans with salient tokens, whose number depends on the prompt. While a sequence waits for its basis its tokens and
        the newest queries take more for a time (KVQuant.start_length).
        """
        return batch * sum(
            _fixed_bytes(g, s, capacity, itemsize) for s, groups in zip(self.shapes, self.layers, strict=True) for g in groups or ()
        )

    def _elements(self, tokens: int) -> int:
        return sum(2 * s.kv_heads * s.head_dim * tokens for s, g in zip(self.shapes, self.layers, strict=True) if g is not None)

    def bits_for(self, tokens: int, itemsize: int = 2) -> float:
        """See CachePlan.bits_for."""
        elements = self._elements(tokens)
        return 8 * self.bytes_for(tokens, 1, itemsize) / elements if elements else float("nan")

    def sparsity(self, tokens: int, itemsize: int = 2) -> Sparsity:
        """See CachePlan.sparsity. NaN where no layer is compressed."""
        groups = [g for layer in self.layers for g in layer or ()]
        heads, elements = sum(len(g.kv_heads or ()) for g in groups), self._elements(tokens)
        if not elements:
            return Sparsity(float("nan"), float("nan"))
        windowed = sum(len(g.kv_heads or ()) for g in groups if g.window is not None)
        return Sparsity(windowed / heads, 1 - self.bytes_for(tokens, 1, itemsize) / (elements * itemsize))

    def table(self, tokens: int = 32768) -> str:
        """See CachePlan.table."""
        rows = [("layers", "KV heads", "stored", f"MB at {tokens}", "bits")]
        kinds: dict[tuple[LayerShape, tuple[HeadGroup, ...] | None], list[int]] = {}
        for i, (shape, groups) in enumerate(zip(self.shapes, self.layers, strict=True)):
            kinds.setdefault((shape, groups), []).append(i)
        for (shape, groups), members in kinds.items():
            where = _ranges(members)
            for g in groups or ():
                heads = len(g.kv_heads or ())
                size = group_bytes(g, shape, tokens, 2)
                bits = 8 * size / (2 * heads * shape.head_dim * tokens)
                rows.append((where, _ranges(list(g.kv_heads or ())), describe(g), f"{size * len(members) / 1e6:.1f}", f"{bits:.2f}"))
            if groups is None:
                rows.append((where, f"0-{shape.kv_heads - 1}", "transformers' own layer", "-", "-"))
        rows.append(("all", "", self.plan.name, f"{self.bytes_for(tokens) / 1e6:.1f}", f"{self.bits_for(tokens):.2f}"))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def group_bytes(group: HeadGroup, shape: LayerShape, tokens: int, itemsize: int, generated: int = 0) -> int:
    """Bytes in use of one head group of one unpadded sequence of `tokens` tokens, the last `generated` of which came one at a time."""
    heads, head_dim = len(group.kv_heads or ()), shape.head_dim
    token = 2 * heads * head_dim * itemsize
    prompt = tokens - generated
    if group.window is not None:
        sink, keep = group.window.sink, group.window.recent + ROLLBACK
        of_prompt = max(prompt - sink, 0)
        tail = min(of_prompt, keep) + max(tokens - sink, 0) - of_prompt
        if tail >= keep + ROLLBACK:
            tail = keep + (tail - keep) % ROLLBACK
        return token * (min(tokens, sink) + tail)
    if group.quant is None:
        return token * tokens
    quant = group.quant
    tiles = quant.start_tiles(tokens)
    if not tiles:
        seen = min(tokens, RECENT_QUERIES) if quant.needs_queries else 0
        return token * tokens + seen * (heads * (shape.q_heads // shape.kv_heads) * head_dim * itemsize + 4)
    first_tiles = quant.start_tiles(prompt) or -(-quant.basis_tokens // quant.tile)  # later tokens find no salient ones
    salient = round(quant.salience.share * first_tiles) if quant.salience is not None else 0
    layout = TileLayout.of(quant, head_dim)
    packed = (tiles - salient) * layout.nbytes
    if salient and quant.salience is not None:
        better = dataclasses.replace(quant.values, classes=quant.salience.classes)
        packed += salient * TileLayout.of(quant, head_dim, better).nbytes
    basis = sum(_basis_bytes(s, head_dim) for s in (quant.keys, quant.values)) + 4 * quant.heavy
    return token * (tokens - tiles * quant.tile) + heads * (packed + basis)


def _fixed_bytes(group: HeadGroup, shape: LayerShape, capacity: int, itemsize: int) -> int:
    heads, head_dim = len(group.kv_heads or ()), shape.head_dim
    token = 2 * heads * head_dim * itemsize
    if group.window is not None:
        return token * min(group.window.sink + group.window.recent + 2 * ROLLBACK, max(capacity, group.window.sink + 1))
    if group.quant is None or capacity < group.quant.start_length:
        return group_bytes(group, shape, capacity, itemsize)
    quant, tiles = group.quant, group.quant.start_tiles(capacity)
    packed = tiles * TileLayout.of(quant, head_dim).nbytes
    if quant.salience is not None:
        better = dataclasses.replace(quant.values, classes=quant.salience.classes)
        packed += round(quant.salience.share * tiles) * TileLayout.of(quant, head_dim, better).nbytes
    basis = sum(_basis_bytes(s, head_dim) for s in (quant.keys, quant.values)) + 4 * quant.heavy
    return token * (quant.sink + quant.heavy + quant.residual + quant.tile) + heads * (packed + basis)


def _basis_bytes(spec: TensorQuant, head_dim: int) -> int:
    if spec.transform == "principal":
        forward = 2 * head_dim**2 if spec.query_weighted or spec.refit else 0
        return 2 * head_dim**2 + 4 * head_dim + forward + (4 * head_dim if spec.noise_correction else 0)
    return 0 if spec.order == "none" else head_dim


def describe(group: HeadGroup) -> str:
    """One line about a head group."""
    if group.window is not None:
        return f"window: sink {group.window.sink} + recent {group.window.recent}"
    if group.quant is None:
        return "whole"
    q = group.quant

    def half(spec: TensorQuant) -> str:
        classes = "/".join(str(c.bits) for c in spec.classes)
        shares = ":".join(f"{c.share:g}" for c in spec.classes)
        ranked = f" by {spec.order}" if spec.order != "none" else ""
        turned = f" {spec.transform}" if spec.transform != "none" else ""
        return f"{classes}{f' ({shares})' if len(spec.classes) > 1 else ''}{turned}{ranked} per {spec.per}"

    whole = f"+{q.heavy} by attention" if q.heavy else ""
    extra = f", {q.salience.share:g} salient by {q.salience.by}" if q.salience else ""
    return f"K {half(q.keys)}; V {half(q.values)}{extra}; G={q.group_size} sink={q.sink}{whole} residual={q.residual} {q.metadata}"


def _ranges(items: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    out: list[list[int]] = []
    for i in items:
        if out and out[-1][1] == i - 1:
            out[-1][1] = i
        else:
            out.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def _group(data: dict[str, Any]) -> HeadGroup:
    window = None if data["window"] is None else Window(**data["window"])
    heads = None if data["kv_heads"] is None else tuple(data["kv_heads"])
    quant = None if data["quant"] is None else _quant(data["quant"])
    return HeadGroup(**(data | {"kv_heads": heads, "window": window, "quant": quant}))


def _quant(data: dict[str, Any]) -> KVQuant:
    salience = data.pop("salience")
    if salience is not None:
        salience = Salience(**(salience | {"classes": tuple(AxisClass(**c) for c in salience["classes"])}))
    keys, values = (_tensor_quant(data.pop(k)) for k in ("keys", "values"))
    return KVQuant(keys, values, salience=salience, **data)


def _tensor_quant(data: dict[str, Any]) -> TensorQuant:
    classes = tuple(AxisClass(**c) for c in data.pop("classes"))
    return TensorQuant(classes, **data)
