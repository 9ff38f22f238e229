"""Tiles restored by the Triton kernel, in Triton's CPU interpreter, against `HalfLayout.read`."""

from dataclasses import replace

import pytest
import torch
from interpreter import needs_interpreter, run_under_interpreter
from test_decode_cuda import FINE, MIXED, ONE_BIT, THREE_BITS
from test_kernels_triton import NOISE_FREE, TRITS

from bitsandheads.methods import get_plan
from bitsandheads.ops.synthetic import head_set
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant
from bitsandheads.quant.tile import TileLayout

WIDE = KVQuant(  # six bits: three slots of two; four for each token, of keys too; no bits with centres
    TensorQuant((AxisClass(4, 1.0, "minmax"),), per="token"),
    TensorQuant((AxisClass(6, 0.25), AxisClass(5, 0.25), AxisClass(0, 0.25), AxisClass(0, 0.25, centre=False))),
    group_size=64,
)
PRESETS = {name: get_plan(name).groups[0].quant for name in ("balanced", "extreme", "kivi-2", "vidkv-1.25/1.58")}
MADE = {"noise free": NOISE_FREE, "trits": TRITS, "fine": FINE, "mixed": MIXED, "one bit": ONE_BIT, "three bits": THREE_BITS, "wide": WIDE}
CASES = [
    (name, quant, dim) for name, quant in (PRESETS | MADE).items() for dim in (64, 80, 128) if dim != 80 or name in ("noise free", "wide")
]
CASES += [
    ("trits in small tiles", replace(TRITS, tile=16, group_size=16), 80),
    ("trits in tiles of 32", replace(TRITS, tile=32, group_size=32), 64),
]


BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(quant: KVQuant, dim: int, device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    from bitsandheads.ops.triton_restore import restore_tiles

    heads = head_set(quant, dim, (0, 1), [0, 0], [4, 2], [1, 1], torch.float32, device)
    assert heads.tiles is not None and heads.layout is not None
    tiles = heads.tiles[:, :, 1:3]  # a view, as blocks of the history are
    for half, base in ((heads.layout.keys, 0), (heads.layout.values, heads.layout.keys.nbytes)):
        want = half.read(tiles[..., base : base + half.nbytes]).flatten(2, 3)
        for dtype in dtypes:
            got = restore_tiles(tiles, half, base, dtype)
            assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
            assert (got.float() - want).abs().max() <= BOUNDS[dtype] * want.abs().max(), (half.kind, dtype)


def run_cases() -> None:
    for name, quant, dim in CASES:
        print(name, dim, flush=True)
        check(quant, dim, "cpu", (torch.float32, torch.float16)[: 1 + (name == "balanced")])


@needs_interpreter
def test_interpreter() -> None:
    run_under_interpreter(__file__)


@pytest.mark.parametrize("name", ["balanced", "kivi-2", "trits"])
def test_compiles_for_a_gpu(name: str) -> None:
    """The interpreter takes what the compiler refuses."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from bitsandheads.ops.triton_restore import constants, restore

    layout = TileLayout.of((PRESETS | MADE)[name], 128)
    types = dict.fromkeys(restore.arg_names, "constexpr")
    types |= {"tiles": "*u8", "out": "*bf16", "table": "*i32", "t_b": "i64", "t_h": "i64", "heads": "i32"}
    for half, base in ((layout.keys, 0), (layout.values, layout.keys.nbytes)):
        numbers = {(restore.arg_names.index(k),): v for k, v in constants(half, base, layout.nbytes).items()}
        source = triton.compiler.ASTSource(fn=restore, signature=types, constexprs=numbers)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


if __name__ == "__main__":
    run_cases()
