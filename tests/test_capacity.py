"""What fits into a GPU, from the configurations of real models alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models as tm
import torch
import transformers
from typer.testing import CliRunner

import bitsandheads as bh
from bitsandheads import capacity as cap
from bitsandheads.cli import app


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory is not poisoned here: torch's meta device, once it knows the poisoned constructors, allocates what it should not."""
    torch.utils._device._device_constructors.cache_clear()
    yield
    torch.utils._device._device_constructors.cache_clear()


CONFIGS = Path(__file__).parent / "configs"
NAMES = ("qwen2.5-vl-7b", "llava-onevision-7b")


def config(name: str):
    return transformers.AutoConfig.from_pretrained(CONFIGS / name)


@pytest.mark.parametrize("name, billions", [("qwen2.5-vl-7b", 8.292), ("llava-onevision-7b", 8.03)])
def test_weights_are_the_published_number(name: str, billions: float) -> None:
    assert cap.weights(config(name)) / 2e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize("name", ["llama", "llava-onevision", "qwen2.5-vl", "qwen3-vl", "internvl", "smolvlm"])
def test_weights_of_a_model_that_is_there(name: str) -> None:
    model = tm.make(name)
    assert cap.weights(model.config) == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, size, tokens",
    [
        ("qwen2.5-vl-7b", (448, 448), 128),  # 16 x 16 merged patches, two frames share them
        ("qwen2.5-vl-7b", (280, 420), 75),
        ("llava-onevision-7b", (448, 448), 196),  # 27 x 27 patches pooled to 14 x 14, whatever the size
        ("llava-onevision-7b", (720, 1280), 196),
    ],
)
def test_tokens_of_a_frame(name: str, size: tuple[int, int], tokens: float) -> None:
    assert cap.tokens_per_frame(config(name), *size) == tokens


@pytest.mark.parametrize("name, tokens", [("llava-onevision", 1), ("qwen2.5-vl", 0.5), ("qwen3-vl", 0.5), ("internvl", 4), ("smolvlm", 4)])
def test_tokens_of_a_frame_of_models_that_are_there(name: str, tokens: float) -> None:
    assert cap.tokens_per_frame(tm.make(name).config, 28, 28) == tokens


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_is_the_formula_solved(name: str) -> None:
    """One token more than said is over the limit, computed here term by term."""
    c = config(name)
    budget = 0.95 * 80e9 - cap.weights(c)
    per_token = 2 * (2 * 3584 + 2 * 3584 + 3 * 18944)
    layer = 2 * 4 * 128 * 2
    for plan in ("bf16", "kivi-2", "balanced"):
        found = cap.capacity(c, bh.get_plan(plan), 80e9, 196)
        cost = [bh.get_plan(plan).bytes_for(c, n) + n * (per_token + layer) for n in (found.tokens, found.tokens + 1)]
        assert cost[0] <= budget < cost[1]
        held = [bh.get_plan(plan).bytes_for(c, n) for n in (found.held_tokens, found.held_tokens + 2000)]
        assert held[0] <= budget < held[1]
        assert found.frames == found.tokens // 196 and found.cache_bytes == bh.get_plan(plan).bytes_for(c, found.tokens)


def test_fewer_bits_hold_more() -> None:
    c = config("qwen2.5-vl-7b")
    whole, kivi, balanced, extreme = cap.compare(c, [bh.get_plan(p) for p in ("bf16", "kivi-2", "balanced", "extreme")], 80e9, 128)
    assert whole.held_frames < kivi.held_frames < balanced.held_frames < extreme.held_frames
    assert whole.frames < kivi.frames < balanced.frames < extreme.frames
    assert balanced.held_frames > 9 * whole.held_frames


def test_a_text_model_has_no_frames() -> None:
    c = tm.make("llama").config
    found = cap.capacity(c, bh.get_plan("balanced"), 1e9)
    assert found.frames is None and found.tokens > 1000
    with pytest.raises(bh.PlanError, match="reads no videos"):
        cap.tokens_per_frame(c, 448, 448)


def test_what_cannot_be_answered() -> None:
    c = config("qwen2.5-vl-7b")
    with pytest.raises(bh.PlanError, match=r"weights take 16\.6 GB.*--gpu-memory"):
        cap.capacity(c, bh.get_plan("bf16"), 16e9)
    for text in ("448", "axb", "0x448", "448x448x3"):
        with pytest.raises(bh.PlanError, match="height x width"):
            cap.frame_size(text)
    assert cap.frame_size("448X640") == (448, 640)


def test_command_line() -> None:
    """All presets, and one."""

    def run(*more: str) -> str:
        done = CliRunner().invoke(app, ["plan", "--model", str(CONFIGS / "qwen2.5-vl-7b"), "--gpu-memory", "80", *more])
        assert done.exit_code == 0, done.output
        return done.output

    every = run()
    assert all(f"\n{name} " in every for name in bh.preset_names())
    one = run("--plan", "balanced")
    assert "16.58 GB" in one and "128,000 positions" in one and "kivi" not in one
    assert next(line for line in every.splitlines() if line.startswith("balanced")).split() in [x.split() for x in one.splitlines()]
