"""A cache in one safetensors file: a compressed prefix prepared once and used by many."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import BitsAndHeadsError, CacheStateError, FileFormatError, ModelMismatchError
from .layer import CompressedLayer, Segment
from .plan import CachePlan
from .seam import CompressedCache, CompressedCacheLayer, fingerprint, foreign_state, restore_foreign
from .stores.tail import check_tensor
from .stores.whole import WholeStore

FORMAT = "bitsandheads-cache"
VERSION = 2  # 1: trits lay in another order


def save_cache(cache: CompressedCache, path: str | Path) -> None:
    """Write a cache, whole or not at all; missing folders are made.

    Raises:
        CacheStateError: the cache is empty, is in the middle of a forward pass, or has layers with recurrent state.
    """
    if not cache.get_seq_length() or not all(layer.stores for layer in cache.compressed_layers()):
        raise CacheStateError("The cache is empty; run a prompt through the model before saving it.")
    tensors: dict[str, Tensor] = {}
    states: list[dict[str, Any]] = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedCacheLayer):
            states.append(_layer_state(layer.layer, i, tensors))
        else:
            states.append(foreign_state(layer, i, tensors))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "plan": cache.plan.to_json(),
        "model": json.dumps(fingerprint(cache.config)),
        "layers": json.dumps(states),
        "dtype": "" if cache.dtype is None else str(cache.dtype).removeprefix("torch."),
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        save_file(_apart(tensors), part, metadata=header)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them (layers share their padding and token scores)."""
    out, seen = {}, set()
    for name, t in tensors.items():
        t = t.detach().contiguous()
        where = t.untyped_storage().data_ptr()
        out[name] = t.clone() if where in seen else t
        seen.add(where)
    return out


def load_cache(path: str | Path, model: Any, backend: str = "auto", device: str | torch.device | None = None) -> CompressedCache:
    """Read a cache that `save_cache` wrote.

    Args:
        model: the model, or its configuration, that the cache was made with.
        device: where its tensors go; None: the model's device, or the CPU for a configuration.
    Raises:
        FileFormatError: a damaged, foreign or newer file.
        ModelMismatchError: the cache was made with another model.
    """
    if device is None:
        device = getattr(model, "device", "cpu")
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise FileFormatError(f"{path} is a safetensors file, but not a cache of bitsandheads. Write caches with save_cache.")
            if header.get("version") != str(VERSION):
                raise FileFormatError(
                    f"{path} has cache version {header.get('version')!r}; this release reads version {VERSION}. Update bitsandheads if the file is newer; "
                    "write it again with save_cache if it is older."
                )
            made_for, given = json.loads(header["model"]), fingerprint(model)
            if made_for != given:
                raise ModelMismatchError(f"{path} was made with {made_for}; this model is {given}. Use the model it was made with.")
            dtype = getattr(torch, header["dtype"]) if header["dtype"] else None
            cache = CompressedCache(CachePlan.from_json(header["plan"]), model, backend, dtype)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for i, (layer, state) in enumerate(zip(cache.layers, json.loads(header["layers"]), strict=True)):
            mine = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{i}.")}
            if isinstance(layer, CompressedCacheLayer):
                layer.is_initialized = True
                _restore_layer(layer.layer, state, mine)
            else:
                restore_foreign(layer, state, mine)
    except (BitsAndHeadsError, FileNotFoundError):
        raise
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} is not a readable cache file: {error}. It may be cut off; prepare it again.") from error
    return cache


def _layer_state(layer: CompressedLayer, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if layer.staged is not None:
        raise CacheStateError("The cache is in the middle of a forward pass; save it between two calls of the model.")
    stores = []
    for s, store in enumerate(layer.stores):
        tensors.update({f"{index}.{s}.{name}": t for name, t in store.tensors().items()})
        stores.append(store.state())
    tensors.update({f"{index}.scores.{b}": s for b, s in enumerate(layer.scores or ())})
    segments = []
    for j, segment in enumerate(layer.segments):
        segments.append([segment.tokens, segment.valid is not None])
        if segment.valid is not None:
            tensors[f"{index}.valid.{j}"] = segment.valid
    return {"stores": stores, "segments": segments}


def _restore_layer(layer: CompressedLayer, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    first = tensors["0.tail_k"]
    shape = (first.shape[0], layer.shape.kv_heads, 0, layer.shape.head_dim)
    empty = torch.zeros(shape, dtype=first.dtype, device=first.device)
    layer.make_stores(empty, empty)
    for s, (store, counts) in enumerate(zip(layer.stores, state["stores"], strict=True)):
        mine = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{s}.")}
        store.restore(mine, counts)
    layer.scores = [tensors[f"scores.{b}"] for b in range(layer.batch)] if "scores.0" in tensors else None
    layer.segments = [
        Segment(tokens, tensors[f"valid.{j}"].cpu() if padded else None) for j, (tokens, padded) in enumerate(state["segments"])
    ]
    for segment in layer.segments:
        if segment.valid is not None:
            check_tensor("valid", segment.valid, (layer.batch, segment.tokens), torch.bool)
    real, logical = layer.real_tokens(), [layer.tokens] * layer.batch
    whole = all(isinstance(store, WholeStore) for store in layer.stores)
    for store in layer.stores:
        if isinstance(store, WholeStore) and real != logical:  # with a capacity, or on a GPU, no padding was stored
            store.keep_padding = whole and store.appended() == logical
        expected = logical if isinstance(store, WholeStore) and store.keep_padding else real
        if store.appended() != expected:
            raise ValueError(f"KV heads {store.kv_heads} hold {store.appended()} tokens of {expected}")
