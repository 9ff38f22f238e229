"""How long a prompt, or how many frames, fit into a GPU: from a model's configuration alone.

The formula, for a prompt of n tokens that the model reads in one pass, in bytes:

    weights       2 for each parameter (counted on torch's meta device, so exactly)
    cache(n)      CachePlan.bytes_for(n): what the plan says, whole tokens and bases included
    layer(n)      n * 2 * KV heads * head_dim * 2: keys and values of the layer that is being read, before they are packed
    text(n)       n * 2 * (2 hidden + max(2 hidden + 3 ffn, 2 hidden + 5 query + 4 key)): embeddings and visual features beside the
                  residual stream, and what one layer holds at its peak in its MLP or its attention (query = query heads * head_dim,
                  key = KV heads * head_dim; transformers' sdpa repeats the KV heads)
    vision(n)     the same for the vision tower, whose patches all go through it at once: n * patches for each token *
                  (4 * values of a patch + 2 * (2 hidden + max(3 ffn, 5 hidden))) of the vision configuration
    peak(n)       weights + max(cache(n) + layer(n) + text(n), vision(n))

One pass fits while peak(n) <= (1 - RESERVE) * memory. While tokens are generated only weights + cache(n) are needed; `held` is the
largest n for that, which a prompt given in pieces can reach. Both to within a few tiles, since cache(n) falls a little whenever a
tile is packed. RESERVE is for the CUDA context and what the allocator cannot use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import PlanError
from .plan import CachePlan
from .seam import text_config

RESERVE = 0.05
ITEM = 2  # bytes of a weight and of an activation
LONGEST = 1 << 30  # tokens; nothing longer is looked for


@dataclass(frozen=True)
class Capacity:
    """What fits.

    Attributes:
        weight_bytes: of the model.
        tokens, frames: of a prompt read in one pass; frames is None for a text model.
        held_tokens, held_frames: held while generating.
        cache_bytes, bits_per_element: of the cache with `tokens` tokens.
    """

    plan: str
    weight_bytes: int
    tokens: int
    frames: int | None
    held_tokens: int
    held_frames: int | None
    cache_bytes: int
    bits_per_element: float


def weights(config: Any) -> int:
    """Bytes of a model's parameters at 2 bytes each; nothing is allocated."""
    import transformers

    kind = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    return ITEM * sum(p.numel() for p in model.parameters())


def text_bytes(config: Any) -> int:
    """Activations of one token of the prompt at their peak: text(1) of the formula."""
    text = text_config(config)
    hidden, head_dim = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key = text.num_attention_heads * head_dim, (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim
    ffn = getattr(text, "intermediate_size", None) or 4 * hidden
    return ITEM * (2 * hidden + max(2 * hidden + 3 * ffn, 2 * hidden + 5 * query + 4 * key))


def _first(config: Any, *names: str, default: Any = None) -> Any:
    found = (getattr(config, n, None) for n in names)
    return next((x for x in found if x is not None), default)


def _side(value: Any) -> int:
    return value[0] if isinstance(value, list | tuple) else value


def patches_per_token(config: Any) -> int:
    """Patches that the vision tower reads for one token of the language model."""
    vision = config.vision_config
    merge = _first(vision, "spatial_merge_size")
    if merge is None:
        ratio = _first(config, "downsample_ratio")
        merge = round(1 / ratio) if ratio else _first(config, "scale_factor", default=2)  # LLaVA-OneVision pools 2 x 2
    return merge**2


def vision_bytes(config: Any) -> int:
    """Memory of the vision tower for one visual token: vision(1) of the formula."""
    vision = config.vision_config
    hidden, patch = _first(vision, "hidden_size", "embed_dim"), _side(_first(vision, "patch_size"))
    ffn = _first(vision, "intermediate_size", default=4 * hidden)
    values = 3 * patch**2 * _first(vision, "temporal_patch_size", default=1)
    return patches_per_token(config) * (4 * values + ITEM * (2 * hidden + max(3 * ffn, 5 * hidden)))


def tokens_per_frame(config: Any, height: int, width: int) -> float:
    """Tokens of one frame of a video of this size in the language model; half of a pair's where two frames share their tokens.

    Models that scale every frame to one size (LLaVA-OneVision, InternVL, SmolVLM) take that size whatever is given.

    Raises:
        PlanError: the model has no vision tower, or one whose tokens cannot be told from its configuration.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise PlanError(f"{config.model_type} reads no videos, so it has no frames. Leave --frame-size and --tokens-per-frame out.")
    patch = _side(_first(vision, "patch_size"))
    merge = _first(vision, "spatial_merge_size")
    if merge is not None:
        unit = patch * merge
        return max(1, round(height / unit)) * max(1, round(width / unit)) / _first(vision, "temporal_patch_size", default=1)
    size = _side(_first(vision, "image_size"))
    if size is None:
        raise PlanError(f"The configuration of {config.model_type} does not say how many tokens a frame takes. Give --tokens-per-frame.")
    side = size // patch
    return float((-(-side // round(patches_per_token(config) ** 0.5))) ** 2)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest n of at most LONGEST for which fits(n), a test that turns false once; 0 if there is none."""
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def capacity(config: Any, plan: CachePlan, memory: float, frame_tokens: float | None = None, weight_bytes: int | None = None) -> Capacity:
    """What fits into a GPU under a plan.

    Args:
        config: a transformers configuration. memory: bytes of the GPU.
        frame_tokens: see `tokens_per_frame`; None: a text model, or frames are not asked for.
        weight_bytes: see `weights`, where it is known already (another size for quantized weights).
    Raises:
        PlanError: the weights alone do not fit, or the plan does not fit the model.
    """
    resolved = plan.resolve(config)
    loaded = weights(config) if weight_bytes is None else weight_bytes
    room = (1 - RESERVE) * memory - loaded
    if room <= 0:
        raise PlanError(
            f"The weights take {loaded / 1e9:.1f} GB and {memory / 1e9:.1f} GB of memory hold {(1 - RESERVE) * memory / 1e9:.1f} GB "
            "beside the reserve. Give a larger --gpu-memory, or a smaller model."
        )
    layer = max(2 * s.kv_heads * s.head_dim * ITEM for s in resolved.shapes)
    text = text_bytes(config)
    vision = vision_bytes(config) if hasattr(config, "vision_config") and frame_tokens is not None else 0
    tokens = largest(lambda n: max(resolved.bytes_for(n) + n * (layer + text), n * vision) <= room)
    held = largest(lambda n: resolved.bytes_for(n) <= room)
    frames, held_frames = (None if frame_tokens is None else int(n / frame_tokens) for n in (tokens, held))
    return Capacity(plan.name, loaded, tokens, frames, held, held_frames, resolved.bytes_for(tokens), resolved.bits_for(max(tokens, 1)))


def compare(config: Any, plans: list[CachePlan], memory: float, frame_tokens: float | None = None) -> list[Capacity]:
    """`capacity` for each plan."""
    loaded = weights(config)
    return [capacity(config, plan, memory, frame_tokens, loaded) for plan in plans]


def frame_size(text: str) -> tuple[int, int]:
    """ "448x640" -> (448, 640). Raises PlanError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.strip().isdigit() and int(p) for p in parts):
        raise PlanError(f"The frame size is {text!r}; give height x width in pixels, for example 448x640.")
    return int(parts[0]), int(parts[1])


def table(found: list[Capacity], config: Any, memory: float, frame_tokens: float | None) -> str:
    """What fits, in a line for each plan; `found` comes from `compare`."""
    rows = [("plan", "tokens", "frames", "cache GB", "bits", "held tokens", "held frames")]
    for c in found:
        frames, held = ("-" if x is None else f"{x:,}" for x in (c.frames, c.held_frames))
        rows.append(
            (c.plan, f"{c.tokens:,}", frames, f"{c.cache_bytes / 1e9:.2f}", f"{c.bits_per_element:.2f}", f"{c.held_tokens:,}", held)
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
    each = "" if frame_tokens is None else f", {frame_tokens:g} tokens a frame"
    return "\n".join(
        [
            f"{config.model_type}: weights {found[0].weight_bytes / 1e9:.2f} GB of {memory / 1e9:g} GB, {RESERVE:.0%} in reserve{each}",
            *lines,
            "tokens, frames: a prompt read in one pass; held: while generating, for a prompt given in pieces. "
            f"The model's own limit is {getattr(text_config(config), 'max_position_embeddings', 0):,} positions.",
        ]
    )
