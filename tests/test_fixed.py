"""Caches of fixed capacity: steps that the host takes no part in give what the growing cache gives, and compile into one graph."""

import copy

import pytest
import tiny_models as tm
import torch
from test_models import FINE, MIXED, small
from torch._dynamo.utils import counters
from transformers import CompileConfig
from transformers.utils import ModelOutput

import bitsandheads as bh
from bitsandheads import seam
from bitsandheads.graphs import CapturedSteps

COMPOSED = bh.CachePlan("composed", (bh.HeadGroup((0,), quant=FINE), bh.HeadGroup((1,), window=bh.Window(4, 24))))
PLANS = {
    "bf16": bh.get_plan("bf16"),
    "mixed": MIXED,
    "composed": COMPOSED,
    "balanced": small("balanced"),
    "kivi-2": small("kivi-2"),
    "vidkv": small("vidkv-1.75/1.66"),
}


def compiled(backend: str = "eager") -> CompileConfig:
    """What `generate` does by itself on a GPU, without kernels of the compiler's own, and an error where the step is not one graph."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("plan", PLANS)
def test_fixed_capacity_equals_the_growing_cache(plan: str) -> None:
    model = tm.make("llama")
    for inputs in (tm.inputs_for(tm.tokens(2, 40)), tm.left_padded([40, 17, 9])):
        expected, logits = tm.generate(model, inputs, bh.CompressedCache(PLANS[plan], model), new=70)
        cache = bh.CompressedCache(PLANS[plan], model, capacity=128)
        got, got_logits = tm.generate(model, inputs, cache, new=70)
        assert cache.running
        assert torch.equal(got, expected)
        assert (
            got_logits - logits
        ).abs().max() < 0.05  # on a CPU the growing cache uses the model's own attention until something is packed


def test_packing_starts_while_steps_run() -> None:
    """A prompt that is too short for a basis: queries are remembered on the device, and the codes are those of the growing cache."""
    model, plan = tm.make("qwen3"), small("balanced")
    inputs = tm.left_padded([30, 12])
    start = plan.groups[0].quant.start_length
    cache, growing = bh.CompressedCache(plan, model, capacity=2 * start), bh.CompressedCache(plan, model)
    expected, logits = tm.generate(model, inputs, growing, new=start)
    got, got_logits = tm.generate(model, inputs, cache, new=start)
    assert [s.started for layer in cache.compressed_layers() for s in layer.stores] == [[True, True]] * 2
    assert torch.equal(got, expected)
    assert (got_logits - logits).abs().max() < 0.02
    first, same = (c.compressed_layers()[0].stores[0] for c in (cache, growing))  # later layers see rounding of another attention
    assert torch.equal(first.positions, same.positions)
    assert torch.equal(first.bank.tiles[:, :, :1], same.bank.tiles[:, :, :1])


def test_a_step_is_one_graph_for_many_steps_turns_caches_and_plans() -> None:
    model = tm.make("llama")
    first, second = tm.left_padded([40, 17, 9]), tm.tokens(3, 5, seed=7)
    mask = torch.cat([first["attention_mask"], torch.ones(3, 75, dtype=torch.long)], 1)
    outs = []
    counters.clear()
    for compile_config in (None, compiled()):
        cache = bh.CompressedCache(MIXED, model, capacity=400)
        how = {"disable_compile": compile_config is None, "compile_config": compile_config}
        out, _ = tm.generate(model, first, cache, new=70, **how)
        out, _ = tm.generate(model, {"input_ids": torch.cat([out, second], 1), "attention_mask": mask}, cache, new=70, **how)
        assert min(cache.compressed_layers()[0].stores[0].bank.count) >= 8
        outs.append(out)
    assert torch.equal(*outs)
    other = tm.generate(model, first, bh.CompressedCache(MIXED, model, capacity=300), new=4, compile_config=compiled())[0]
    assert torch.equal(other, outs[0][:, :44])
    whole = [
        tm.generate(model, first, bh.CompressedCache("bf16", model, capacity=100), new=4, **how)[0]
        for how in ({}, {"compile_config": compiled()})
    ]
    assert torch.equal(*whole)  # another plan and another capacity are steps of the same graph
    assert counters["stats"]["unique_graphs"] == 1, "a step was compiled again"
    assert not counters["graph_break"]


def test_a_step_of_a_vision_model_is_one_graph() -> None:
    model = tm.make("qwen2.5-vl")
    counters.clear()
    outs = [
        tm.generate(model, tm.left_padded([40, 17]), bh.CompressedCache(MIXED, model, capacity=100), new=30, **how)[0]
        for how in ({}, {"compile_config": compiled("aot_eager")})
    ]
    assert torch.equal(*outs)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_capacity_is_checked_before_anything_is_written() -> None:
    model = tm.make("llama")
    inputs = tm.left_padded([20, 7])
    cache = bh.CompressedCache(MIXED, model, capacity=24)
    with pytest.raises(bh.CacheStateError, match=r"made for 24 tokens .* hold 25"):
        tm.generate(model, inputs, cache, new=8)
    assert cache.compressed_layers()[0].real_tokens() == [24, 11]  # whole and usable
    with pytest.raises(bh.CacheStateError, match=r"made for 19 tokens .* hold 20"):
        tm.generate(model, inputs, bh.CompressedCache(MIXED, model, capacity=19), new=1)
    unpadded = tm.inputs_for(tm.tokens(2, 20))  # newer transformers gives a compiled step no mask
    with pytest.raises(bh.CacheStateError, match=r"made for 24 tokens .* hold 25"):
        tm.generate(model, unpadded, bh.CompressedCache(MIXED, model, capacity=24), new=8, compile_config=compiled())
    step = {"input_ids": tm.tokens(2, 1), "past_key_values": cache}
    with pytest.raises(bh.CacheStateError, match="hold 25"), torch.no_grad():
        model(**step)


def test_what_fixed_capacity_cannot_do_is_an_error() -> None:
    model = tm.make("llama")
    with pytest.raises(bh.PlanError, match="at least 1"):
        bh.CompressedCache(MIXED, model, capacity=0)
    gemma = tm.make("gemma3")
    with pytest.raises(bh.PlanError, match=r"layers \[0\]"):
        bh.CompressedCache("bf16", gemma, capacity=64)
    with pytest.raises(bh.CacheStateError, match="shorter than a sink"):
        tm.generate(model, tm.left_padded([20, 3]), bh.CompressedCache(MIXED, model, capacity=64), new=4)
    cache = bh.CompressedCache(MIXED, model, capacity=64)
    tm.generate(model, tm.left_padded([20, 7]), cache, new=4)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, -1] = 0
    with pytest.raises(bh.CacheStateError, match="is padding for some sequences"), torch.no_grad():
        model(input_ids=tm.tokens(2, 1), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("plan", ["bf16", "mixed", "balanced"])
def test_memory_is_taken_once_and_as_the_plan_says(plan: str) -> None:
    """Allocated: the capacity's tiles, and the residual at its longest; both follow from plan.bytes_for."""
    model, capacity = tm.make("llama"), 3 * 128 + 50
    cache = bh.CompressedCache(PLANS[plan], model, capacity=capacity)
    tm.generate(model, tm.inputs_for(tm.tokens(1, 200)), cache, new=3)
    taken = cache.memory_bytes(allocated=True)
    places = [store.places() for layer in cache.compressed_layers() for store in layer.step.stores]
    assert taken == cache.resolved.capacity_bytes(capacity, itemsize=4)
    with torch.no_grad():
        for i in range(capacity - 202):  # to the last place
            model(input_ids=tm.tokens(1, 1, seed=i), past_key_values=cache)
    assert cache.memory_bytes(allocated=True) == taken
    assert [store.places() for layer in cache.compressed_layers() for store in layer.step.stores] == places
    assert cache.memory_bytes() <= taken


def test_crop_beams_and_saving_go_on_from_the_device_counts(tmp_path) -> None:
    model = tm.make("llama")
    inputs = tm.left_padded([30, 17])
    outs = []
    for capacity in (None, 160):
        cache = bh.CompressedCache(MIXED, model, capacity=capacity)
        tm.generate(model, inputs, cache, new=50)
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        bh.save_cache(cache, tmp_path / f"{capacity}.safetensors")
        with torch.no_grad():
            steps = [model(input_ids=tm.tokens(2, 1, seed=i), past_key_values=cache).logits for i in range(40)]
        outs.append(torch.cat(steps, 1))
        outs.append(bh.load_cache(tmp_path / f"{capacity}.safetensors", model).compressed_layers()[0].real_tokens())
        cache.reset()
        assert tm.generate(model, inputs, cache, new=4)[0].shape == (2, 34)
    torch.testing.assert_close(outs[0], outs[2], atol=1e-4, rtol=1e-4)
    assert outs[1] == outs[3]


def test_padding_in_a_step_is_seen_in_every_call_of_generate(monkeypatch) -> None:
    """Only within a call the mask need not be looked at again."""
    model = tm.make("llama")
    looks: list[bool] = []
    check = seam._check_step

    def noted(capacity, mask, looked_at=False) -> None:
        if mask is not None:
            looks.append(not looked_at)
        check(capacity, mask, looked_at)

    monkeypatch.setattr(seam, "_check_step", noted)
    run = OnCpu(model, monkeypatch)
    create = model.get_compiled_call
    monkeypatch.setattr(model, "get_compiled_call", lambda config: seam._CALLS.setdefault(id(model), create(config)))
    inputs = tm.left_padded([60, 51])
    got, _ = run.generate(inputs, MIXED, 100, new=9)
    assert looks == [False]  # the steps after the first are not prepared by the model
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    mask[1, -1] = 0
    with pytest.raises(bh.CacheStateError, match="is padding for some sequences"):
        tm.generate(model, {"input_ids": got, "attention_mask": mask}, run.cache, new=4)


def test_beams_and_sampling() -> None:
    model = tm.make("llama")
    inputs = tm.left_padded([20, 7])
    for more in ({"num_beams": 2}, {"do_sample": True, "top_k": 5}):
        both = []
        for capacity in (None, 64):
            torch.manual_seed(0)
            both.append(tm.generate(model, inputs, bh.CompressedCache(MIXED, model, capacity=capacity), new=30, **more)[0])
        assert torch.equal(*both)


def test_a_compiled_step_needs_the_cache_itself() -> None:
    """A copied cell is an error, and so is a batch of another size."""
    model = tm.make("llama")
    cache = bh.CompressedCache(MIXED, model, capacity=64)
    tm.generate(model, tm.left_padded([20, 9]), cache, new=4)
    layer = next(part.layer for part in cache.layers)
    assert cache.running and layer.step is not None
    q, k = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 1, 16)
    with pytest.raises(bh.CacheStateError, match="copy of a cache's cell"):
        torch.ops.bitsandheads.step(q, k, k, layer.step.cell.clone(), 1.0)
    with pytest.raises(bh.ShapeError, match="holds 2 sequences and was given 3"):
        layer.step(torch.zeros(3, 4, 1, 16), torch.zeros(3, 2, 1, 16), torch.zeros(3, 2, 1, 16), 1.0)


class OnCpu:
    """Lets `generate` capture steps on a CPU: a replay calls the captured step again and writes its logits to the same place, as a graph does."""

    def __init__(self, model, monkeypatch, works: bool = True) -> None:
        self.model, self.works, self.calls = model, works, []
        monkeypatch.setattr(
            model, "get_compiled_call", lambda config: CapturedSteps(self.noted("compiled"), self.noted("other"), self.capture)
        )
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *args: True)

    def noted(self, name: str):
        return lambda **kwargs: self.calls.append(name) or self.model(**kwargs)

    def capture(self, step, pool):
        self.calls.append("capture")
        if not self.works:
            raise RuntimeError("operation not permitted when stream is capturing")
        packs = next(part.layer.step.packs for part in self.cache.layers)
        out = ModelOutput(logits=torch.empty(2, 1, self.model.config.get_text_config().vocab_size), past_key_values=self.cache)

        def replay() -> None:
            self.calls.append("packs" if packs else "plain")
            with self.cache.fixed.packing(packs):
                out.logits.copy_(step().logits)

        return replay, out

    def generate(self, inputs, plan, capacity: int, new: int):
        self.cache = bh.CompressedCache(plan, self.model, capacity=capacity)
        return tm.generate(self.model, inputs, self.cache, new=new)


@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl", "phi3"])
@pytest.mark.parametrize("padded", [True, False])
def test_captured_steps_are_given_their_inputs_in_place(name: str, padded: bool, monkeypatch) -> None:
    """The model prepares the first step of a call only, or each (Phi3, in its own way); without padding, newer transformers gives no mask."""
    model = tm.make(name)
    inputs = tm.left_padded([60, 51 if padded else 60])
    if name == "qwen2.5-vl":
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"], dtype=torch.int32)
    masks: list[int] = []
    create = model.create_masks_for_generate
    monkeypatch.setattr(model, "create_masks_for_generate", lambda **kwargs: masks.append(1) or create(**kwargs))
    run = OnCpu(model, monkeypatch)
    make = model.get_compiled_call
    monkeypatch.setattr(model, "get_compiled_call", lambda config: seam._CALLS.setdefault(id(model), make(config)))
    got = run.generate(inputs, MIXED, 90, new=28)
    assert run.calls.count("plain") + run.calls.count("packs") > 20
    assert len(masks) == (28 if name == "phi3" else 2)  # the prompt's, and the first step's
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(model, "_valid_auto_compile_criteria", lambda *args: False)
        expected = tm.generate(model, inputs, bh.CompressedCache(MIXED, model, capacity=90), new=28)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    monkeypatch.setattr(run, "capture", lambda step, pool: (lambda: None, step()))  # a replay cannot notice that there is no room
    with pytest.raises(bh.CacheStateError, match=r"made for 70 tokens .* hold 71"):
        run.generate(inputs, MIXED, 70, new=28)


@pytest.mark.parametrize("works", [True, False])
def test_steps_are_captured_once_in_a_call_of_generate(works: bool, monkeypatch, caplog) -> None:
    model, plan = tm.make("llama"), small("balanced")
    start = plan.groups[0].quant.start_length
    inputs = tm.left_padded([start - 10, start - 20])  # both sequences find their basis on the way, and buffers are entered anew
    expected = tm.generate(model, inputs, bh.CompressedCache(plan, model, capacity=start + 40), new=40, disable_compile=True)
    run = OnCpu(model, monkeypatch, works)
    got = run.generate(inputs, plan, start + 40, new=40)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    calls = run.calls
    if works:
        assert calls.count("capture") == calls.count("compiled") - calls.count("plain") == 3  # at first, and after each start
        assert calls.count("compiled") == 39 and not {"other", "packs"} & set(calls)
    else:
        assert calls.count("capture") == 1 and calls.count("other") == 38 and "cannot be captured" in caplog.text
    hidden = model.generate(
        **inputs, past_key_values=bh.CompressedCache(plan, model, capacity=start + 4), max_new_tokens=4, min_new_tokens=4, pad_token_id=0,
        do_sample=False, output_hidden_states=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert not torch.equal(hidden.hidden_states[1][-1], hidden.hidden_states[2][-1])  # not the same memory twice


@pytest.mark.parametrize("plan", ["mixed", "composed"])
def test_steps_that_pack_are_captured_for_themselves(plan: str, monkeypatch) -> None:
    """Two sequences that pack in different steps; then a turn of no new token, which goes on in the middle of a tile, and one of seven."""
    model, tile = tm.make("llama"), 16  # of both plans
    run, expected = OnCpu(model, monkeypatch), bh.CompressedCache(PLANS[plan], model, capacity=400)
    inputs = tm.left_padded([60, 51])
    for more in (None, 0, 7):
        if more is None:
            got = run.generate(inputs, PLANS[plan], 400, new=100)
            calls = list(run.calls)
        else:
            ids = torch.cat([got[0], tm.tokens(2, more, seed=4)], 1)
            mask = torch.cat(
                [inputs["attention_mask"], inputs["attention_mask"].new_ones(2, ids.shape[1] - inputs["input_ids"].shape[1])], 1
            )
            inputs = {"input_ids": ids, "attention_mask": mask}
            got = tm.generate(model, inputs, run.cache, new=60)
        with monkeypatch.context() as one_by_one:
            one_by_one.setattr(model, "_valid_auto_compile_criteria", lambda *args: False)
            want = tm.generate(model, inputs, expected, new=60 if more is not None else 100)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert calls.count("capture") == 2 and calls.count("compiled") == 99
    assert calls.count("packs") == 6 + 7 - 1  # steps 8, 24, ... 88 and 1, 17, ... 97, but for the first, which was called as it is
    assert calls.count("plain") == 99 - 2 - calls.count("packs")
    banks = [[s.bank.count for layer in c.compressed_layers() for s in layer.stores if hasattr(s, "bank")] for c in (run.cache, expected)]
    assert banks[0] == banks[1] and min(map(min, banks[0])) >= (51 + 200 - 36) // tile


def test_a_copied_model_compiles_its_own_step(monkeypatch) -> None:
    """And one for each way to compile; one with CUDA graphs of torch.compile's own, or disable(), leaves the step to transformers."""
    model = tm.make("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = model.get_compiled_call(None)
    assert isinstance(own, CapturedSteps) and model.get_compiled_call(None).compiled is own.compiled
    other = copy.deepcopy(model)
    assert other.get_compiled_call(None).compiled is not own.compiled
    tuned = [CompileConfig(mode=None, options={"coordinate_descent_tuning": on}) for on in (True, True, False)]
    steps = [model.get_compiled_call(config).compiled for config in tuned]
    assert steps[0] is steps[1] and len({own.compiled, *steps}) == 3
    assert not isinstance(model.get_compiled_call(CompileConfig(dynamic=False)), CapturedSteps)
    bh.disable(model)
    assert not isinstance(model.get_compiled_call(None), CapturedSteps)


class Wrapper(torch.nn.Module):
    """What adapters put around a model: whatever it does not have itself is the model's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str):
        return getattr(super().__getattr__("inner"), name) if name != "inner" else super().__getattr__(name)


def test_the_model_in_a_wrapper_is_the_one_that_generates() -> None:
    model, ids = tm.make("llama"), tm.tokens(1, 20)
    bh.disable(model)
    wrapper = Wrapper(model)
    bh.enable(wrapper)
    hooks = {"get_compiled_call", "create_masks_for_generate", "prepare_inputs_for_generation"}
    assert hooks <= set(model.__dict__) and not hooks & set(wrapper.__dict__)
    out = wrapper.generate(ids, past_key_values=bh.CompressedCache(MIXED, wrapper, capacity=40), max_new_tokens=9, disable_compile=True)
    want = model.generate(ids, past_key_values=bh.CompressedCache(MIXED, model), max_new_tokens=9)
    assert torch.equal(out, want)
    bh.disable(wrapper)
    assert not hooks & set(model.__dict__)
