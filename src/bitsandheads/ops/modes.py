"""What a caller may have switched on in PyTorch, and a cache must not be run in."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def plain(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without autocast, inference mode and torch.compile.

    Autocast changes dtypes in the middle of its arithmetic. A tensor that is made in inference mode must not be written to outside of it, but
    buffers outlive the pass that they are made in. And the bookkeeping of the host is not for a compiler: around a graph break PyTorch 2.13
    counts a tile twice.
    """

    @torch.compiler.disable
    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        casting = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not casting and not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            for kind in casting:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run
