"""The runner: what a record says, that batches change nothing, and that a run folder survives what happens to it."""

import json
import math

import pytest
import torch
from tiny_models import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

import bitsandheads as bh
from bitsandheads.eval import runner
from bitsandheads.eval.runner import evaluate, generate_records, plan_cache, repetition
from bitsandheads.eval.runs import RunFolder, RunFolderError, read_records, read_run
from bitsandheads.eval.stats import compare, mcnemar, wilson
from bitsandheads.eval.summary import summarise
from bitsandheads.eval.tasks import Task
from bitsandheads.tasks import Sample

END = 2
SMALL = bh.KVQuant(
    keys=bh.TensorQuant((bh.AxisClass(2, 1.0, "minmax"),)), values=bh.TensorQuant((bh.AxisClass(2, 1.0, "minmax"),), per="token"),
    group_size=32, residual=32, tile=32, sink=0,
)  # fmt: skip
PACKED = bh.CachePlan("packed", (bh.HeadGroup(quant=SMALL),))
TIGHT = bh.CachePlan("tight", (bh.HeadGroup(window=bh.Window(1, 2)),))
WINDOW = bh.CachePlan("window", (bh.HeadGroup(window=bh.Window(4, 16)),))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w79; 0 pads, 2 ends."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": END, **{f"w{i}": i for i in range(3, 96)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def task(n: int = 7, new: int = 12, **more) -> Task:
    random = torch.Generator().manual_seed(3)
    samples = []
    for i in range(n):
        length = int(torch.randint(5, 60, (1,), generator=random))
        words = torch.randint(3, 80, (length,), generator=random).tolist()
        samples.append(Sample(f"s{i}", " ".join(f"w{w}" for w in words), answer="w7", kind="ab"[i % 2], level=i))
    return Task("words", samples, lambda s, out: float(s.answer in out.split()), new, **more)


@pytest.fixture(scope="module")
def model():
    model = make("qwen3")
    model.generation_config.eos_token_id = END
    return model


def flat(batches):
    return [r for batch in batches for r in batch]


def same_but_time(a: dict, b: dict) -> bool:
    return {k: v for k, v in a.items() if k not in ("seconds", "peak_bytes")} == {
        k: v for k, v in b.items() if k not in ("seconds", "peak_bytes")
    }


# -- records ------------------------------------------------------------------------------------------------------------------


def test_a_record_says_what_generate_does(model):
    tok, t = tokenizer(), task(3)
    for record in flat(generate_records(model, tok, t, lambda m, b: DynamicCache(config=m.config), plan="dynamic", batch_size=1)):
        sample = next(s for s in t.samples if s.id == record.id)
        ids = tok(sample.prompt, return_tensors="pt").input_ids
        cache = DynamicCache(config=model.config)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=12, do_sample=False)[0]
        new = out[ids.shape[1] :].tolist()
        assert record.output == tok.decode(new, skip_special_tokens=True)
        assert (record.output_tokens, record.truncated) == (len(new), new[-1] != END)
        assert record.prompt_tokens == ids.shape[1]
        assert record.cache_bytes == record.held_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        assert record.score == float("w7" in record.output.split())
        assert (record.kind, record.level, record.prompt) == (sample.kind, sample.level, sample.prompt)


def test_batches_give_what_single_samples_give_and_come_longest_first(model):
    t = task()
    single, batched = (
        flat(generate_records(model, tokenizer(), t, plan_cache(WINDOW, dtype=torch.float32), plan="window", batch_size=n)) for n in (1, 3)
    )
    assert [r.id for r in single] == [r.id for r in batched]
    assert [r.prompt_tokens for r in single] == sorted((r.prompt_tokens for r in single), reverse=True)
    for a, b in zip(single, batched, strict=True):
        assert (a.output, a.output_tokens, a.cache_bytes) == (b.output, b.output_tokens, b.cache_bytes)


@pytest.mark.parametrize("plan", [bh.get_plan("bf16"), PACKED, WINDOW], ids=lambda p: p.name)
def test_own_bytes_are_the_bytes_counted(model, plan):
    """The end token is never drawn, so that all lengths are known."""
    t = task(3, new=90)
    config = {"suppress_tokens": [END]}
    for r in flat(
        generate_records(model, tokenizer(), t, plan_cache(plan), plan=plan.name, batch_size=1, sampling={"do_sample": False} | config)
    ):
        assert r.truncated and r.output_tokens == 90
        assert r.cache_bytes == r.held_bytes
        assert r.bits_per_element == pytest.approx(16 * r.cache_bytes / r.full_bytes)


def test_bits_count_neither_padding_nor_what_follows_the_end(model):
    """A short sample in a batch with a long one: its bytes are its own."""
    t = task(4)
    rows = flat(generate_records(model, tokenizer(), t, lambda m, b: DynamicCache(config=m.config), plan="dynamic", batch_size=4))
    assert len({r.prompt_tokens for r in rows}) > 1
    assert all(r.bits_per_element == 32 for r in rows)  # the model computes in float32
    assert all(r.held_bytes >= r.cache_bytes for r in rows)


def test_sampling_follows_the_seed(model):
    def run(seed: int) -> list[str]:
        made = generate_records(
            model, tokenizer(), task(4), plan_cache("bf16"), plan="bf16", batch_size=2, sampling={"temperature": 2.0}, seed=seed
        )
        return [r.output for r in flat(made)]

    before = torch.random.get_rng_state()
    assert run(0) == run(0)
    assert run(0) != run(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_packed_prompt_gives_the_first_token_too(model):
    """With whole tokens nothing changes; with packed ones the first token is what the packed cache says."""

    def firsts(factory, way):
        made = generate_records(model, tok, t, factory, plan="p", batch_size=3, generate=way)
        return {r.id: r.output for r in flat(made)}

    tok, t = tokenizer(), task(6, new=1)
    whole = lambda m, b: DynamicCache(config=m.config)  # noqa: E731
    assert firsts(whole, runner.behind_packed_prompt) == firsts(whole, runner.through_transformers)
    packed = firsts(plan_cache(TIGHT), runner.behind_packed_prompt)
    expected = {}
    for s in t.samples:
        ids = tok(s.prompt, return_tensors="pt").input_ids
        cache = plan_cache(TIGHT)(model, 1)
        model(ids[:, :-1], past_key_values=cache)
        expected[s.id] = tok.decode(model(ids[:, -1:], past_key_values=cache).logits[0, -1].argmax(), skip_special_tokens=True)
    assert packed == expected != firsts(plan_cache(TIGHT), runner.through_transformers)


def test_repetition():
    assert repetition(list(range(100))) == 0
    assert repetition([1, 2, 3, 4] * 100) == pytest.approx(1 - 4 / 385)
    assert repetition([1] * 15) == 0


def test_tasks_that_cannot_be_run(model):
    twice = Task("twice", [Sample("a", "w3", "w4")] * 2, lambda s, o: 0.0, 4)
    with pytest.raises(bh.errors.TaskError, match="same id"):
        next(generate_records(model, tokenizer(), twice, plan_cache("bf16"), plan="bf16"))
    with pytest.raises(bh.errors.TaskError, match="chat template"):
        next(generate_records(model, tokenizer(), task(chat=True), plan_cache("bf16"), plan="bf16"))


def test_chat_template(model):
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}w9 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w10{% endif %}"
    plain, chat = (runner.prompt_ids(tok, task(2, chat=c)) for c in (False, True))
    assert chat == [[9, *row, 10] for row in plain]


# -- run folders --------------------------------------------------------------------------------------------------------------


def run(model, path, n: int = 7, stop_after: int | None = None) -> None:
    count = 0

    def tick(new: int) -> None:
        nonlocal count
        count += new
        if stop_after is not None and count >= stop_after:
            raise KeyboardInterrupt

    caches = {"bf16": plan_cache("bf16"), "window": plan_cache(WINDOW)}
    with RunFolder(path, {"n": n}) as folder:
        evaluate(model, tokenizer(), task(n), caches, folder, batch_size=2, sampling={"temperature": 2.0}, seeds=(0, 1), tick=tick)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> list[dict]:
    """The records of an uninterrupted run."""
    path = tmp_path_factory.mktemp("whole")
    run(model, path)
    assert len(read_records(path)) == 28
    return read_records(path)


@pytest.mark.parametrize("stop", [1, 9, 27])
def test_an_interrupted_run_ends_with_the_same_records(model, whole, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", stop_after=stop)
    kept = read_records(tmp_path / "cut")
    assert stop <= len(kept) < 28
    run(model, tmp_path / "cut")
    cut = read_records(tmp_path / "cut")
    assert cut[: len(kept)] == kept
    assert len(whole) == len(cut) and all(same_but_time(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("lost", [1, 900])
def test_a_torn_end_is_dropped_and_done_again(model, whole, tmp_path, lost):
    """Any number of bytes may be missing at the end: within the last line, or whole lines of the last batch."""
    run(model, tmp_path / "torn")
    file = tmp_path / "torn" / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-lost])
    assert len(read_records(tmp_path / "torn")) < 28
    run(model, tmp_path / "torn")
    torn = read_records(tmp_path / "torn")
    assert len(whole) == len(torn) and all(same_but_time(a, b) for a, b in zip(whole, torn, strict=True))


def test_what_a_folder_refuses(tmp_path):
    with RunFolder(tmp_path / "a", {"model": "x", "plans": ["bf16"]}) as folder:
        folder.append([{"task": "t", "plan": "p", "seed": 0, "id": "1"}])
        with pytest.raises(RunFolderError, match="already holds"):
            folder.append([{"task": "t", "plan": "p", "seed": 0, "id": "2"}, {"task": "t", "plan": "p", "seed": 0, "id": "1"}])
        assert len(folder.records()) == 1
        with pytest.raises(RunFolderError, match="Another process"):
            RunFolder(tmp_path / "a", {"model": "x", "plans": ["bf16"]})
    with pytest.raises(RunFolderError, match="model was 'x', now 'y'"):
        RunFolder(tmp_path / "a", {"model": "y", "plans": ["bf16"]})
    with pytest.raises(RunFolderError, match="holds no run"):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "thesis.txt").write_text("mine")
        RunFolder(tmp_path / "b", {})
    with pytest.raises(RunFolderError, match="is no run folder"):
        read_run(tmp_path / "b")
    file = tmp_path / "a" / "records.jsonl"
    file.write_bytes(b"{broken\n" + file.read_bytes())
    with pytest.raises(bh.FileFormatError, match="line 1"):
        RunFolder(tmp_path / "a", {"model": "x", "plans": ["bf16"]})


def test_run_json_says_what_was_run(tmp_path):
    with RunFolder(tmp_path, {"seeds": (0, 1)}, {"weight": 3}):
        pass
    with RunFolder(tmp_path, {"seeds": (0, 1)}):
        pass
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["config"] == {"seeds": [0, 1]} and data["facts"] == {"weight": 3}
    assert {"bitsandheads", "torch", "transformers", "python", "device"} <= data["versions"].keys()
    assert {"commit", "started"} <= data.keys()


# -- statistics ---------------------------------------------------------------------------------------------------------------


def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    expected = 2 * sum(math.comb(3000, i) for i in range(1401)) / 2**3000
    assert mcnemar(1400, 1600) == pytest.approx(expected)


def test_a_difference_inside_the_noise_is_called_so():
    base = {i: float(i % 10 != 0) for i in range(1000)}
    few = base | {i: 0.0 for i in range(1, 4)} | {i: 1.0 for i in (0, 10)}
    many = base | {i: 0.0 for i in range(1, 400, 10)}
    noise, worse = compare(few, base), compare(many, base)
    assert (noise.only_plan, noise.only_base, noise.verdict) == (2, 3, "inside the noise")
    assert worse.difference == pytest.approx(-0.04) and worse.high < 0 and worse.verdict == "worse"
    assert compare(base, many).verdict == "better"
    assert compare(base, base).verdict == "inside the noise"


def test_several_seeds_have_no_mcnemar():
    base = {i: 0.5 for i in range(50)}
    got = compare(base | {99: 1.0}, base)
    assert (got.p, got.n, got.difference) == (None, 50, 0)
    with pytest.raises(ValueError, match="in common"):
        compare({"a": 1.0}, {"b": 1.0})


# -- summaries ----------------------------------------------------------------------------------------------------------------


def record(plan: str, id: int, score: float, seed: int = 0, kind: str = "a", **more) -> dict:
    figures = dict(output_tokens=10, prompt_tokens=5, repetition=0.0, truncated=False, seconds=1.0, peak_bytes=7)
    bytes_held = {"bf16": 1600, "p": 400}[plan]
    size = dict(cache_bytes=bytes_held, full_bytes=1600)
    return {"task": "t", "plan": plan, "seed": seed, "id": str(id), "kind": kind, "score": score} | figures | size | more


def test_a_summary_row():
    records = [record("bf16", i, 1.0) for i in range(40)] + [record("p", i, float(i >= 10), output_tokens=20) for i in range(40)]
    base, row = summarise(records)
    assert (base["accuracy"], base["verdict"], base["bits_per_element"]) == (1, None, 16)
    assert (row["n"], row["accuracy"], row["difference"], row["verdict"]) == (40, 0.75, -0.25, "worse")
    assert (row["low"], row["high"]) == wilson(30, 40)
    assert row["p"] == mcnemar(0, 10)
    assert (row["bits_per_element"], row["bytes_saved"], row["mean_output_tokens"], row["seconds"]) == (4, 0.75, 20, 40)


def test_seeds_are_averaged_over_each_sample_first():
    """Ten answers of one sample are no ten samples."""
    records = [record("p", i, float(seed == 0), seed) for i in range(4) for seed in range(2)]
    (row,) = summarise(records)
    assert (row["n"], row["seeds"], row["accuracy"], row["low"], row["high"]) == (4, 2, 0.5, 0.5, 0.5)


def test_summary_by_kind():
    records = [record(plan, i, 1.0, kind="ab"[i % 2]) for plan in ("bf16", "p") for i in range(6)]
    rows = summarise(records, by=["kind"])
    assert [(r["kind"], r["plan"], r["n"], r["verdict"]) for r in rows] == [
        ("a", "bf16", 3, None),
        ("b", "bf16", 3, None),
        ("a", "p", 3, "inside the noise"),
        ("b", "p", 3, "inside the noise"),
    ]
