"""The public face: complete, importable, light, and with one seam to transformers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitsandheads as bh

SOURCE = Path(bh.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# models.py and demo.py load models through transformers' public API; seam.py alone knows its internals
SEAM = "seam.py"
ROOMS = (  # as in docs/architecture.md, from above
    "adapters", "cli demo demo_video evaluation video __main__", "gates headfinding", "eval tasks", "models capacity", "seam saving",
    "layer fixed graphs", "plan scores methods", "stores", "ops", "quant", "errors",
)  # fmt: skip
UPWARDS = {("seam", "gates"), ("eval", "gates"), ("plan", "seam"), ("scores", "seam")}


def imports(path: Path) -> list[str]:
    """Dotted names of the modules that a file imports, at any depth; relative ones start with a dot."""
    out = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            out.append("." * node.level + (node.module or ""))
    return out


def test_all_is_complete_and_importable() -> None:
    assert len(set(bh.__all__)) == len(bh.__all__)
    assert all(hasattr(bh, name) for name in bh.__all__)
    public = {name for name, value in vars(bh).items() if not name.startswith("_") and not isinstance(value, type(sys))}
    assert public == set(bh.__all__)


def test_public_things_have_docstrings() -> None:
    for name in bh.__all__:
        assert getattr(bh, name).__doc__, name


def test_dependencies_point_down() -> None:
    room = {name: i for i, names in enumerate(ROOMS) for name in names.split()}
    upwards = set()
    for path in FILES:
        own = path.relative_to(SOURCE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if own != ("__init__",) and isinstance(node, ast.ImportFrom) and node.level:
                package = (*own[: -node.level], *(node.module or "").split("."))[0]
                targets = [package] if package else [a.name for a in node.names]
                upwards |= {(own[0], t) for t in targets if room.get(t, len(ROOMS)) < room[own[0]]}
    assert upwards == UPWARDS


def test_importing_has_no_side_effects() -> None:
    """No heavy or optional package comes along; nothing is printed; transformers' registries and torch's settings stay as they were."""
    script = """
import sys, torch
threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
before = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
import bitsandheads
heavy = {"trl", "matplotlib", "triton", "cuda", "accelerate", "gguf", "datasets", "typer", "rich"}
already = heavy & set(sys.argv[1].split(","))
assert not {m.partition(".")[0] for m in sys.modules} & heavy - already, "heavy"
assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == before, "registry"
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == (threads, dtype, grad), "torch"
"""
    baseline = (
        "import sys, torch\nfrom transformers import AttentionInterface, DynamicCache\nimport transformers.modeling_utils, "
        "transformers.masking_utils, safetensors.torch\nprint(','.join({m.partition('.')[0] for m in sys.modules}))"
    )
    run = dict(capture_output=True, text=True, timeout=300)
    already = subprocess.run([sys.executable, "-c", baseline], **run).stdout.strip().splitlines()[-1]
    done = subprocess.run([sys.executable, "-c", script, already], **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_seam_knows_transformers(path: Path) -> None:
    used = [m for m in imports(path) if m == "transformers" or m.startswith("transformers.")]
    if path.relative_to(SOURCE).as_posix() == SEAM:
        assert any(m.startswith("transformers.") for m in used)
        return
    assert not [m for m in used if m != "transformers"], "submodules of transformers are imported in seam.py only"


def test_dependencies_point_one_way() -> None:
    """quant and ops know nothing of stores, stores nothing of layers, none of these of transformers or of the methods."""
    layers = {"quant": 0, "ops": 1, "stores": 2, "plan": 3, "scores": 3, "layer": 4, "methods": 4, "seam": 5, "saving": 6}
    asks = {("plan", "seam"), ("scores", "seam")}  # resolve() and check() ask the seam for a model's shapes
    for path in FILES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[0] not in layers:
            continue
        for name in imports(path):
            level = len(name) - len(name.lstrip("."))
            if not level:
                assert name.partition(".")[0] != "transformers" or layers[parts[0]] >= 5
                continue
            target = [*parts[: len(parts) - level], *name.lstrip(".").split(".")]
            if target[0] in layers and (parts[0], target[0]) not in asks:
                assert layers[target[0]] <= layers[parts[0]], f"{'/'.join(parts)} imports {'.'.join(target)}"


def test_sources_name_no_machine() -> None:
    """No absolute path of somebody's machine in the package or the tests."""
    pattern = re.compile(r"""["'(\s](/home|/root|/Users|/tmp|/work|/mnt|C:\\\\)[/"']""")
    for path in (*FILES, *Path(__file__).parent.glob("*.py")):
        if path != Path(__file__):
            assert not pattern.search(path.read_text("utf-8")), path


def test_version_matches_the_package() -> None:
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert f'version = "{bh.__version__}"' in project.read_text("utf-8")
