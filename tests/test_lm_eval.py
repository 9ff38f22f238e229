"""The adapter for lm-evaluation-harness, on local tasks: it goes through the packed cache and agrees with our own runner."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from tiny_texts import saved_model

import bitsandheads as bh
from bitsandheads.adapters import lm_eval as adapter
from bitsandheads.adapters.lm_eval import AdapterError, BitsAndHeadsLM
from bitsandheads.eval import fidelity
from bitsandheads.eval.runner import generate_records, plan_cache
from bitsandheads.eval.tasks import Task
from bitsandheads.models import load
from bitsandheads.tasks import Sample

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. " * 3
QUESTIONS = [TEXT[i * 7 : 300 + i * 3] for i in range(3)]
CHOICES = ["it", "must be", "a single man in possession of a good fortune, must be"]

GENERATE = """
task: local_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["never said"], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
task: local_choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""

PLAN = bh.CachePlan(
    "small-tiles",
    (
        bh.HeadGroup(
            quant=bh.KVQuant(
                bh.TensorQuant((bh.AxisClass(2, 1.0, "minmax"),)),
                bh.TensorQuant((bh.AxisClass(2, 1.0, "minmax"),), per="token"),
                group_size=32,
                tile=32,
                residual=32,
                sink=4,
            )
        ),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, a plan, and a folder of local tasks."""
    out = tmp_path_factory.mktemp("harness")
    saved_model(out / "model")
    PLAN.save(out / "plan.json")
    (out / "tasks").mkdir()
    rows = [{"question": q, "answer": "x", "choices": CHOICES} for q in QUESTIONS]
    (out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {out / 'rows.jsonl'}}}}}\ntest_split: test\n"
    for name, text in (("generate", GENERATE), ("choose", CHOOSE), ("rolling", ROLLING)):
        (out / "tasks" / f"{name}.yaml").write_text(text + source)
    return out


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def harness(folder: Path, task: str, plan, batch: int = 2) -> list:
    """The harness's logged samples, in the order of the rows."""
    lm = BitsAndHeadsLM(str(folder / "model"), plan=plan, device="cpu", batch_size=batch)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return sorted(results["samples"][task], key=lambda s: s["doc_id"])


@pytest.mark.parametrize("plan", ["bf16", PLAN], ids=["bf16", "packed"])
def test_generation_agrees_with_the_runner(folder, plan):
    model, tokenizer = load(str(folder / "model"))
    task = Task("same", [Sample(str(i), q, "x") for i, q in enumerate(QUESTIONS)], lambda s, o: float(o == "x"), 40)
    ours = {r.id: r for batch in generate_records(model, tokenizer, task, plan_cache(plan), plan="p", batch_size=1) for r in batch}
    theirs = harness(folder, "local_generate", plan, batch=1)
    assert [s["resps"][0][0] for s in theirs] == [ours[str(i)].output for i in range(len(QUESTIONS))]
    assert all(s["exact_match"] == ours[str(i)].score for i, s in enumerate(theirs))
    assert len({s["resps"][0][0] for s in theirs}) > 1


def test_generation_decodes_from_packed_tokens(folder):
    whole, packed = (harness(folder, "local_generate", plan) for plan in ("bf16", PLAN))
    assert [s["resps"] for s in whole] != [s["resps"] for s in packed]


@pytest.mark.parametrize("plan", ["bf16", PLAN], ids=["bf16", "packed"])
def test_log_likelihood_agrees_with_fidelity(folder, plan):
    """The sum of the log-probabilities is what teacher forcing through the runner's cache gives."""
    model, tokenizer = load(str(folder / "model"))
    samples = harness(folder, "local_choose", plan, batch=1)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        for choice, (answer,) in zip(CHOICES, sample["resps"], strict=True):
            ids = tokenizer(question + choice, return_tensors="pt").input_ids
            tokens = len(choice)
            against = fidelity.reference(model, ids, ids.shape[1] - tokens - 1, tokens)
            row, _ = fidelity.measure(model, bh.get_plan(plan), against)
            assert answer[0] == pytest.approx(-tokens * torch.tensor(row["perplexity"]).log().item(), rel=1e-5)


def test_log_likelihood_goes_through_the_packed_cache(folder):
    """Even that of a continuation's first token, which the prompt's own logits would have given in full precision."""
    one = harness(folder, "local_choose", PLAN)
    other = harness(folder, "local_choose", "bf16")
    firsts = [(a["resps"][0][0][0], b["resps"][0][0][0]) for a, b in zip(one, other, strict=True)]
    assert all(abs(a - b) > 1e-3 for a, b in firsts)


@pytest.mark.parametrize("task", ["local_choose", "local_rolling"])
def test_batches_change_nothing(folder, task):
    single, batched = (harness(folder, task, PLAN, batch) for batch in (1, 4))
    for a, b in zip(single, batched, strict=True):
        for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
            assert torch.tensor(x, dtype=torch.float64).allclose(torch.tensor(y, dtype=torch.float64), rtol=1e-4)


def test_bf16_is_the_harness_own_log_likelihood(folder):
    from lm_eval.models.huggingface import HFLM

    own = HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=4)
    ours = BitsAndHeadsLM(str(folder / "model"), plan="bf16", device="cpu", dtype="float32", batch_size=4)
    rows = [(None, [1, *range(40, 40 + n)], [50 + n, 60, 61][:k]) for n, k in ((30, 3), (0, 2), (4, 1), (90, 3))]
    for (a, _), (b, _) in zip(own._loglikelihood_tokens(rows, True), ours._loglikelihood_tokens(rows, True), strict=True):
        assert a == pytest.approx(b, rel=5e-3)  # whole tokens are bfloat16


def test_what_the_adapter_refuses(folder):
    lm = BitsAndHeadsLM(str(folder / "model"), device="cpu", batch_size="auto")
    with pytest.raises(AdapterError, match="need a number"):
        lm._loglikelihood_tokens([(None, [1], [2])])
    with pytest.raises(bh.PlanError, match="did you mean 'balanced'"):
        BitsAndHeadsLM(str(folder / "model"), plan="balancd", device="cpu")


def test_the_command_line_knows_the_model(monkeypatch):
    """For releases of the harness that do not look for entry points. (The whole command takes 30 s to list the harness's own tasks.)"""
    from lm_eval.api.registry import get_model

    known = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: known.append(get_model("bitsandheads")))
    adapter.main()
    adapter.main()
    assert known == [BitsAndHeadsLM] * 2


def test_the_entry_point_names_the_adapter():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["bitsandheads"].partition(":")
    assert (module, getattr(adapter, name)) == (adapter.__name__, BitsAndHeadsLM)


def test_the_package_does_not_import_the_harness():
    code = "import sys, bitsandheads, bitsandheads.cli; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
