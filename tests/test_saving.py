"""A cache in a file: the same next logits bit for bit, and refusals."""

import json
import os
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_models import FINE, MIXED, small

import bitsandheads as bh
from bitsandheads import saving

GIVEN = bh.CachePlan(
    "given",
    (bh.HeadGroup(quant=bh.KVQuant(FINE.keys, FINE.values, tile=16, group_size=16, residual=16, salience=bh.Salience(0.3, "given"))),),
)
PLANS = ["bf16", MIXED, small("balanced"), small("vidkv-1.5/1.66"), small("kivi-2"), GIVEN]


def prompted(model, plan, inputs) -> bh.CompressedCache:
    cache = bh.CompressedCache(plan, model)
    cache.set_token_scores(torch.rand(inputs["input_ids"].shape))
    model(**inputs, past_key_values=cache)
    return cache


def next_logits(model, cache, mask: torch.Tensor, steps: int = 4, chunk: int = 3) -> torch.Tensor:
    """Logits of a few single tokens and then of a chunk, the same tokens for all sequences."""
    batch, out = mask.shape[0], []
    for part in (*tm.tokens(1, steps, seed=5).split(1, 1), tm.tokens(1, chunk, seed=6)):
        mask = torch.cat([mask, torch.ones(batch, part.shape[1], dtype=mask.dtype)], 1)
        positions = (mask.cumsum(1) - 1)[:, -part.shape[1] :]
        ids = part.expand(batch, -1)
        out.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: getattr(p, "name", p))
@pytest.mark.parametrize("lengths", [[170, 170], [170, 140], [20, 3]], ids=str)
def test_same_next_logits(plan, lengths: list[int], tmp_path: Path) -> None:
    model, inputs = tm.make("llama"), tm.left_padded(lengths)
    cache = prompted(model, plan, inputs)
    bh.save_cache(cache, tmp_path / "cache.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    loaded = bh.load_cache(tmp_path / "cache.safetensors", model)
    assert loaded.plan == cache.plan and loaded.get_seq_length() == max(lengths)
    assert loaded.memory().in_use == cache.memory().in_use
    if len(set(lengths)) == 1:  # other batches are saved with the gaps between their lengths
        assert (tmp_path / "cache.safetensors").stat().st_size < cache.memory_bytes() + 60_000
    steps = 4 if max(lengths) < 100 else 40
    expected = next_logits(model, cache, inputs["attention_mask"], steps)
    assert torch.equal(next_logits(model, loaded, inputs["attention_mask"], steps), expected)
    again = bh.load_cache(tmp_path / "cache.safetensors", model.config)
    assert torch.equal(next_logits(model, again, inputs["attention_mask"], steps), expected)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: getattr(p, "name", p))
def test_one_prefix_for_many(plan, tmp_path: Path) -> None:
    model, inputs = tm.make("llama"), tm.left_padded([170])
    cache = prompted(model, plan, inputs)
    bh.save_cache(cache, tmp_path / "cache.safetensors")
    cache.batch_repeat_interleave(3)
    loaded = bh.load_cache(tmp_path / "cache.safetensors", model)
    loaded.batch_repeat_interleave(3)
    mask = torch.ones(3, 170, dtype=torch.long)
    assert torch.equal(next_logits(model, loaded, mask), next_logits(model, cache, mask))


def test_saved_in_the_middle_of_a_life(tmp_path: Path) -> None:
    """After generation, crop and selection; the loaded cache can be cropped further."""
    model, inputs = tm.make("llama"), tm.left_padded([80, 60, 70])
    cache = prompted(model, MIXED, inputs)
    next_logits(model, cache, inputs["attention_mask"], steps=15)
    cache.crop(-5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    bh.save_cache(cache, tmp_path / "missing" / "c")
    loaded = bh.load_cache(tmp_path / "missing" / "c", model)
    for one in (cache, loaded):
        one.crop(-2)
    mask = torch.cat([inputs["attention_mask"][[2, 0]], torch.ones(2, 11, dtype=torch.long)], 1)
    assert cache.get_seq_length() == loaded.get_seq_length() == mask.shape[1] == 91
    assert torch.equal(next_logits(model, loaded, mask), next_logits(model, cache, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = tm.make("llama", dtype=dtype), tm.left_padded([170, 150])
    cache = prompted(model, small("balanced"), inputs)
    bh.save_cache(cache, tmp_path / "c")
    loaded = bh.load_cache(tmp_path / "c", model)
    assert torch.equal(next_logits(model, loaded, inputs["attention_mask"]), next_logits(model, cache, inputs["attention_mask"]))


def test_whole_tokens_in_a_dtype_of_their_own(tmp_path: Path) -> None:
    model, inputs = tm.make("llama"), tm.left_padded([170, 150])
    cache = bh.CompressedCache(small("balanced"), model, dtype=torch.bfloat16)
    model(**inputs, past_key_values=cache)
    bh.save_cache(cache, tmp_path / "c")
    loaded = bh.load_cache(tmp_path / "c", model)
    expected = next_logits(model, cache, inputs["attention_mask"], steps=30)
    assert torch.equal(next_logits(model, loaded, inputs["attention_mask"], steps=30), expected)
    assert loaded.memory().in_use == cache.memory().in_use


@pytest.mark.parametrize("capacity", [None, 64])
def test_padding_of_whole_heads(capacity: int | None, tmp_path: Path) -> None:
    """A cache of fixed capacity stores none, a growing one on a CPU stores it: both files are read."""
    model = tm.make("llama")
    cache = bh.CompressedCache("bf16", model, capacity=capacity)
    tm.generate(model, tm.left_padded([20, 7]), cache, new=4)
    bh.save_cache(cache, tmp_path / "c")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :13] = 0
    step = {"input_ids": tm.tokens(2, 1), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -1:]}
    loaded = bh.load_cache(tmp_path / "c", model)
    assert loaded.memory_bytes() == cache.memory_bytes()
    got, want = model(**step, past_key_values=loaded).logits, model(**step, past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "mistral-sliding"])
def test_layers_that_transformers_keeps(name: str, tmp_path: Path) -> None:
    model, inputs = tm.make(name), tm.inputs_for(tm.tokens(2, 40))
    cache = prompted(model, "bf16", inputs)
    bh.save_cache(cache, tmp_path / "c")
    loaded = bh.load_cache(tmp_path / "c", model)
    _, expected = tm.generate(model, tm.inputs_for(tm.tokens(2, 45)), cache)
    _, got = tm.generate(model, tm.inputs_for(tm.tokens(2, 45)), loaded)
    assert torch.equal(got, expected)


# -- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path):
    model = tm.make("llama")
    cache = prompted(model, MIXED, tm.left_padded([60, 50]))
    path = tmp_path / "cache.safetensors"
    bh.save_cache(cache, path)
    return model, path


def rewrite(path: Path, drop: str | None = None, **changes: str) -> None:
    with safe_open(path, "pt") as file:
        header = file.metadata() | changes
        tensors = {name: file.get_tensor(name) for name in file.keys() if drop is None or drop not in name}  # noqa: SIM118
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("keep", [0, 5, 200, 5000, -1])
def test_cut_off(saved, keep: int) -> None:
    model, path = saved
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(bh.FileFormatError, match=r"cache\.safetensors.*prepare it again"):
        bh.load_cache(path, model)


@pytest.mark.parametrize("content", [b"hello", os.urandom(4096), json.dumps({"format": "bitsandheads-plan"}).encode()], ids=len)
def test_not_a_safetensors_file(saved, content: bytes) -> None:
    model, path = saved
    path.write_bytes(content)
    with pytest.raises(bh.FileFormatError, match="not a readable cache file"):
        bh.load_cache(path, model)


def test_foreign_safetensors_file(saved) -> None:
    model, path = saved
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(bh.FileFormatError, match=r"not a cache of bitsandheads\. Write caches with save_cache"):
        bh.load_cache(path, model)


@pytest.mark.parametrize("version", ["1", "3", "99", "", "one"])
def test_file_of_another_version(saved, version: str) -> None:
    model, path = saved
    rewrite(path, version=version)
    with pytest.raises(bh.FileFormatError, match=rf"version '{version}'; this release reads version 2\. Update"):
        bh.load_cache(path, model)


def test_newer_plan_inside(saved) -> None:
    model, path = saved
    rewrite(path, plan=json.dumps(json.loads(MIXED.to_json()) | {"version": 9}))
    with pytest.raises(bh.PlanError, match="version 9"):
        bh.load_cache(path, model)


@pytest.mark.parametrize("part", ["0.0.tiles", "1.0.tail_k", "0.1.sink_v", "valid.0", "positions", "basis"])
def test_missing_tensors(saved, part: str, tmp_path: Path) -> None:
    model, path = saved
    if part == "basis":
        bh.save_cache(prompted(model, small("balanced"), tm.left_padded([200])), path)
    rewrite(path, drop=part)
    with pytest.raises(bh.FileFormatError):
        bh.load_cache(path, model)


@pytest.mark.parametrize("change", ["0.0.tiles", "0.0.tail_k", "1.1.tail_v", "0.1.sink_k"])
def test_tensors_of_another_shape(saved, change: str) -> None:
    model, path = saved
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[change] = tensors[change][..., :-8].contiguous()
    save_file(tensors, path, metadata=header)
    with pytest.raises(bh.FileFormatError, match="prepare it again"):
        bh.load_cache(path, model)


@pytest.mark.parametrize("layers", ["[]", "{}", "null", "not json", '[{"stores": []}, {"stores": []}]'])
def test_broken_header(saved, layers: str) -> None:
    model, path = saved
    rewrite(path, layers=layers)
    with pytest.raises(bh.FileFormatError):
        bh.load_cache(path, model)


def test_counts_beyond_the_tensors(saved) -> None:
    model, path = saved
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["layers"])
    layers[0]["stores"][0]["tail"][0] += 1000
    rewrite(path, layers=json.dumps(layers))
    with pytest.raises(bh.FileFormatError, match="prepare it again"):
        bh.load_cache(path, model)


@pytest.mark.parametrize("other", [("llama", {"head_dim": 128}), ("qwen2", {}), ("llama", {"num_hidden_layers": 3})], ids=str)
def test_another_model(saved, other) -> None:
    _, path = saved
    with pytest.raises(bh.ModelMismatchError, match=r"was made with .*\. Use the model it was made with"):
        bh.load_cache(path, tm.make(other[0], **other[1]))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bh.load_cache(tmp_path / "nothing", tm.make("llama"))


def test_empty_and_recurrent_caches(tmp_path: Path) -> None:
    model = tm.make("llama")
    with pytest.raises(bh.CacheStateError, match="empty; run a prompt"):
        bh.save_cache(bh.CompressedCache("bf16", model), tmp_path / "c")
    model = tm.make("qwen3-next")
    with pytest.raises(bh.CacheStateError, match="recurrent state cannot be saved"):
        bh.save_cache(prompted(model, "bf16", tm.inputs_for(tm.tokens(1, 5))), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_writing_is_all_or_nothing(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure half way leaves the older file as it was, and nothing else."""
    model, path = saved
    before = path.read_bytes()

    def fails(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(saving, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        bh.save_cache(prompted(model, "bf16", tm.left_padded([5])), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
