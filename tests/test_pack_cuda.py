"""The CUDA kernels of packing on a CPU: their source, compiled by g++ against emulator/. Wrong results, misaligned accesses and threads that wait in vain
show; races, copies that are not waited for and speed do not."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_pack
import torch

from bitsandheads.methods import get_plan
from bitsandheads.ops import cuda_basis, cuda_pack

HERE = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
BASIS = """
extern "C" int start_principal_axes(float* gram, float* scales, float* axes, int sweeps, int grid, int block) {
  return launch([=] { principal_axes(gram, scales, axes, sweeps); }, grid, block);
}
extern "C" int start_map_back(float* gram, float* cross, unsigned short* axes, unsigned short* out, float share, int grid, int block) {
  return launch([=] { map_back(gram, cross, axes, out, share); }, grid, block);
}
"""
PACK = """
extern "C" int start_pack_tiles(const void* p, int grid, int block) { return launch([=] { pack_tiles(*(const Params*)p); }, grid, block); }
"""


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str], ctypes.CDLL]:
    def build(text: str) -> ctypes.CDLL:
        text = re.sub(r"extern __shared__ (?:__align__\(16\) )?(float|unsigned char) (\w+)\[\];", r"\1* \2 = (\1*)memory;", text)
        assert "asm" not in text
        source = tmp_path / f"{len(list(tmp_path.iterdir()))}.cpp"  # a loaded library's name cannot be used again
        library = source.with_suffix(".so")
        source.write_text((HERE / "threads.h").read_text() + text)
        subprocess.run(
            [str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fno-gnu-unique", "-o", str(library), str(source)], check=True
        )
        return ctypes.CDLL(str(library))

    return build


@pytest.mark.parametrize(("dim", "block", "decades"), [(24, 4, 1), (24, 8, 4), (40, 4, 4)])
def test_basis(monkeypatch: pytest.MonkeyPatch, compiled: Callable[[str], ctypes.CDLL], dim: int, block: int, decades: float) -> None:
    monkeypatch.setattr(cuda_basis, "BLOCK", block)
    text = cuda_basis.source(dim)
    for name, formula in (("rsqrt", "1 / sqrtf(x)"), ("rcp", "1 / x")):
        text = re.sub(rf'asm\("{name}[^;]*;[^;]*;', f"y = {formula};", text)
    kernels = compiled(text + BASIS)

    def launch(name: str, like: torch.Tensor, threads: int, shared: int, tensors: list[torch.Tensor], number: Any) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        assert not getattr(kernels, f"start_{name}")(*pointers, number, like.shape[:-2].numel(), threads), (
            "threads wait for each other in vain"
        )

    monkeypatch.setattr(cuda_basis, "_launch", launch)
    test_pack.check_basis(dim, decades, "cpu")


def _start(function: Any, grid: int, threads: int, shared: int, stream: int, arguments: Any, early: bool) -> None:
    assert not function(ctypes.c_void_p(arguments[0]), grid, threads), "threads wait for each other in vain"


@pytest.mark.parametrize("preset", ["balanced", "extreme"])
def test_tiles(monkeypatch: pytest.MonkeyPatch, compiled: Callable[[str], ctypes.CDLL], preset: str) -> None:
    pytest.importorskip("triton")

    def kernel(half: Any, tile_bytes: int, weighted: bool, keep: bool, device: torch.device) -> tuple[Any, int]:
        text = cuda_pack.source(half, tile_bytes, weighted, keep)
        start, end = text.index("// -- instructions ---"), text.index("// -- parts ---")
        return compiled(text[:start] + (HERE / "pack_instructions.h").read_text() + text[end:] + PACK).start_pack_tiles, 0

    monkeypatch.setattr(cuda_pack, "_kernel", kernel)
    monkeypatch.setattr(cuda_pack, "_start", _start)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    test_pack.check_cuda_pack(get_plan(preset).groups[0].quant, 64, "cpu")
