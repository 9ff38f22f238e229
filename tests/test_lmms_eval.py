"""The adapter for lmms-eval, on local tasks with files that the test encodes itself. Needs lmms-eval and torchvision."""

import json
from pathlib import Path

import pytest
import tiny_models as tm
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("torchvision")
pytest.importorskip("av")

from lmms_eval import evaluator
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager
from test_video import SPECIAL, own_processor, write_mp4

import bitsandheads as bh
from bitsandheads import video
from bitsandheads.adapters import lmms_eval as adapter

GENERATE = """
task: local_clips
output_type: generate_until
generation_kwargs: {max_new_tokens: 5, temperature: 0, until: ["never said"]}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
metric_list: [{metric: exact_match}]
"""
UTILS = """
def visual(doc):
    return [doc["clip"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
PLAN = "vidkv-1.5/1.66-stp"
FRAMES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its processor, two clips, a task."""
    out = tmp_path_factory.mktemp("lmms")
    model = tm.make("llava-onevision")
    model.generation_config.suppress_tokens = list(SPECIAL)
    model.save_pretrained(out / "model")
    own_processor("llava-onevision").save_pretrained(out / "model")
    rows = []
    for i in range(2):
        write_mp4(out / f"{i}.mp4", torch.randint(0, 256, (20, 3, 32, 48), dtype=torch.uint8))
        words = " ".join(f"w{10 + (i + j) % 60}" for j in range(600))  # long enough that the prompt is packed
        rows.append({"clip": str(out / f"{i}.mp4"), "question": words, "answer": "x"})
    (out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / "tasks").mkdir()
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {out / 'rows.jsonl'}}}}}\ntest_split: test\n"
    (out / "tasks" / "local_clips.yaml").write_text(source + GENERATE)
    (out / "tasks" / "utils.py").write_text(UTILS)
    MODEL_REGISTRY_V2.register_manifest(adapter.manifest(), overwrite=True)
    return out


def test_answers_are_those_of_a_session(folder: Path) -> None:
    got = evaluator.simple_evaluate(
        model="bitsandheads",
        model_args=f"pretrained={folder / 'model'},plan={PLAN},frames={FRAMES},reader=pyav",
        tasks=["local_clips"],
        batch_size=1,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        log_samples=True,
    )["samples"]["local_clips"]
    model, processor = video.load(str(folder / "model"), "cpu")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, sorted(got, key=lambda s: s["doc_id"]), strict=True):
        session = video.Session(model, processor, PLAN)
        answer = session.ask(row["question"], [row["clip"]], frames=FRAMES, reader="pyav", max_new_tokens=5)
        assert session.cache.memory().in_use["codes"] > 0 and answer.frames == FRAMES
        assert sample["resps"][0][0] == answer.text


def test_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"bitsandheads": "bitsandheads.adapters.lmms_eval:manifest"}


def test_what_is_not_served(folder: Path) -> None:
    with pytest.raises(adapter.AdapterError, match="batch_size is 4"):
        adapter.BitsAndHeadsVLM(str(folder / "model"), batch_size=4)
    with pytest.raises(bh.PlanError, match="balanced"):
        adapter.BitsAndHeadsVLM(str(folder / "model"), plan="balance", device="cpu")
    served = adapter.BitsAndHeadsVLM(str(folder / "model"), device="cpu")
    with pytest.raises(adapter.AdapterError, match="lm-eval"):
        served.loglikelihood([])
    with pytest.raises(adapter.AdapterError, match="several rounds"):
        served.generate_until_multi_round([])
    with pytest.raises(adapter.AdapterError, match="parts of videos"):
        adapter._asked("x", [{"url": "a.mp4", "video_start": 1}])
