"""Record what a decode step of SmolLM2-135M sees, for the kernel tests: python tests/data/record_caches.py

Writes smollm2_caches.safetensors: for two plans and three layers the queries, and every tensor of the layer's head set, after a prompt
of the shipped text and one decode step.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import bitsandheads
from bitsandheads import ops
from bitsandheads.demo import default_text
from bitsandheads.models import load
from bitsandheads.ops.heads import HeadSet

OUT = Path(__file__).with_name("smollm2_caches.safetensors")
PLANS, LAYERS, PROMPT, DECODED = ("balanced", "extreme"), (0, 12, 29), 1000, 2


def used(s: HeadSet) -> dict[str, torch.Tensor]:
    """Tensors of a head set, cut to what its lengths count."""
    sink, tiles, tail = s.lengths[:, 0].tolist()
    out = {"lengths": s.lengths, "tail_k": s.tail_k[:, :, :tail], "tail_v": s.tail_v[:, :, :tail], "tiles": s.tiles[:, :, :tiles]}
    out |= {"sink_k": s.sink_k[:, :, :sink], "sink_v": s.sink_v[:, :, :sink]}
    names = ("axes", "mean", "noise")  # what reading needs; "forward" is for packing
    out |= {
        f"{half}.{k}": basis[k] for half, basis in (("key_basis", s.key_basis), ("value_basis", s.value_basis)) for k in names if k in basis
    }
    return {k: v.to(torch.bfloat16) if k in ("tail_k", "tail_v", "sink_k", "sink_v") else v.clone() for k, v in out.items()}


@torch.no_grad()
def main() -> None:
    model, tokenizer = load("smollm2")
    model.float()  # faster on a CPU; what is kept is rounded to bfloat16
    bitsandheads.enable(model)
    ids = tokenizer(default_text(), return_tensors="pt").input_ids[:, : PROMPT + DECODED]
    record: dict[str, torch.Tensor] = {}
    attend = ops.decode_attention
    for plan in PLANS:
        steps: list[tuple[torch.Tensor, list[HeadSet]]] = []

        def noted(q, sets, *args, steps=steps, **kwargs):
            steps.append((q, sets))
            return attend(q, sets, *args, **kwargs)

        cache = bitsandheads.CompressedCache(plan, model)
        model(ids[:, :PROMPT], past_key_values=cache)
        for i in range(PROMPT, PROMPT + DECODED - 1):
            model(ids[:, i : i + 1], past_key_values=cache)
        ops.decode_attention = noted
        model(ids[:, -1:], past_key_values=cache)
        ops.decode_attention = attend
        for layer in LAYERS:
            q, (heads,) = steps[layer]
            record |= {f"{plan}/{layer}/{k}": v for k, v in {"q": q.bfloat16(), **used(heads)}.items()}
    save_file({k: v.contiguous() for k, v in record.items()}, OUT)


if __name__ == "__main__":
    main()
