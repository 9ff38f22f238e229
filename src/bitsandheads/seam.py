"""The seam to transformers: the only file that knows its cache classes, attention registry and mask registry.

`enable(model)` registers an attention function "bitsandheads_<base>" together with the base's mask function, and switches the
model's text part to it. `CompressedCache` is a transformers Cache whose compressed layers hand the attention function a
`LayerHandle` in place of keys and values; every other cache and every other layer type runs as before. Longer than other files because no
other one may import transformers' internals.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from types import TracebackType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import AttentionNotEnabledError, CacheStateError, ModelMismatchError, PlanError, ShapeError
from .fixed import FixedCapacity, no_room
from .gates.attention import HeadGates
from .graphs import COLUMNS, CapturedSteps
from .layer import ChunkMask, CompressedLayer, read_mask
from .methods import get_plan
from .methods.vidkv import semantic_scores
from .plan import CachePlan, LayerShape, ResolvedPlan, Window
from .stores.base import Memory

PREFIX = "bitsandheads_"
GATED = "gated_bitsandheads"
PROBED = "probed_bitsandheads"
REFUSED = ("softcap", "s_aux", "position_bias")  # attention extras that the ops do not know; never dropped in silence


# -- configuration ------------------------------------------------------------------------------------------------------------


def text_config(config: Any) -> Any:
    """The configuration of the decoder's text part, of a model or of its configuration.

    Raises:
        PlanError: this is neither.
    """
    found = getattr(config, "config", config)
    if not hasattr(found, "get_text_config"):
        raise PlanError(
            f"{type(config).__name__} {str(config)[:80]!r} is no model or configuration of transformers; load one, for example with "
            "AutoConfig.from_pretrained."
        )
    return found.get_text_config(decoder=True)


def layer_shapes(config: Any) -> list[LayerShape]:
    """The shape of every layer; layers that are not plain full attention are marked as not compressed.

    Raises:
        PlanError: no model or configuration with attention layers.
    """
    text = text_config(config)
    q_heads = getattr(text, "num_attention_heads", None)
    if not q_heads or getattr(text, "num_kv_shared_layers", None):
        what = "layers that attend to the keys of other layers (num_kv_shared_layers)" if q_heads else "no attention heads"
        raise PlanError(f"A {text.model_type} model has {what}; its cache cannot be compressed. Use DynamicCache.")
    kv_heads = getattr(text, "num_key_value_heads", None) or q_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // q_heads
    layers = DynamicCache(config=text).layers
    return [LayerShape(q_heads, kv_heads, head_dim, type(layer) is DynamicLayer) for layer in layers]


def fingerprint(config: Any) -> dict[str, Any]:
    """What a saved cache must share with a model."""
    text = text_config(config)
    shapes = layer_shapes(text)
    return {
        "model_type": text.model_type,
        "layers": len(shapes),
        "q_heads": shapes[0].q_heads,
        "kv_heads": shapes[0].kv_heads,
        "head_dim": shapes[0].head_dim,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
    }


# -- attention ----------------------------------------------------------------------------------------------------------------


class MaskReader:
    """read_mask, once for all layers of a forward pass (they share the mask tensor; `first` is the layer that begins a pass)."""

    def __init__(self, first: int | None) -> None:
        self.first = first
        self.held = 0  # by the first layer when the pass began
        self.last: tuple[weakref.ref[Tensor], int, ChunkMask] | None = None

    @torch.compiler.disable
    def read(self, mask: Tensor | None, n: int) -> ChunkMask:
        """What `mask` says of the newest n tokens."""
        if mask is None:
            return read_mask(None, n)
        if self.last is None or self.last[0]() is not mask or self.last[1] != n:
            self.last = (weakref.ref(mask), n, read_mask(mask, n))
        return self.last[2]

    def forget(self) -> None:
        """Let go of the mask."""
        self.last = None


class LayerHandle:
    """Stands for keys and values of a compressed layer. Only bitsandheads' attention function can read it."""

    def __init__(self, masks: "MaskReader", layer: CompressedLayer, token: tuple[Tensor, Tensor] | None = None) -> None:
        """token: keys and values of the one new token of a step of fixed capacity; otherwise the chunk is staged in the layer."""
        self.masks, self.layer, self.token = masks, layer, token

    def _refuse(self) -> NoReturn:
        self.layer.staged = None  # so that the cache can be used once the attention is switched on
        raise AttentionNotEnabledError(
            "A compressed cache met an attention function that cannot read it. Call bitsandheads.enable(model) once before "
            "model.generate(..., past_key_values=cache), or use `with bitsandheads.enabled(model):`."
        )

    def __getattr__(self, name: str) -> Any:
        self._refuse()

    def __getitem__(self, index: Any) -> Any:
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, cls))._refuse()


def _cast(x: Tensor) -> Tensor:
    """Under autocast in its dtype, as attention casts it: there RoPE leaves queries and keys in another dtype than values."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _attention(base_name: str) -> Any:
    def forward(
        module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        base = ALL_ATTENTION_FUNCTIONS.get_interface(base_name, _eager_of(module))
        if not isinstance(key, LayerHandle):
            return base(module, query, key, value, attention_mask, **kwargs)
        extra = [name for name in REFUSED if kwargs.get(name) is not None]
        extra += ["output_attentions"] * bool(base_name == "eager" and kwargs.get("output_attentions"))  # others never return them
        if extra:
            key.layer.staged = None
            raise PlanError(f"This model's attention uses {', '.join(extra)}, which compressed layers do not support. Use DynamicCache.")
        scale, query = kwargs.get("scaling") or query.shape[-1] ** -0.5, _cast(query)
        if key.token is not None and key.layer.step is not None:
            return key.layer.step(query, *key.token, scale), None
        chunk = key.masks.read(attention_mask, query.shape[2])

        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return base(module, q, k, v, attention_mask, **kwargs)[0]

        return key.layer.attend(query, chunk, scale, own), None

    return forward


def _mask(base: Callable[..., Any]) -> Callable[..., Any]:
    """The base's mask function, but no mask for a step of fixed capacity, which holds real tokens only.

    Such a step is known by its key length, minus the capacity (CompressedCacheLayer.get_mask_sizes). `generate` asks for the mask before each
    compiled step: the last moment at which the host can look.
    """

    def mask(*args: Any, **kwargs: Any) -> Any:
        capacity = -kwargs.get("kv_length", 0)
        if capacity <= 0:
            return base(*args, **kwargs)
        if not torch.compiler.is_compiling():
            _check_step(capacity, kwargs.get("attention_mask"))
        return None

    return mask


def _check_step(capacity: int, mask: Tensor | None, looked_at: bool = False) -> None:
    """Raise CacheStateError where the padding mask [B, all tokens] of a step of fixed capacity asks for what it cannot do.

    looked_at: its newest column is known to be ones.
    """
    if mask is None:
        return
    if mask.shape[1] > capacity:
        raise no_room(capacity, mask.shape[1])
    if mask.shape[0] > 1 and not looked_at and not bool(mask[:, -1].all()):
        raise CacheStateError(
            "A single new token is padding for some sequences; a cache of fixed capacity cannot leave it out. Give such a turn as two "
            "tokens or more (left-padded), or make the cache without capacity."
        )


def _step_masks(model: Any, others: Callable[..., Any], **kwargs: Any) -> Any:
    """`create_masks_for_generate`, which `generate` calls before each compiled step: a step of fixed capacity needs no mask.

    The padding mask is looked at in the first step of a call of `generate`; its loop then adds columns of ones. To look again would cost a transfer.
    Newer transformers (5.23) gives no mask where nothing is padded; then the clock tells whether there is room.
    """
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if isinstance(cache, CompressedCache) and cache.fixed is not None and (mask is None or mask.ndim == 2):
        fixed, steps = cache.fixed, _CALLS.get(id(model))
        counted = None if steps is None else steps.counted(fixed)
        fixed.before(kwargs["inputs_embeds"].shape[1], counted)
        if fixed.running:
            _check_step(fixed.capacity, mask, looked_at=steps is not None and not kwargs.get("is_first_iteration", True))
            if mask is None:
                fixed.check_room((int(fixed.clock) if counted is None else counted) + 1)
            return None
    return others(**kwargs)


def _step_inputs(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`prepare_inputs_for_generation`, which `generate` calls before each step: steps that are captured know where their inputs are."""
    steps = _CALLS.get(id(model))
    if steps is None or len(args) != 1 or kwargs.get("next_sequence_length") != 1 or kwargs.get("is_first_iteration"):
        return PREPARE(model, *args, **kwargs)
    inputs = steps.refill(args[0], kwargs)
    if inputs is None:
        inputs = PREPARE(model, *args, **kwargs)
        if getattr(inputs.get("past_key_values"), "running", False):  # transformers 5.17 leaves some whole: another shape in each step
            whole = {name: x for name, x in inputs.items() if name in COLUMNS and isinstance(x, Tensor) and x.shape[-1] > 1}
            inputs |= {name: x[..., -1:].clone() for name, x in whole.items()}
        steps.prepared = set(kwargs), set(inputs)
    return inputs


PREPARE = GenerationMixin.prepare_inputs_for_generation
_CALLS: weakref.WeakValueDictionary[int, CapturedSteps] = weakref.WeakValueDictionary()  # calls of `generate` that run, by the model's id


def _compiled_call(model: Any, compile_config: Any = None) -> Any:
    """`model.get_compiled_call`, which `generate` calls once: steps of fixed capacity are captured here, unless torch.compile is to do that."""
    plain = type(model).get_compiled_call(model, compile_config)
    config = compile_config or model.generation_config.compile_config
    how = {} if config is None else config.to_dict()
    if not torch.cuda.is_available() or how.get("mode") in ("reduce-overhead", "max-autotune"):
        return plain
    known = model.__dict__.setdefault("bitsandheads_steps", [])
    step = next((step for owner, config, step in known if owner == id(model) and config == how), None)
    if step is None:  # not compiled yet, or otherwise, or for the model that this one is a copy of
        step = torch.compile(model.__call__, **how)
        known.append((id(model), how, step))
    steps = _CALLS[id(model)] = CapturedSteps(step, plain)
    return steps


def _generators(model: Any) -> list[Any]:
    """The modules whose `generate` may run: the model, or the one that a wrapper (of adapters, say) hands the call to."""
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def _watch_generate(model: Any) -> None:
    """Let `generate` take the short way for steps of fixed capacity."""
    model.__dict__["get_compiled_call"] = partial(_compiled_call, model)
    others = getattr(type(model), "create_masks_for_generate", create_masks_for_generate)
    model.__dict__["create_masks_for_generate"] = partial(_step_masks, model, others)
    if type(model).prepare_inputs_for_generation is PREPARE:  # what a class does beside it is not known here
        model.__dict__["prepare_inputs_for_generation"] = update_wrapper(partial(_step_inputs, model), PREPARE)  # with its signature


def _eager_of(module: torch.nn.Module) -> Any:
    """transformers keeps eager attention beside each model class, not in the registry."""
    import sys

    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _text_model(model: Any) -> Any:
    """The submodule whose configuration is the text part's: the model itself, or its language model."""
    text = text_config(model)
    if model.config is text:
        return model
    for module in model.modules():
        if getattr(module, "config", None) is text and hasattr(module, "set_attn_implementation"):
            return module
    raise ModelMismatchError(
        f"No submodule of {type(model).__name__} carries its text configuration, so its attention cannot be switched. Pass the language model."
    )


def _watch_embeddings(model: Any, part: Any) -> None:
    """Let caches whose plan asks for it score a prompt's tokens by the embeddings that enter the text part.

    A token is visual where its embedding is not the one that the model's own table has for its id.
    """

    hooks = [
        model.register_forward_pre_hook(_note_prompt, with_kwargs=True),
        part.register_forward_pre_hook(partial(_score_prompt, model), with_kwargs=True),
    ]  # no closures: a copy of the model has hooks of its own, and a pickled one too
    part.__dict__["bitsandheads_hooks"] = hooks


def _scores_prompt(kwargs: Any) -> bool:
    cache = kwargs.get("past_key_values")
    return isinstance(cache, CompressedCache) and not cache.running and cache.scores_embeddings and not cache.get_seq_length()


def _note_prompt(module: Any, args: Any, kwargs: Any) -> None:
    if _scores_prompt(kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        kwargs["past_key_values"].prompt = ids, kwargs.get("attention_mask")


def _score_prompt(model: Any, module: Any, args: Any, kwargs: Any) -> None:
    if not _scores_prompt(kwargs):
        return
    ids, mask = kwargs["past_key_values"].prompt
    if ids is None:
        return  # the layer raises a named error
    own = model.get_input_embeddings()(ids)
    embeddings = kwargs.get("inputs_embeds")
    embeddings = own if embeddings is None else embeddings
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.ndim != 2 else mask.bool()
    kwargs["past_key_values"].set_token_scores(semantic_scores(embeddings, (embeddings != own).any(-1), real))


def enable(model: Any) -> None:
    """Let a transformers model read compressed caches. Other caches work as before; calling it again does nothing.

    Args:
        model: a causal or vision-language model of transformers, or a module around one; only the text part is switched.
    Raises:
        PlanError: it uses flex attention, or attention that is not from transformers' registry.
        ModelMismatchError: none of its modules has the text part's configuration.
    """
    part = _text_model(model)
    base = part.config._attn_implementation.removeprefix(PREFIX)
    if base == "flex_attention":
        raise PlanError('The model uses "flex_attention", whose masks bitsandheads cannot read. Load it with attn_implementation="sdpa".')
    name = PREFIX + base
    AttentionInterface.register(name, _attention(base))
    AttentionMaskInterface.register(name, _mask(ALL_MASK_ATTENTION_FUNCTIONS[base]))
    if part.config._attn_implementation == name:  # it is on, perhaps since another process from which it was unpickled
        return
    part.set_attn_implementation(name)
    if part.config._attn_implementation != name:
        raise PlanError(
            f"{type(part).__name__} does not take its attention from transformers' registry, so it cannot read compressed caches. "
            "Use DynamicCache with this model, or a model class with AttentionInterface support."
        )
    _watch_embeddings(model, part)
    for one in _generators(model):
        _watch_generate(one)


def disable(model: Any) -> None:
    """Give the model its former attention implementation back."""
    part = _text_model(model)
    name = part.config._attn_implementation
    if name.startswith(PREFIX):
        part.set_attn_implementation(name.removeprefix(PREFIX))
        for hook in part.__dict__.pop("bitsandheads_hooks", ()):
            hook.remove()
        for one in _generators(model):
            for own in ("get_compiled_call", "create_masks_for_generate", "prepare_inputs_for_generation"):
                one.__dict__.pop(own, None)


class enabled:
    """Context manager: `enable` on entry; on exit the former attention implementation is restored."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.was_on = False

    def __enter__(self) -> Any:
        self.was_on = _text_model(self.model).config._attn_implementation.startswith(PREFIX)
        enable(self.model)
        return self.model

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if not self.was_on:
            disable(self.model)


# -- gates --------------------------------------------------------------------------------------------------------------------


def _gated_attention(
    module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    extra = [name for name in (*REFUSED, "sliding_window") if kwargs.get(name) is not None] + ["dropout"] * bool(kwargs.get("dropout"))
    if extra:
        raise PlanError(f"This model's attention uses {', '.join(extra)}, which gated attention does not support.")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    gates: HeadGates = module.__dict__["head_gates"]
    out = gates(cast(int, module.layer_idx), query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def enable_gates(model: Any, window: Window) -> HeadGates:
    """Put a gate on every KV head of a transformers model, freeze all other parameters, and return the gates.

    Every attention of the model is gated from then on: training, prefill and decoding, with any of transformers' caches.

    Args:
        model: a causal language model of transformers with plain full attention in every layer.
        window: the local part of the gated attention.
    Raises:
        ModelMismatchError: a layer is no plain full attention, or the model has gates.
    """
    part = _text_model(model)
    shapes = layer_shapes(model)
    other = [i for i, shape in enumerate(shapes) if not shape.compressed]
    if other or part.config._attn_implementation == GATED:
        what = f"the layers {other} are no plain full attention" if other else "it has gates already; call disable_gates(model) first"
        raise ModelMismatchError(f"Gates cannot be put on this {type(model).__name__}: {what}.")
    gates = HeadGates(shapes, window).to(next(part.parameters()).device)
    gates.former = part.config._attn_implementation
    AttentionInterface.register(GATED, _gated_attention)
    AttentionMaskInterface.register(GATED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    part.set_attn_implementation(GATED)
    model.requires_grad_(False)
    for module in part.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["head_gates"] = gates  # no submodule: the parameter has one name
    part.add_module("head_gates", gates)
    return gates


def disable_gates(model: Any) -> None:
    """Take the gates off again; the model has its former attention implementation, its parameters stay frozen."""
    part = _text_model(model)
    if part.config._attn_implementation != GATED:
        return
    part.set_attn_implementation(part.head_gates.former)
    del part.head_gates
    for module in part.modules():
        module.__dict__.pop("head_gates", None)


# -- probes -------------------------------------------------------------------------------------------------------------------


@dataclass
class AttentionCall:
    """One attention of a probed model: what it is given, and `own()`, the model's own result [B, Q, H_q, D].

    layer: index in the model. q: [B, H_q, Q, D]; k, v: [B, H_kv, K, D], after RoPE. mask: bool [B, 1, Q, K], True = may be seen.
    scale: factor of the scores.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    scale: float
    own: Callable[[], Tensor]


def _probed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    def own() -> Tensor:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)[0]

    if kwargs.get("sliding_window") is not None:
        return own(), None
    mask, sizes = attention_mask, (query.shape[2], key.shape[2])
    if mask is None:
        mask = torch.ones(1, 1, *sizes, dtype=torch.bool, device=query.device).tril(sizes[1] - sizes[0])
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    mask = mask.expand(query.shape[0], -1, -1, -1)
    return module.__dict__["attention_probe"](AttentionCall(cast(int, module.layer_idx), query, key, value, mask, scale, own)), None


class probed:
    """Context manager: every full attention of a model goes through `probe`; on exit the former attention is restored.

    Args:
        model: a transformers model; its attention is computed by PyTorch's sdpa inside.
        probe: called with an AttentionCall, returns the attention's output [B, Q, H_q, D], usually `call.own()`.
    """

    def __init__(self, model: Any, probe: Callable[[AttentionCall], Tensor]) -> None:
        self.part, self.probe = _text_model(model), probe
        self.former = self.part.config._attn_implementation

    def _attach(self, probe: Callable[[AttentionCall], Tensor] | None) -> None:
        for module in self.part.modules():
            if hasattr(module, "layer_idx"):
                module.__dict__["attention_probe"] = probe

    def __enter__(self) -> None:
        AttentionInterface.register(PROBED, _probed_attention)
        AttentionMaskInterface.register(PROBED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self._attach(self.probe)
        self.part.set_attn_implementation(PROBED)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.part.set_attn_implementation(self.former)
        self._attach(None)


# -- cache --------------------------------------------------------------------------------------------------------------------


class CompressedCacheLayer(CacheLayerMixin):
    """A CompressedLayer in the clothes of a transformers cache layer."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, masks: "MaskReader", layer: CompressedLayer, fixed: FixedCapacity | None = None) -> None:
        super().__init__()
        self.masks, self.layer, self.fixed = masks, layer, fixed
        covered = all(g.quant is None or g.quant.keys.per == "channel" for g in layer.groups)  # by the kernels
        self.is_compileable = fixed is not None and covered  # whether `generate` may compile the decode step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores are made when the first tokens arrive."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Stage a chunk of keys and values [B, H, n, D]; returns a LayerHandle for each.

        Raises:
            AttentionNotEnabledError: the chunk before this one was never attended to.
            CacheStateError: there is no room for it, or an earlier pass was cut short.
            ModelMismatchError, ShapeError: heads, head_dim or batch are others.
        """
        first, fixed = self.layer.index == self.masks.first, self.fixed
        key_states, value_states = _cast(key_states), _cast(value_states)
        if fixed is not None and first and not torch.compiler.is_compiling():
            fixed.before(key_states.shape[2])
            fixed.check_room(int(self.get_seq_length()) + key_states.shape[2])
        if fixed is not None and fixed.running:
            # a compiled step must not depend on what the layer holds; its operator looks at the batch
            if not torch.compiler.is_compiling():
                self.layer.check(key_states, value_states)
            if first:
                fixed.clock.add_(1)
            handle = LayerHandle(self.masks, self.layer, (key_states, value_states))
            return handle, handle
        self.is_initialized = True
        self.layer.stage(key_states, value_states)
        if first:
            self.masks.held = self.layer.stored_tokens
            self.masks.forget()  # the caller may have changed the same mask tensor in place since the last pass
        elif self.layer.stored_tokens != self.masks.held:
            self.layer.staged = None
            raise CacheStateError(
                f"Layer {self.layer.index} holds {self.layer.stored_tokens} tokens and the first one held {self.masks.held}: an earlier pass of the model "
                "was cut short. reset() the cache before using it again."
            )
        handle = LayerHandle(self.masks, self.layer)
        return handle, handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical tokens, and offset 0; for a step of fixed capacity minus the capacity, which tells our mask function that no mask is needed.

        A compiled step is to serve every capacity: it gets minus one.
        """
        compiling = torch.compiler.is_compiling()
        if self.fixed is not None and not compiling:
            self.fixed.before(query_length)
        if self.fixed is not None and self.fixed.running:
            return -1 if compiling else -self.fixed.capacity, 0
        return self.layer.tokens + query_length, 0

    def get_seq_length(self) -> Any:
        """Logical tokens, padding included; a tensor on the device while steps of fixed capacity run."""
        return self.fixed.clock if self.fixed is not None and self.fixed.running else self.layer.tokens

    def _settled(self) -> CompressedLayer:
        if self.fixed is not None:
            self.fixed.leave()
        return self.layer

    def get_max_length(self) -> int:
        """The capacity, or -1: no maximum."""
        return -1 if self.fixed is None else self.fixed.capacity

    def reset(self) -> None:
        """Forget everything."""
        self.layer.reset()
        if self.fixed is not None:
            self.fixed.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i becomes sequence beam_idx[i]."""
        self._settled().select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences (indices, or a bool mask)."""
        indices = torch.as_tensor(indices)
        self._settled().select(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._settled().select(torch.arange(self.layer.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -tokens_to_remove tokens; a positive number is the length to keep (transformers before 5.18)."""
        layer = self._settled()
        layer.crop(-tokens_to_remove if tokens_to_remove <= 0 else layer.tokens - tokens_to_remove)

    def offload(self) -> None:
        """Refused (CacheStateError): a compressed layer stays where it is."""
        raise CacheStateError("Compressed layers cannot be offloaded; their memory is small already. Make the cache without offloading.")

    @property
    def batch_size(self) -> int:
        """Number of sequences, 0 before the first tokens."""
        return self.layer.batch


class CompressedCache(Cache):
    """A transformers cache that stores keys and values as a plan says.

        bitsandheads.enable(model)
        cache = bitsandheads.CompressedCache("balanced", model)
        model.generate(**inputs, past_key_values=cache)

    Args:
        plan: a preset's name, a plan file's path, or a CachePlan.
        model: the model or its configuration.
        backend: "auto", "reference", "triton" or "cuda".
        dtype: of tokens that are kept whole (sink, residual, windows, whole heads); None: the model's.
        capacity: tokens of each sequence, padding included, prompt and generated ones together; None: it grows as needed. With a capacity the
            memory is taken once, after the prompt, and decode steps are compiled by `generate` (CUDA graphs), as with transformers' StaticCache.
            Prompt lookup looks further ahead than the answer is long: give prompt_lookup_num_tokens more.

    Attention masks may hide padding and each query's future. Stored tokens that a later mask hides (a changed history, branches of a tree) are
    seen all the same, except by a growing cache of whole heads on a CPU.

    Raises:
        PlanError: an unknown preset, a plan that does not fit the model, or a capacity for a model with layers of another kind.
    """

    def __init__(
        self, plan: "str | CachePlan", model: Any, backend: str = "auto", dtype: torch.dtype | None = None, capacity: int | None = None
    ) -> None:
        self.config = text_config(model)
        self.resolved: ResolvedPlan = get_plan(plan, self.config).resolve(self.config)
        self.backend, self.dtype = backend, dtype
        self.prompt: tuple[Tensor | None, Tensor | None] = None, None  # ids and mask of the chunk whose embeddings are scored
        own = DynamicCache(config=self.config).layers
        compressed = [i for i, groups in enumerate(self.resolved.layers) if groups is not None]
        self._masks = MaskReader(
            min(compressed, default=None)
        )  # the layers hold it and not the cache: a cycle would keep the memory after `del cache`
        parts = {
            i: CompressedLayer(i, groups, shape, backend, dtype, real_only=capacity is not None)
            for i, (groups, shape) in enumerate(zip(self.resolved.layers, self.resolved.shapes, strict=True))
            if groups is not None
        }
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise PlanError(
                f"dtype={dtype!r} is not possible; give a dtype of floating-point numbers, for example torch.bfloat16, or None."
            )
        counted = capacity is None or (isinstance(capacity, int) and capacity >= 1)
        if capacity is not None and (not counted or len(parts) < len(own)):
            others = [i for i in range(len(own)) if i not in parts]
            why = (
                f"the layers {others} are no full attention that the plan governs"
                if others
                else "a whole number of at least 1 token is needed"
            )
            raise PlanError(f"capacity={capacity!r} is not possible: {why}. Use capacity=None.")
        self.fixed = None if capacity is None else FixedCapacity(capacity, list(parts.values()))
        layers = [CompressedCacheLayer(self._masks, parts[i], self.fixed) if i in parts else keep for i, keep in enumerate(own)]
        super().__init__(layers=layers)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: nothing that only the device knows, and no mask of a pass that is over."""
        self.compressed_layers()
        self._masks.forget()
        return self.__dict__.copy()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See CompressedCacheLayer.update."""
        if layer_idx >= len(self.layers):
            raise ModelMismatchError(
                f"The model asks for layer {layer_idx}; this cache was made for {len(self.layers)} layers. Make the cache from the configuration "
                "of the model that it is used with."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def plan(self) -> CachePlan:
        """The plan."""
        return self.resolved.plan

    def __repr__(self) -> str:
        return f"CompressedCache(plan={self.plan.name!r}, tokens={int(self.get_seq_length())}, bytes={self.memory_bytes()})"

    @property
    def running(self) -> bool:
        """Whether steps of fixed capacity run, whose counts only the device knows."""
        return self.fixed is not None and self.fixed.running

    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that the plan governs. Steps of fixed capacity are interrupted: the host takes the counts back."""
        if self.fixed is not None:
            self.fixed.leave()
        return [layer.layer for layer in self.layers if isinstance(layer, CompressedCacheLayer)]

    @property
    def scores_embeddings(self) -> bool:
        """Whether the plan protects tokens by their embeddings (Salience.by="embedding")."""
        return any(layer.scored_by == "embedding" for layer in self.compressed_layers())

    def set_token_scores(self, scores: Tensor) -> None:
        """Give the salience of the next prompt's tokens (Salience.by="given"); higher is kept better.

        Args:
            scores: float [batch, tokens of the prompt], padding included (its scores are ignored).
        Raises:
            ShapeError: they have not two dimensions. (Other numbers of tokens are an error when the prompt comes.)
        """
        if scores.ndim != 2:
            raise ShapeError(f"Token scores have shape {list(scores.shape)}; give [batch, tokens of the prompt].")
        for layer in self.compressed_layers():
            layer.token_scores = scores

    def reset(self) -> None:
        """Forget everything; the cache can be used again, with another batch too."""
        own = DynamicCache(config=self.config).layers  # a used layer of another class may keep its old batch size
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CompressedCacheLayer):
                layer.reset()
            else:
                self.layers[i] = own[i]
        self._masks.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -tokens_to_remove tokens; a positive number is the length to keep (transformers before 5.18).

        Raises:
            CacheStateError: a head no longer holds what would then be its newest tokens; nothing is changed in any layer.
            RuntimeError: from transformers, a sliding-window layer was not told to keep what it needs for that; nothing is changed either.
        """
        compressed = self.compressed_layers()
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.16 hands over a tensor
        if tokens_to_remove > 0:
            tokens_to_remove = -max(self.get_seq_length() - tokens_to_remove, 0)
        for layer in compressed:
            layer.check_crop(-tokens_to_remove)
        for other in sorted(self.layers, key=lambda layer: isinstance(layer, CompressedCacheLayer)):  # first those that may refuse yet
            cast(Any, other).crop(tokens_to_remove)

    def memory(self) -> Memory:
        """Bytes by part over all compressed layers, in use and allocated."""
        out = Memory()
        for layer in self.compressed_layers():
            out.merge(layer.memory())
        return out

    def memory_bytes(self, allocated: bool = False, without: tuple[str, ...] = ()) -> int:
        """Bytes in use (or allocated) of all compressed layers, without the named parts."""
        memory = self.memory()
        parts = memory.allocated if allocated else memory.in_use
        return sum(n for part, n in parts.items() if part not in without)

    def bits_per_element(self, allocated: bool = False, residual: bool = True, basis: bool = True) -> float:
        """8 * bytes / (2 * KV heads * real tokens * head_dim), counted from the tensors.

        Args:
            allocated: count spare capacity too.
            residual: count the whole-precision residual of quantized heads; False: neither its bytes nor its tokens.
            basis: count rotations, means and ranks.
        """
        memory = self.memory()
        parts = dict(memory.allocated if allocated else memory.in_use)
        elements = 0
        for layer in self.compressed_layers():
            elements += sum(layer.real_tokens()) * 2 * layer.shape.kv_heads * layer.shape.head_dim
        if not residual:
            elements -= sum(layer.residual_tokens() * 2 * layer.shape.head_dim for layer in self.compressed_layers())
            parts.pop("residual", None)
        if not basis:
            parts.pop("basis", None)
        return 8 * sum(parts.values()) / elements if elements else float("nan")


# -- layers that transformers' own classes keep, in cache files ------------------------------------------------------------------


def foreign_state(layer: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What must be saved of a sliding-window layer; CacheStateError for layers with recurrent state."""
    if not isinstance(layer, DynamicLayer):
        raise CacheStateError(f"Layer {index} is a {type(layer).__name__}, whose recurrent state cannot be saved.")
    if layer.keys is not None and layer.values is not None:
        tensors[f"{index}.keys"], tensors[f"{index}.values"] = layer.keys, layer.values
    return {"initialized": layer.is_initialized, "cumulative_length": getattr(layer, "cumulative_length", None)}


def restore_foreign(layer: Any, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Inverse of `foreign_state`."""
    if not state["initialized"]:
        return
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    if state["cumulative_length"] is not None:
        layer.cumulative_length = state["cumulative_length"]
