"""Which kernel backend can run where, and why. Importing this module imports no compiler and touches no device."""

import importlib.util
import logging
from functools import lru_cache

import torch

from ..errors import BackendError

log = logging.getLogger(__name__)
BACKENDS = ("cuda", "triton", "reference")  # the order in which "auto" tries them
_failed: dict[str, str] = {}  # backends that could not be built in this process, and why


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on this device, or None.

    Raises:
        BackendError: there is no backend of this name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}.")
    if backend == "reference":
        return None
    if backend in _failed:
        return _failed[backend]
    if backend == "triton":
        return _why_no_triton(device.type)
    if device.type != "cuda":
        return f"the device is {device.type!r}, not a GPU"
    return _why_no_cuda(device)


@lru_cache(maxsize=8)
def _why_no_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda":
        return None
    import triton

    return None if triton.knobs.runtime.interpret else f"the device is {device_type!r} and Triton's interpreter is off"


@lru_cache(maxsize=16)
def _why_no_cuda(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]} (the kernel is written for 9.0)"
    return why_no_nvrtc()


@lru_cache(maxsize=1)
def why_no_nvrtc() -> str | None:
    """Why CUDA C++ cannot be compiled in this process, or None."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is not installed"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as e:  # the library is missing or too old: each release of the bindings says so in its own way
        return f"NVRTC cannot be loaded ({type(e).__name__}: {e})"
    return None


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs on this device; "auto" takes the interpreter of Triton never, and the reference on a CPU.

    Raises:
        BackendError: a backend was named that cannot run here, or that does not exist.
    """
    if backend == "auto":
        names = BACKENDS if device.type == "cuda" else ("reference",)
        return next(name for name in names if why_not(name, device) is None)
    if why := why_not(backend, device):
        raise BackendError(f'backend="{backend}" cannot run here: {why}. Use "auto" for what can.')
    return backend


def resolve_packing(backend: str, device: torch.device) -> str:
    """The backend of packing and appending, "triton" or "reference". What CUDA kernels do of it for "cuda": see ops.pack.pack_with_kernels.

    Raises:
        BackendError: a backend was named that cannot run here, or that does not exist.
    """
    chosen = resolve_backend(backend, device)
    return chosen if chosen != "cuda" else "triton" if why_not("triton", device) is None else "reference"


def explain_backends(device: torch.device) -> list[str]:
    """One line for each backend: whether it runs on the device, why not, and what "auto" takes."""
    lines = []
    for name in BACKENDS:
        why = why_not(name, device)
        lines.append(f"backend {name:10} {'runs' if why is None else f'does not run: {why}'}")
    attention, packing = resolve_backend("auto", device), resolve_packing("auto", device)
    return [*lines, f"backend auto       takes {attention!r} on {device.type} for attention, {packing!r} for packing and appending"]


def mark_failed(backend: str, why: str) -> None:
    """Remember that a backend could not be built; says so once."""
    if backend not in _failed:
        _failed[backend] = why
        log.warning("The %s backend is off in this process: %s", backend, why)


@lru_cache(maxsize=64)
def say_once(text: str) -> None:
    """Log a line at the first call with this text."""
    log.warning(text)
