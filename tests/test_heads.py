"""Plans from head scores, and windowed heads in real models: equality with DynamicCache and with attention under a mask written out."""

import gc

import numpy as np
import pytest
import tiny_models as tm
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import bitsandheads as bh
from bitsandheads import HeadScores, PlanError, Window

SPARSITIES = (0, 0.2, 0.4, 0.5, 0.6, 0.8, 1)
LLAMA8B = [bh.LayerShape(32, 8, 128)] * 32


def scores_for(layers: int, heads: int, seed: int = 0, **fields) -> HeadScores:
    return HeadScores(np.random.default_rng(seed).random((layers, heads)), **fields)


def windowed_heads(plan: bh.CachePlan, shapes: list[bh.LayerShape]) -> np.ndarray:
    out = np.zeros((len(shapes), shapes[0].kv_heads), dtype=bool)
    for i, groups in enumerate(plan.resolve(shapes).layers):
        for g in groups:
            out[i, list(g.kv_heads)] = g.window is not None
    return out


# -- plans ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("bits", ["bf16", "balanced", "kivi-2"])
def test_the_worst_heads_are_windowed_and_the_others_stored_as_the_bits_plan_says(bits: str, sparsity: float) -> None:
    scores, base = scores_for(32, 8), bh.get_plan(bits)
    plan = bh.compose(base, scores, sparsity, Window(16, 64))
    assert np.array_equal(windowed_heads(plan, LLAMA8B), ~scores.top(1 - sparsity))
    for groups in plan.resolve(LLAMA8B).layers:
        assert {(g.window, g.quant) for g in groups} <= {(Window(16, 64), None), (None, base.groups[0].quant)}
    assert bh.CachePlan.from_json(plan.to_json()) == plan
    if bits == "bf16":
        assert bh.rlkv(scores, sparsity, Window(16, 64)).layers == plan.layers


def test_compose_keeps_what_a_plan_says_of_single_heads_and_layers() -> None:
    q = {n: bh.get_plan(n).groups[0].quant for n in ("balanced", "extreme", "kivi-2")}
    first = (bh.HeadGroup((2, 0), quant=q["balanced"]), bh.HeadGroup((1, 3)))
    bits = bh.CachePlan("p", (bh.HeadGroup(quant=q["kivi-2"]),), {1: first})
    plan = bh.compose(bits, HeadScores([[0, 0, 0, 9], [9, 9, 0, 9], [9, 9, 9, 9]]), 1 / 3)
    layers = plan.resolve([bh.LayerShape(8, 4, 64)] * 3).layers
    window = Window(32, 128)
    assert layers[0] == (bh.HeadGroup((3,), quant=q["kivi-2"]), bh.HeadGroup((0, 1, 2), window=window))
    assert layers[1] == (bh.HeadGroup((0,), quant=q["balanced"]), bh.HeadGroup((1, 3)), bh.HeadGroup((2,), window=window))
    assert layers[2] == (bh.HeadGroup((0, 1, 2, 3), quant=q["kivi-2"]),)


def test_what_compose_refuses() -> None:
    scores = scores_for(3, 2)
    with pytest.raises(PlanError, match="windows heads itself"):
        bh.compose(bh.rlkv(scores, 0.5), scores, 0.5)
    with pytest.raises(PlanError, match=r"layers \[7\]"):
        bh.compose(bh.CachePlan("p", layers={7: (bh.HeadGroup(),)}), scores, 0.5)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(PlanError, match="from 0 to 1"):
            bh.rlkv(scores, wrong)


@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
def test_scores_of_another_model_never_pass_in_silence(sparsity: float) -> None:
    model = tm.make("llama")
    for layers, heads in ((1, 2), (3, 2), (2, 1), (2, 4)):
        if sparsity or layers != 2:  # with every head whole the number of heads does not matter
            with pytest.raises(PlanError, match=r"layers|KV heads"):
                bh.CompressedCache(bh.rlkv(scores_for(layers, heads), sparsity), model)


def test_plans_by_name(tmp_path) -> None:
    path = tmp_path / "mass-seed1.tsv"
    model = tm.make("qwen3")
    scores = HeadScores.of(np.random.default_rng(1).random((2, 2)), model, "mass")
    scores.save(path)
    plan = bh.get_plan(f"rlkv:{path}@0.5")
    assert plan == bh.rlkv(scores, 0.5, name="rlkv:mass-seed1@0.5") and plan.name == "rlkv:mass-seed1@0.5"
    both = bh.get_plan(f"balanced+rlkv:{path}@.25@16+64")
    assert both == bh.compose(bh.get_plan("balanced"), scores, 0.25, Window(16, 64), name="balanced+rlkv:mass-seed1@0.25@16+64")
    assert bh.rlkv(scores, 0.5).name == "rlkv:mass@0.5"
    bits = tmp_path / "bits.json"
    bh.get_plan("extreme").save(bits)
    assert bh.get_plan(f"{bits}+rlkv:{path}@1").layers == bh.compose(bh.get_plan("extreme"), scores, 1).layers
    assert bh.CompressedCache(f"rlkv:{path}@0.5", model).plan == plan
    with pytest.raises(bh.ModelMismatchError, match="model_type"):
        bh.CompressedCache(f"rlkv:{path}@0.5", tm.make("llama"))  # the same shape, another architecture


@pytest.mark.parametrize(
    "text",
    ["rlkv:", "rlkv:f.tsv", "rlkv:f.tsv@", "rlkv:f.tsv@half", "rlkv:f.tsv@0.5@16", "rlkv:f.tsv@0.5@16+", "rlkv:@0.5", "rlkv:f.tsv@-1"],
)
def test_misspelt_names_say_what_is_allowed(text: str) -> None:
    with pytest.raises(PlanError, match="rlkv:SCORES@SPARSITY"):
        bh.get_plan(text)


def test_names_with_wrong_parts(tmp_path) -> None:
    path = tmp_path / "s.tsv"
    scores_for(2, 2).save(path)
    with pytest.raises(PlanError, match="balanced"):
        bh.get_plan(f"balance+rlkv:{path}@0.5")
    with pytest.raises(PlanError, match="from 0 to 1"):
        bh.get_plan(f"rlkv:{path}@1.5")
    with pytest.raises(PlanError, match="recent"):
        bh.get_plan(f"rlkv:{path}@0.5@16+0")
    with pytest.raises(FileNotFoundError, match=r"missing\.tsv"):
        bh.get_plan(f"rlkv:{tmp_path}/missing.tsv@0.5")
    with pytest.raises(PlanError, match="rlkv:SCORES@SPARSITY"):
        bh.get_plan("no-such-preset")


# -- sparsity, counted in heads and in bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparsity_counts_heads_and_true_bytes(sparsity: float) -> None:
    plan = bh.rlkv(scores_for(32, 8), sparsity)
    token = 2 * 128 * 2  # keys and values of one head in bf16
    for tokens in (100, 170, 1000, 32768):
        windowed, saved = plan.sparsity(LLAMA8B, tokens)
        count = int(windowed_heads(plan, LLAMA8B).sum())
        assert windowed == count / 256
        kept = min(tokens, 32 + 128 + 16)  # sink, window, and the tokens kept for a step back
        assert saved == pytest.approx(1 - ((256 - count) * tokens + count * kept) * token / (256 * tokens * token))
    assert plan.sparsity(LLAMA8B, 100).bytes_saved == 0  # nothing is dropped yet: a share of heads is no share of bytes
    assert plan.sparsity(LLAMA8B, 32768).bytes_saved == pytest.approx(windowed, abs=0.006)


def test_sparsity_of_quantized_and_hybrid_plans() -> None:
    both = bh.compose(bh.get_plan("balanced"), scores_for(32, 8), 0.5)
    assert both.sparsity(LLAMA8B, 32768).windowed == 0.5
    assert both.sparsity(LLAMA8B, 32768).bytes_saved == pytest.approx(1 - both.bits_for(LLAMA8B, 32768) / 16)
    assert both.sparsity(LLAMA8B, 32768).bytes_saved > 15 / 16
    assert bh.get_plan("bf16").sparsity(tm.make("gemma3"), 500) == (0, 0)
    assert str(bh.rlkv(scores_for(32, 8), 0.5).sparsity(LLAMA8B, 32768)) == "50.0% of the KV heads windowed, 49.7% of the bytes saved"


# -- equality with DynamicCache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_all_heads_full_is_dynamic_cache_bit_for_bit(name: str) -> None:
    model = tm.make(name)
    layers = 1 if name == "gemma3" else 2
    plan = bh.rlkv(HeadScores.of(np.zeros((layers, 2)), model, "random"), 0)
    tm.same(model, tm.inputs_for(tm.tokens(2, 40)), plan, new=20)
    tm.same(model, tm.left_padded([30, 7, 1]), plan, new=12)


@pytest.mark.parametrize("window", [Window(4, 60), Window(0, 64), Window(63, 1), Window(100, 100)])
@pytest.mark.parametrize("sparsity", [0.5, 1])
def test_a_window_as_long_as_the_text_is_dynamic_cache_bit_for_bit(window: Window, sparsity: float) -> None:
    model = tm.make("qwen3")
    tm.same(model, tm.inputs_for(tm.tokens(2, 44)), bh.rlkv(scores_for(2, 2), sparsity, window), new=20)


# -- windowed heads against a mask written out --------------------------------------------------------------------------------------


class Oracle:
    """A model with its own DynamicCache and eager attention whose mask, for each KV head, is the rule of bitsandheads.plan.Window.

    All tokens stay in the cache; the mask alone says what a head sees. `history` lists the logical tokens of each sequence (real or padding).
    """

    def __init__(self, name: str, windowed: np.ndarray, window: Window, batch: int) -> None:
        self.model, self.cache = tm.make(name, dtype=torch.float64), None
        self.windowed, self.window = torch.from_numpy(windowed), window
        self.real = torch.zeros(batch, 0, dtype=torch.bool)
        self.prompt = 0  # length of the first chunk, to which attention is full
        bh.disable(self.model)
        self.model.set_attn_implementation("written_out")
        self.cache = DynamicCache(config=self.model.config)

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        group, n, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        place = torch.arange(total)
        rank = self.real.long().cumsum(1) - self.real.long()  # number of real tokens before each place
        mine = place[total - n :, None]  # place of each query
        near = (rank[:, None] < self.window.sink) | (rank[:, None] > rank[:, total - n :, None] - self.window.recent)  # [B, n, total]
        full = ~self.windowed[module.layer_idx][:, None] | (mine < self.prompt)[:, 0]  # [H, n]
        allowed = (near[:, None] | full[None, :, :, None]) & self.real[:, None, None] & (place <= mine)
        allowed |= (place == mine) & ~self.real[:, None, total - n :, None]  # a padding query sees itself; its output is never looked at
        scores = query @ key.repeat_interleave(group, 1).mT * kwargs["scaling"]
        weights = scores.masked_fill(~allowed.repeat_interleave(group, 1), -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    def forward(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        self.prompt = self.prompt or ids.shape[1]
        self.real = torch.cat([self.real, real], 1)
        return step(self.model, ids, self.real, self.cache)

    def crop(self, remove: int) -> None:
        self.cache.crop(-remove)
        self.real = self.real[:, : self.real.shape[1] - remove]


@torch.no_grad()
def step(model, ids: torch.Tensor, real: torch.Tensor, cache) -> torch.Tensor:
    positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=real.long(), position_ids=positions, past_key_values=cache).logits


@pytest.fixture(scope="module", autouse=True)
def written_out():
    """Registers the oracle's attention; `current` is the oracle that runs."""
    AttentionInterface.register("written_out", lambda *args, **kwargs: current[0].attention(*args, **kwargs))
    AttentionMaskInterface.register("written_out", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


current: list[Oracle] = []


class Both:
    """The same tokens through a compressed cache and through the oracle."""

    def __init__(self, name: str, windowed: np.ndarray, window: Window, batch: int, seed: int) -> None:
        self.oracle = Oracle(name, windowed, window, batch)
        current[:] = [self.oracle]
        self.model = tm.make(name, dtype=torch.float64)
        plan = bh.rlkv(HeadScores(~windowed), windowed.mean(), window)
        self.cache = bh.CompressedCache(plan, self.model)
        self.random = torch.Generator().manual_seed(seed)

    def tokens(self, n: int, real: torch.Tensor | None = None) -> None:
        batch = self.oracle.real.shape[0]
        ids = torch.randint(2, 80, (batch, n), generator=self.random)
        real = torch.ones(batch, n, dtype=torch.bool) if real is None else real
        want = self.oracle.forward(ids, real)
        got = step(self.model, ids, self.oracle.real, self.cache)
        assert got.isfinite()[real].all()
        torch.testing.assert_close(got[real], want[real], atol=1e-9, rtol=1e-9)

    def crop(self, remove: int) -> None:
        self.oracle.crop(remove)
        self.cache.crop(-remove)


def left(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]


HALF = np.array([[True, False], [False, True]])


@pytest.mark.parametrize("windowed", [HALF, np.array([[True, True], [False, True]]), np.ones((2, 2), bool)], ids=["half", "most", "all"])
@pytest.mark.parametrize("window", [Window(3, 5), Window(0, 4), Window(2, 1)], ids=str)
def test_every_step_of_a_padded_batch(windowed: np.ndarray, window: Window) -> None:
    both = Both("qwen3", windowed, window, batch=4, seed=1)
    both.tokens(21, left([21, 12, 4, 1], 21))
    for _ in range(45):  # far beyond window and rollback
        both.tokens(1)


def test_chunked_prefill_and_later_turns_see_neither_their_future_nor_dropped_tokens() -> None:
    both = Both("llama", HALF, Window(3, 5), batch=3, seed=2)
    both.tokens(9, left([9, 5, 2], 9))
    both.tokens(14)  # the prompt's second part, longer than the window
    both.tokens(30, left([30, 11, 3], 30))  # a later turn, padded on its left within the sequence
    for _ in range(6):
        both.tokens(1)
    both.tokens(2)
    both.tokens(40)
    both.tokens(1)


def test_rollback_inside_the_kept_tokens() -> None:
    both = Both("qwen3", HALF, Window(3, 5), batch=2, seed=3)
    both.tokens(30, left([30, 8], 30))
    for remove in (1, 4, 8, 3):
        both.tokens(9)
        both.crop(remove)
        both.tokens(1)
    with pytest.raises(bh.CacheStateError, match="windowed head"):
        both.cache.crop(-40)
    both.tokens(1)  # a refused crop changed nothing


def test_random_lives() -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        windowed = random.permutation(4).reshape(2, 2) < random.integers(1, 5)
        both = Both("llama", windowed, Window(int(random.integers(0, 6)), int(random.integers(1, 9))), batch=2, seed=seed)
        both.tokens(12, left([12, int(random.integers(1, 13))], 12))
        for _ in range(8):
            both.tokens(int(random.choice([1, 1, 1, 3, 20])))


# -- memory -----------------------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of all tensor storages that Python can still reach."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("bits", ["bf16", "balanced", "kivi-2"])
def test_dropped_tokens_free_their_memory(bits: str) -> None:
    """After prompt and decode the tensors alive hold what the plan says, and no dropped or packed token behind them."""
    model, tokens, new = tm.make("qwen3", dtype=torch.bfloat16), 1500, 40
    plan = bh.compose(bh.get_plan(bits), HeadScores(~HALF), 0.5)
    before = live_bytes()
    cache = bh.CompressedCache(plan, model)
    ids = tm.tokens(2, tokens)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        assert cache.memory_bytes() == plan.bytes_for(model.config, tokens, batch=2)
        for i in range(new):
            model(ids[:, i : i + 1], past_key_values=cache)
    held = live_bytes() - before - ids.nbytes
    assert cache.memory_bytes(allocated=True) <= held <= cache.memory_bytes(allocated=True) + 4096  # lengths, positions
    whole = 2 * bh.get_plan("bf16").bytes_for(model.config, tokens + new)
    spare = cache.memory_bytes(allocated=True) - cache.memory_bytes()
    assert spare < 0.2 * whole  # room to grow into
    assert cache.memory_bytes() / whole == pytest.approx(1 - plan.sparsity(model.config, tokens + new).bytes_saved, abs=0.02)


def test_windowed_heads_do_not_grow() -> None:
    model, plan = tm.make("qwen3"), bh.rlkv(HeadScores(np.zeros((2, 2))), 1, Window(4, 8))
    cache, sizes = bh.CompressedCache(plan, model), []
    with torch.no_grad():
        for n in (300, *[1] * 200, 700, *[1] * 40):
            model(tm.tokens(1, n), past_key_values=cache, logits_to_keep=1)
            sizes.append((cache.memory_bytes(), cache.memory_bytes(allocated=True)))
    token = 2 * 2 * 2 * 64 * 4
    assert max(s[0] for s in sizes) <= (4 + 8 + 2 * 16) * token
    assert max(s[1] for s in sizes[-30:]) <= (4 + 3 * (8 + 16)) * token
