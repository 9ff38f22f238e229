"""Token eviction in benchmarks/comparators, against the methods written out token by token; budgets in bytes."""

import numpy as np
import pytest
import tiny_models as tm
import torch
from comparators import methods
from comparators.eviction import Budget, EvictionCache, EvictionLayer
from comparators.methods import H2O, METHODS, RKV, StreamingLLM
from torch import Tensor

import bitsandheads as bh
from bitsandheads.layer import read_mask

HEADS, GROUP, DIM = 2, 2, 16
SHAPE = bh.LayerShape(HEADS * GROUP, HEADS, DIM)
SCALE = DIM**-0.5
SHORT = {"streaming-llm": StreamingLLM(sink=2), "h2o": H2O(), "r-kv": RKV(queries=3, kernel=3, slack=4)}


def plan_of(sparsity: float, window: bh.Window, layers: int = 1, heads: int = HEADS) -> bh.CachePlan:
    return bh.rlkv(bh.HeadScores(np.arange(layers * heads).reshape(layers, heads)), sparsity, window)


# -- the methods, one head of one sequence at a time ----------------------------------------------------------------------------------


class Written:
    """Tokens of one head as a list of (number, key, value, attention drawn), newest last."""

    def __init__(self, name: str, method, budget: Budget) -> None:
        self.name, self.method, self.budget = name, method, budget
        self.tokens: list[list] = []
        self.queries: list[Tensor] = []  # [GROUP, D] each
        self.seen = 0

    def add(self, k: Tensor, v: Tensor) -> None:
        self.tokens.append([self.seen, k, v, 0.0])
        self.seen += 1

    def attend(self, q: Tensor, limit: int) -> Tensor:
        """q [GROUP, D] of token number `limit`."""
        seen = [t for t in self.tokens if t[0] <= limit]
        weights = (q @ torch.stack([t[1] for t in seen]).T * SCALE).softmax(-1)
        for t, w in zip(seen, weights.sum(0).tolist(), strict=True):
            t[3] += w
        self.queries.append(q)
        return weights @ torch.stack([t[2] for t in seen])

    def evict(self) -> None:
        allowed = self.budget.tokens(self.seen)
        if len(self.tokens) <= allowed:
            return
        if self.name == "streaming-llm":
            while len(self.tokens) > allowed:
                self.tokens.pop(2)
        elif self.name == "h2o":
            for _ in range(len(self.tokens) - allowed):
                old = [t for t in self.tokens if t[0] < self.seen - allowed // 2]
                self.tokens.remove(min(old, key=lambda t: t[3]))
        else:
            score = self.rkv()
            target = max(allowed - self.method.slack, self.method.queries + 1)
            best = sorted(score, key=score.get, reverse=True)[: target - self.method.queries]
            self.tokens = [t for t in self.tokens if t[0] in best or t[0] >= self.seen - self.method.queries]

    def rkv(self) -> dict[int, float]:
        m, n = self.method, len(self.tokens)
        keys = [t[1] / (t[1].norm() + 1e-8) for t in self.tokens]
        cosine = [[0.0 if i == j else float(keys[i] @ keys[j]) for j in range(n)] for i in range(n)]
        for row in cosine:
            similar = [j for j in range(n) if row[j] > m.similar]
            row[similar[-1] if similar else 0] = 0.0
        redundancy = torch.tensor([sum(row[j] for row in cosine) / n for j in range(n)]).softmax(0)
        old = n - m.queries
        k = torch.stack([t[1] for t in self.tokens[:old]])
        weights = [((q @ k.T).amax(0) * SCALE).softmax(0) for q in self.queries[-m.queries :]]
        mean = (sum(weights) / m.queries).tolist()
        pooled = [max(mean[max(j - m.kernel // 2, 0) : j + m.kernel // 2 + 1]) for j in range(old)]
        return {self.tokens[j][0]: m.mix * pooled[j] - (1 - m.mix) * float(redundancy[j]) for j in range(old)}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("sparsity", [0.5, 1])
def test_methods_as_written_out(name: str, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded prompts of different lengths, then single tokens and a chunk; float64, so that the choices are the same."""
    monkeypatch.setattr(methods, "COSINES", 1)  # one sequence at a time
    method, random = SHORT[name], torch.Generator().manual_seed(1)
    budget = Budget(plan_of(sparsity, bh.Window(4, 8)), [SHAPE], 8, method)
    layer = EvictionLayer(0, SHAPE, method, budget, None)
    lengths, width = [60, 41, 9], 60
    real = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    written = [[Written(name, method, budget) for _ in range(HEADS)] for _ in lengths]
    evicted = False
    for step, n in enumerate([width, *[1] * 30, 5, *[1] * 9]):
        k, v = torch.randn(2, 3, HEADS, n, DIM, generator=random, dtype=torch.float64)
        k = (0.7 * k + 0.5 * k[:, :, :1]).clone()  # some keys alike
        q = torch.randn(3, HEADS * GROUP, n, DIM, generator=random, dtype=torch.float64)
        valid = real if step == 0 else torch.ones(3, n, dtype=torch.bool)
        want = torch.zeros(3, n, HEADS * GROUP, DIM, dtype=torch.float64)
        for b, heads in enumerate(written):
            places = valid[b].nonzero().squeeze(1).tolist()
            for h, w in enumerate(heads):
                start = w.seen
                for i in places:
                    w.add(k[b, h, i], v[b, h, i])
                for number, i in enumerate(places):
                    mine = slice(h * GROUP, (h + 1) * GROUP)
                    want[b, i, mine] = w.attend(q[b, mine, i], start + number)
                w.evict()

        def base(q: Tensor, k: Tensor, v: Tensor, want: Tensor = want) -> Tensor:
            return want

        mask = (torch.arange(n) <= torch.arange(n)[:, None]) & valid[:, None]
        layer.stage(k, v)
        out = layer.attend(q, read_mask(mask[:, None] if step == 0 else None, n), SCALE, base)
        torch.testing.assert_close(out[valid], want[valid])
        for b, heads in enumerate(written):
            for h, w in enumerate(heads):
                assert sorted(p for p in layer.place[b, h].tolist() if p >= 0) == sorted(t[0] for t in w.tokens)
                evicted |= len(w.tokens) < w.seen
            assert layer.held[b] == len(heads[0].tokens) <= max(budget.tokens(layer.seen[b]), 1)
    assert evicted


# -- in a model -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_with_room_for_everything_it_is_dynamic_cache(name: str) -> None:
    model = tm.make("qwen3")
    for inputs in (tm.inputs_for(tm.tokens(2, 30)), tm.left_padded([30, 12, 9])):
        expected, logits = tm.generate(model, inputs, tm.dynamic(model), 10)
        roomy = bh.CachePlan("roomy", (bh.HeadGroup(),))
        cache = EvictionCache(METHODS[name], roomy, model)
        for layer in cache.layers:
            layer.layer.budget.fixed, layer.layer.budget.token = 0, 1  # sums and queries for nothing
        got, got_logits = tm.generate(model, inputs, cache, 10)
        assert torch.equal(got, expected)
        torch.testing.assert_close(got_logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", [0.25, 0.75, 1])
def test_never_more_bytes_than_the_plan(name: str, sparsity: float) -> None:
    model = tm.make("qwen3", dtype=torch.bfloat16)
    plan = plan_of(sparsity, bh.Window(4, 30), layers=2)
    cache, lengths = EvictionCache(METHODS[name], plan, model, torch.bfloat16), [150, 80]
    tm.generate(model, tm.left_padded(lengths), cache, new=1)
    for _ in range(70):
        step = torch.full((2, 1), 5)
        model(step, past_key_values=cache, attention_mask=torch.ones(2, cache.get_seq_length() + 1))
        lengths = [n + 1 for n in lengths]
        most = sum(max(plan.bytes_for(model.config, n, generated=g) for g in (0, 15)) for n in lengths)
        assert cache.memory_bytes() <= sum(cache.bytes_for(n, 0) for n in lengths) <= most
        tensors = [x for layer in cache.layers for x in (layer.layer.k, layer.layer.v)]
        assert sum(x.nbytes for x in tensors) < 2 * most + 2 * 2 * 2 * 2 * 128 * 64 * 2  # dropped tokens are really gone
    assert cache.memory_bytes() > 0.7 * most  # and the budget is used


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_evicted_while_the_plan_holds_everything(name: str) -> None:
    window = bh.Window(4, 30)
    budget = Budget(plan_of(0.5, window), [SHAPE], 2, METHODS[name])
    limit = window.sink + window.recent + 16  # a windowed head keeps 16 tokens more for a step back
    assert [budget.tokens(n) for n in range(limit + 1)] == list(range(limit + 1))
    assert budget.tokens(limit + 100) < limit + 100


def test_batch_selection() -> None:
    model = tm.make("qwen3")
    plan = plan_of(1, bh.Window(2, 6), layers=2)
    ids = tm.tokens(3, 60)
    both = []
    for rows in ([2, 0], None):
        cache = EvictionCache(H2O(), plan, model)
        model(ids if rows else ids[[2, 0]], past_key_values=cache)
        if rows:
            cache.batch_select_indices(torch.tensor(rows))
        both.append(torch.cat([model(tm.tokens(2, 1, seed=i), past_key_values=cache).logits for i in range(30)], 1))
    torch.testing.assert_close(*both)
