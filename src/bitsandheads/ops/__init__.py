"""The ops, dispatched by backend: "reference" (plain PyTorch, everywhere), "triton", "cuda", or "auto".

`decode_attention` is also the custom operator `torch.ops.bitsandheads.decode_attention` with a fake implementation: the tensors of
the head sets in one list, and the number of their static description (layouts, heads, windows), see `flatten_sets`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from . import reference
from .append import append
from .backends import explain_backends, mark_failed, resolve_backend, say_once, why_not
from .heads import HeadSet
from .pack import pack

__all__ = ["HeadSet", "append", "decode_attention", "explain_backends", "flatten_sets", "pack", "resolve_backend"]

_NO_TENSORS = ("kv_heads", "layout", "window", "extra", "known")
_DESCRIPTIONS: list[tuple[Any, ...]] = []
_NUMBERS: dict[tuple[Any, ...], int] = {}


def _describe(s: HeadSet, tensors: list[Tensor]) -> tuple[Any, ...]:
    names: list[tuple[str, str]] = []
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if field.name in _NO_TENSORS or value is None:
            continue
        for name, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            names.append((field.name, name))
            tensors.append(tensor)
    return s.kv_heads, s.layout, s.window, tuple(names), tuple(_describe(part, tensors) for part in s.extra)


def _rebuild(description: tuple[Any, ...], tensors: list[Tensor]) -> HeadSet:
    kv_heads, layout, window, names, extra = description
    fields: dict[str, Any] = {"key_basis": {}, "value_basis": {}}
    for field, name in names:
        if name:
            fields[field][name] = tensors.pop(0)
        else:
            fields[field] = tensors.pop(0)
    return HeadSet(kv_heads=kv_heads, layout=layout, window=window, **fields, extra=tuple(_rebuild(part, tensors) for part in extra))


def flatten_sets(sets: list[HeadSet]) -> tuple[list[Tensor], int]:
    """Head sets as the operator takes them: their tensors, and the number of everything about them that is no tensor."""
    tensors: list[Tensor] = []
    description = tuple(_describe(s, tensors) for s in sets)
    if description not in _NUMBERS:
        _NUMBERS[description] = len(_DESCRIPTIONS)
        _DESCRIPTIONS.append(description)
    return tensors, _NUMBERS[description]


@torch.library.custom_op("bitsandheads::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, tensors: list[Tensor], sets: int, scale: float, hidden: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    left = list(tensors)
    return _dispatch(q, [_rebuild(d, left) for d in _DESCRIPTIONS[sets]], scale, hidden, backend)


@_decode_attention.register_fake
def _(q: Tensor, tensors: list[Tensor], sets: int, scale: float, hidden: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def _dispatch(q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    chosen = resolve_backend(backend, q.device)
    if chosen == "cuda":
        from . import cuda_decode

        if len(sets) * q.shape[0] > cuda_decode.MAX_ENTRIES:
            return _in_parts(q, sets, scale, hidden, backend, cuda_decode.MAX_ENTRIES // len(sets))
        why = cuda_decode.unsupported(q, sets)
        if why is None or backend == "cuda":
            try:
                return cuda_decode.decode_attention(q, sets, scale, hidden)
            except BackendError as e:
                if backend == "cuda":
                    raise
                mark_failed("cuda", str(e))
        else:
            say_once(f"The cuda backend does not cover {why}; another backend takes over.")
        chosen = "triton" if why_not("triton", q.device) is None else "reference"
    if chosen == "triton":
        from . import triton_decode

        why = triton_decode.unsupported(q, sets)
        if why is None or backend == "triton":
            return triton_decode.decode_attention(q, sets, scale, hidden)
        say_once(f"The triton backend does not cover {why}; the plain PyTorch reference takes over.")
    work = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    return reference.decode_attention(q, sets, scale, hidden, work)


def _in_parts(q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None, backend: str, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` sequences at a time, for a kernel that takes no more."""
    batch = q.shape[0]
    size = -(-batch // -(-batch // most))
    parts = []
    for rows in (slice(first, first + size) for first in range(0, batch, size)):
        own = None if hidden is None else hidden[rows]
        parts.append(_dispatch(q[rows], [s.rows(rows) for s in sets], scale, own, backend))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def decode_attention(
    q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of the newest Q tokens over everything that a layer holds.

    Under torch.compile there is no graph break; call it once with head sets of the same description before compiling (their description
    is registered at the first call).

    Args:
        q: [B, Hq, Q, D] after RoPE.
        sets: partition of the layer's KV heads.
        scale: factor of the scores, usually D ** -0.5.
        hidden: int64 [B, Q], how many of the newest stored tokens query i does not see; None: Q - 1 - i (causal).
        backend: "auto" (the first of cuda, triton and reference that runs here and covers the inputs), or one of them.
    Returns:
        out [B, Hq, Q, D] in q's dtype and lse float32 [B, Hq, Q], natural logarithm of the sum of exp(scores).
    Raises:
        BackendError: a backend was named that cannot run here or does not cover these inputs.
    """
    tensors, number = flatten_sets(sets)
    return torch.ops.bitsandheads.decode_attention(q, tensors, number, scale, hidden, backend)
