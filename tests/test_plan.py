"""Plans: JSON, validation, resolution, bytes said in advance."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import plans

import bitsandheads as bh
from bitsandheads.layer import CompressedLayer, read_mask
from bitsandheads.quant.spec import class_sizes

SHAPE = bh.LayerShape(6, 3, 64)

# -- JSON ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bh.preset_names())
def test_presets_round_trip(name: str, tmp_path: Path) -> None:
    plan = bh.get_plan(name)
    assert plan.name == name
    again = bh.CachePlan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    plan.save(tmp_path / "plan.json")
    assert bh.get_plan(tmp_path / "plan.json") == plan == bh.get_plan(str(tmp_path / "plan.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@given(plans())
def test_random_plans_round_trip(plan: bh.CachePlan) -> None:
    again = bh.CachePlan.from_json(plan.to_json())
    assert again == plan and again.resolve([SHAPE] * 4).layers == plan.resolve([SHAPE] * 4).layers


def test_plans_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        bh.get_plan("balanced").name = "other"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("[1, 2]", "no \"format\""),
        ('{"name": "x"}', "Write plans with CachePlan.save"),
        (json.dumps(json.loads(bh.get_plan("balanced").to_json()) | {"version": 999}), "version 999; this release reads up to 1.*Update"),
        (json.dumps(json.loads(bh.get_plan("balanced").to_json()) | {"version": None}), "version None"),
        (json.dumps({k: v for k, v in json.loads(bh.get_plan("balanced").to_json()).items() if k != "groups"}), "incomplete.*groups"),
        (bh.get_plan("balanced").to_json().replace('"share"', '"part"'), "unknown fields.*part"),
        (bh.get_plan("balanced").to_json().replace('"layers": {}', '"layers": {"first": []}'), "."),
        (bh.get_plan("balanced").to_json().replace('"share": 0.25', '"share": -3'), "share is -3"),
        (bh.get_plan("balanced").to_json().replace('"share": 0.25', '"share": "much"'), "."),
        (bh.get_plan("balanced").to_json().replace('"tile": 128', '"tile": null'), "tile is None; allowed are 16, 32, 64, 128"),
        (bh.get_plan("balanced").to_json().replace('"tile": 128', '"tile": 128.0'), "tile is 128.0; allowed"),
        (bh.get_plan("balanced").to_json().replace('"refit": true', '"refit": "no"'), "refit is 'no'; allowed are True, False"),
        (bh.get_plan("balanced").to_json().replace('"centre": true', '"centre": "no"'), "centre is 'no'"),
        (bh.get_plan("balanced").to_json().replace('"bits": 1,', '"bits": true,'), "bits is True"),
        (bh.get_plan("balanced").to_json().replace('"strict"', '"strickt"'), "unknown fields.*strickt"),
        (bh.get_plan("balanced").to_json().replace('"window"', '"windows"'), "window"),
        (bh.get_plan("balanced").to_json().replace('"kv_heads"', '"sink": 4, "kv_heads"'), "unknown fields.*sink"),
        (bh.get_plan("balanced").to_json().replace('"kv_heads": null', '"kv_heads": [0.0, 1.0]'), "give different head indices"),
    ],
)  # fmt: skip
def test_foreign_newer_and_broken_files(text: str, match: str) -> None:
    with pytest.raises(bh.PlanError, match=match):
        bh.CachePlan.from_json(text)


def test_plan_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(bh.PlanError):
        bh.CachePlan.load(path)


# -- validation: what was given, what is allowed, what to do ---------------------------------------------------------------------------

ONE = bh.AxisClass(2, 1.0)
HALF = bh.TensorQuant((ONE,))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bh.Window(-1, 4), ["Window.sink", "-1", "at least 0"]),
        (lambda: bh.Window(4, 0), ["Window.recent", "0", "at least 1"]),
        (lambda: bh.Window(4, 2.5), ["Window.recent", "2.5", "whole number"]),
        (lambda: bh.Window(True, 4), ["Window.sink", "True", "whole number"]),
        (lambda: bh.HeadGroup(window=bh.Window(), quant=bh.KVQuant(HALF, HALF)), ["window or a quantizer"]),
        (lambda: bh.HeadGroup(()), ["()", "at least one"]),
        (lambda: bh.HeadGroup((1, 1)), ["(1, 1)", "different head indices"]),
        (lambda: bh.CachePlan("x", ()), ["'x'", "at least one"]),
        (lambda: bh.CachePlan("x", layers={2: ()}), ["'x'", "at least one"]),
        (lambda: bh.AxisClass(7, 1.0), ["AxisClass.bits", "7", "6", "ternary"]),
        (lambda: bh.AxisClass(2, 0.0), ["AxisClass.share", "0.0", "above 0"]),
        (lambda: bh.AxisClass(2, 1.5), ["AxisClass.share", "1.5", "at most 1"]),
        (lambda: bh.AxisClass(2, float("nan")), ["AxisClass.share", "nan"]),
        (lambda: bh.AxisClass(2, 1.0, "best"), ["AxisClass.levels", "'best'", "gaussian"]),
        (lambda: bh.AxisClass(2, 1.0, "sign"), ["'sign'", "1 bit"]),
        (lambda: bh.AxisClass("ternary", 1.0, "minmax"), ["ternary"]),
        (lambda: bh.AxisClass(2, 1.0, "minmax", centre=False), ["minmax", "centre=True"]),
        (lambda: bh.TensorQuant(()), ["sum to 0", "must sum to 1"]),
        (lambda: bh.TensorQuant((ONE, ONE)), ["sum to 2", "must sum to 1"]),
        (lambda: bh.TensorQuant((ONE,), per="head"), ["'head'", "channel", "token"]),
        (lambda: bh.TensorQuant((ONE,), per="token", transform="dct"), ["per=\"token\"", "transform"]),
        (lambda: bh.TensorQuant((bh.AxisClass(0, 1.0),), per="token"), ["1 to 4 bits"]),
        (lambda: bh.TensorQuant((ONE,), transform="wavelet"), ["'wavelet'", "hadamard"]),
        (lambda: bh.TensorQuant((ONE,), order="size"), ["'size'", "range"]),
        (lambda: bh.TensorQuant((ONE,), query_weighted=True), ["query_weighted", "principal"]),
        (lambda: bh.TensorQuant((ONE,), transform="principal", last_class_only=True), ["last_class_only", "fourier"]),
        (lambda: bh.TensorQuant(
            (bh.AxisClass("ternary", 0.25, "ternary"), bh.AxisClass(1, 0.5), bh.AxisClass("ternary", 0.25, "ternary"))
        ), ["ternary", "neighbours"]),
        (lambda: bh.TensorQuant((ONE,), refit=True), ["refit", "principal"]),
        (lambda: bh.TensorQuant((ONE,), transform="principal", noise_correction=1.5), ["noise_correction", "1.5", "0 to 1"]),
        (lambda: bh.KVQuant(HALF, bh.TensorQuant((ONE,), transform="principal", noise_correction=0.5)), ["noise_correction", "keys"]),
        (lambda: bh.KVQuant(HALF, HALF, heavy=3, salience=bh.Salience(0.2, "given")), ["given", "heavy", "by=\"attention\""]),
        (lambda: bh.TensorQuant((ONE,), attention_weight=-0.5), ["attention_weight", "-0.5", "0 to 1"]),
        (lambda: bh.KVQuant(HALF, HALF, tile=48), ["KVQuant.tile", "48", "16, 32, 64, 128"]),
        (lambda: bh.KVQuant(HALF, HALF, group_size=100), ["KVQuant.group_size", "100", "16, 32, 64, 128"]),
        (lambda: bh.KVQuant(HALF, HALF, tile=32, group_size=64), ["64", "32", "make the tile larger"]),
        (lambda: bh.KVQuant(HALF, HALF, residual=-1), ["KVQuant.residual", "-1", "at least 0"]),
        (lambda: bh.KVQuant(HALF, HALF, sink=1.5), ["KVQuant.sink", "1.5", "whole number"]),
        (lambda: bh.KVQuant(HALF, HALF, heavy=-1), ["KVQuant.heavy", "-1"]),
        (lambda: bh.KVQuant(HALF, HALF, basis_tokens=0), ["KVQuant.basis_tokens", "0", "at least 1"]),
        (lambda: bh.KVQuant(HALF, HALF, metadata="fp4"), ["KVQuant.metadata", "'fp4'", "fp16", "fp8"]),
        (lambda: bh.Salience(1.0), ["Salience.share", "1.0", "between 0 and 1"]),
        (lambda: bh.Salience(0.2, "luck"), ["Salience.by", "'luck'", "attention", "given"]),
        (lambda: bh.Salience(0.2, classes=()), ["Salience.classes", "sum to 1"]),
        (lambda: bh.KVQuant(HALF, bh.TensorQuant((ONE,), per="token"), salience=bh.Salience(0.2, classes=(bh.AxisClass(6, 1.0),))),
         ["per=\"token\"", "1 to 4 bits"]),
    ],
)  # fmt: skip
def test_messages_say_what_was_given_and_what_is_allowed(make, said: list[str]) -> None:
    with pytest.raises(bh.PlanError) as error:
        make()
    assert isinstance(error.value, ValueError) and isinstance(error.value, bh.BitsAndHeadsError)
    for part in said:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("heads", [[(0, 1)], [(0, 1, 2), (2,)], [(0, 1, 2, 3)], [(-1, 0, 1, 2)], [None, (0,)]], ids=str)
def test_heads_must_partition_a_layer(heads: list) -> None:
    plan = bh.CachePlan("x", layers={1: tuple(bh.HeadGroup(h) for h in heads)})
    with pytest.raises(bh.PlanError, match=r"Layer 1: .* must name each of 0..2 once"):
        plan.resolve([SHAPE] * 2)


def test_layers_out_of_range() -> None:
    with pytest.raises(bh.PlanError, match=r"names layers \[-1, 4\], but the model has layers 0..3"):
        bh.CachePlan("x", layers={4: (bh.HeadGroup(),), -1: (bh.HeadGroup(),), 0: (bh.HeadGroup(),)}).resolve([SHAPE] * 4)


@pytest.mark.parametrize("head_dim", [60, 264])
def test_head_dim_that_cannot_be_packed(head_dim: int) -> None:
    with pytest.raises(bh.PlanError, match=f"head_dim is {head_dim}"):
        bh.get_plan("balanced").resolve([bh.LayerShape(2, 1, head_dim)])
    bh.get_plan("bf16").resolve([bh.LayerShape(2, 1, head_dim)])


# -- against configurations --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tm.MODELS)
def test_resolve_on_models_and_configurations(name: str) -> None:
    model = tm.make(name)
    for source in (model, model.config, model.config.get_text_config()):
        resolved = bh.get_plan("balanced").resolve(source)
        assert len(resolved.layers) == len(resolved.shapes) == 2
        kept = {"mistral-sliding": [None, None], "gemma3": [None, 1], "qwen3-next": [None, 1]}.get(name, [1, 1])
        assert [groups is None for groups in resolved.layers] == [k is None for k in kept]
        for groups, shape in zip(resolved.layers, resolved.shapes, strict=True):
            assert (shape.q_heads, shape.kv_heads, shape.head_dim) == (4, 2, 64)
            assert groups is None or [g.kv_heads for g in groups] == [(0, 1)]


def test_table() -> None:
    model = tm.make("gemma3")
    window, quant = bh.HeadGroup((1,), bh.Window(4, 60)), bh.HeadGroup((0,), quant=bh.get_plan("vidkv-1.5/1.66").groups[0].quant)
    table = bh.CachePlan("composed", layers={1: (quant, window)}).table(model.config, 4096)
    rows = table.splitlines()
    assert [row.split()[0] for row in rows] == ["layers", "0", "1", "1", "all"]
    assert "transformers' own layer" in rows[1] and "window: sink 4 + recent 60" in rows[3] and "salient" in rows[2]
    bits = re.search(r"composed +[\d.]+ +([\d.]+)$", rows[-1])
    assert bits and float(bits[1]) == pytest.approx(bh.CachePlan("c", layers={1: (quant, window)}).bits_for(model, 4096), abs=0.005)
    assert bh.get_plan("balanced").table(tm.make("mistral-sliding").config)


# -- bytes in advance ----------------------------------------------------------------------------------------------------------------------


def really_held(plan: bh.CachePlan, shapes: list[bh.LayerShape], tokens: int, batch: int, dtype: torch.dtype) -> int:
    total = 0
    for i, (groups, shape) in enumerate(zip(plan.resolve(shapes).layers, shapes, strict=True)):
        layer = CompressedLayer(i, groups, shape, "reference")
        layer.token_scores = torch.rand(batch, tokens)
        x = torch.randn(2, batch, shape.kv_heads, tokens, shape.head_dim).to(dtype)
        layer.stage(*x)
        q = torch.randn(batch, shape.q_heads, tokens, shape.head_dim).to(dtype)
        layer.attend(q, read_mask(None, tokens), 0.1, lambda q, k, v: q.transpose(1, 2))
        memory = layer.memory()
        total += sum(memory.in_use.values())
        assert all(memory.in_use[part] <= memory.allocated[part] for part in memory.in_use)
    return total


@pytest.mark.parametrize("name", bh.preset_names())
def test_bytes_for_presets(name: str) -> None:
    plan, shapes = bh.get_plan(name), [bh.LayerShape(4, 2, 64)]
    assert plan.bytes_for(shapes, 0) == 0
    for tokens, batch in ((1, 1), (100, 2), (260, 1), (300, 3), (777, 2), (1000, 1)):
        assert really_held(plan, shapes, tokens, batch, torch.bfloat16) == plan.bytes_for(shapes, tokens, batch)


ONE_BIT_PER_TOKEN = bh.TensorQuant((bh.AxisClass(1, 1.0, "minmax"),), per="token")
ALL_SALIENT = bh.KVQuant(  # three quarters of one tile are one tile
    ONE_BIT_PER_TOKEN, bh.TensorQuant((bh.AxisClass(1, 1.0),)), 16, 16, residual=0, sink=0, basis_tokens=1, salience=bh.Salience(0.75)
)


@settings(max_examples=60)
@example(plan=bh.CachePlan("all salient", (bh.HeadGroup(quant=ALL_SALIENT),)), tokens=16, batch=1, head_dim=16)
@given(plan=plans(kv_heads=2, layers=1), tokens=st.integers(1, 600), batch=st.integers(1, 2), head_dim=st.sampled_from([16, 40, 64]))
def test_bytes_for_random_plans(plan: bh.CachePlan, tokens: int, batch: int, head_dim: int) -> None:
    shapes = [bh.LayerShape(4, 2, head_dim)]
    assert really_held(plan, shapes, tokens, batch, torch.float32) == plan.bytes_for(shapes, tokens, batch, itemsize=4)


@settings(max_examples=20)
@given(plan=plans(kv_heads=2, layers=1), prompt=st.integers(1, 500), generated=st.integers(0, 300), head_dim=st.sampled_from([16, 40, 64]))
def test_bytes_for_generated_tokens(plan: bh.CachePlan, prompt: int, generated: int, head_dim: int) -> None:
    """Tokens that come one at a time are packed and dropped at other moments than a prompt's."""
    shape = bh.LayerShape(4, 2, head_dim)
    (groups,) = plan.resolve([shape]).layers
    assume(not any(g.quant and g.quant.salience and g.quant.salience.scored for g in groups or ()))
    layer = CompressedLayer(0, groups, shape, "reference")
    for n in [prompt] + [1] * generated:
        layer.stage(*torch.randn(2, 1, 2, n, head_dim))
        layer.attend(torch.randn(1, 4, n, head_dim), read_mask(None, n), 0.1, lambda q, k, v: q.transpose(1, 2))
    counted = sum(layer.memory().in_use.values())
    assert counted == plan.bytes_for([shape], prompt + generated, itemsize=4, generated=generated)


@pytest.mark.parametrize("plan", ["bf16", "balanced", "kivi-2", "vidkv-1.5/1.66"])
def test_bytes_for_a_real_cache(plan: str) -> None:
    model = tm.make("llama", dtype=torch.bfloat16)
    cache = bh.CompressedCache(plan, model)
    model(tm.tokens(2, 400), past_key_values=cache)
    assert cache.memory_bytes() == cache.plan.bytes_for(model.config, 400, batch=2)
    assert cache.bits_per_element() == pytest.approx(cache.plan.bits_for(model, 400))


def test_bf16_takes_sixteen_bits_and_the_presets_take_what_they_promise() -> None:
    shapes = [bh.LayerShape(28, 4, 128)] * 2
    bits = {name: bh.get_plan(name).bits_for(shapes, 2**17) for name in bh.preset_names()}
    assert bits["bf16"] == 16
    assert 3.0 <= bits["kivi-2"] < 3.05
    assert bits["extreme"] < bits["balanced"] < 1.8
    for keys in (1.25, 1.5, 1.75, 2):
        row = [bits[f"vidkv-{keys:g}/{values}"] for values in ("1.58", "1.66", "2")]
        assert row == sorted(row) and row[0] < row[2]


@given(share=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]))
def test_class_sizes_partition_the_axes_in_eights(share: list[float], head_dim: int) -> None:
    classes = tuple(bh.AxisClass(1, s / sum(share)) for s in share)
    sizes = class_sizes(classes, head_dim)
    assert sum(sizes) == head_dim and all(n >= 0 and n % 8 == 0 for n in sizes)
    assert all(abs(n - c.share * head_dim) <= 8 for n, c in zip(sizes, classes, strict=True))
