"""The CUDA kernels behind a head's basis on a CPU: their source, compiled by g++ against emulator/threads.h. Wrong results and threads that wait in vain show;
races and speed do not."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_pack
import torch

from bitsandheads.ops import cuda_basis

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
LAUNCHES = """
extern "C" int start_principal_axes(float* gram, float* scales, float* axes, int sweeps, int grid, int block) {
  return launch([=] { principal_axes(gram, scales, axes, sweeps); }, grid, block);
}
extern "C" int start_map_back(float* gram, float* cross, unsigned short* axes, unsigned short* out, float share, int grid, int block) {
  return launch([=] { map_back(gram, cross, axes, out, share); }, grid, block);
}
"""


@pytest.mark.parametrize(("dim", "block", "decades"), [(24, 4, 1), (24, 8, 4), (40, 4, 4)])
def test_basis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dim: int, block: int, decades: float) -> None:
    monkeypatch.setattr(cuda_basis, "BLOCK", block)
    kernels = cuda_basis.source(dim).replace("extern __shared__ float shared[];", "float* shared = (float*)memory;")
    for name, formula in (("rsqrt", "1 / sqrtf(x)"), ("rcp", "1 / x")):
        kernels = re.sub(rf'asm\("{name}[^;]*;[^;]*;', f"y = {formula};", kernels)
    source, library = tmp_path / "basis.cpp", tmp_path / "basis.so"
    source.write_text((Path(__file__).parent / "emulator" / "threads.h").read_text() + kernels + LAUNCHES)
    subprocess.run([str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    compiled = ctypes.CDLL(str(library))

    def launch(name: str, like: torch.Tensor, threads: int, shared: int, tensors: list[torch.Tensor], number: Any) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        assert not getattr(compiled, f"start_{name}")(*pointers, number, like.shape[:-2].numel(), threads), (
            "threads wait for each other in vain"
        )

    monkeypatch.setattr(cuda_basis, "_launch", launch)
    test_pack.check_basis(dim, decades, "cpu")
