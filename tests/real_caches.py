"""What a decode step of a real model sees: tests/data/smollm2_caches.safetensors, written by tests/data/record_caches.py."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from bitsandheads.methods import get_plan
from bitsandheads.ops.heads import HeadSet
from bitsandheads.quant.tile import TileLayout

FILE = Path(__file__).parent / "data" / "smollm2_caches.safetensors"


def real_caches(device: str = "cpu") -> Iterator[tuple[str, Tensor, HeadSet]]:
    """Name ("plan/layer"), queries [1, 9, 1, 64] and the layer's only head set, of every recorded layer."""
    records: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(FILE, device=device).items():
        plan, layer, field = name.split("/")
        records.setdefault(f"{plan}/{layer}", {})[field] = tensor
    for name, record in records.items():
        q = record.pop("q")
        quant = get_plan(name.split("/")[0]).groups[0].quant
        assert quant is not None
        bases = {
            half: {k.split(".")[1]: record.pop(k) for k in list(record) if k.startswith(half)} for half in ("key_basis", "value_basis")
        }
        yield name, q, HeadSet((0, 1, 2), layout=TileLayout.of(quant, q.shape[-1]), **bases, **record)
