"""What figures depend on, and small things that every measurement needs."""

import json
import platform
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

TEXT = "pride-and-prejudice.txt"


def default_text() -> str:
    """The shipped text (see data/README.md)."""
    return (files("bitsandheads") / "data" / TEXT).read_text("utf-8")


def versions() -> dict[str, str]:
    """What a figure depends on."""
    from .. import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    return {
        "bitsandheads": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write data, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    part.replace(path)
