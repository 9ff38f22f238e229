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
from bitsandheads.eval.runner import generate_records, plan_cache
from bitsandheads.eval.tasks import Task
from bitsandheads.seam import enabled
from bitsandheads.tasks import video as clips

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
TINY = Path(__file__).parents[1] / "models" / "tiny-video"


def local_task(out: Path, rows: list[dict[str, str]]) -> None:
    """A task of lmms-eval with these rows, in a folder of its own; the adapter is made known."""
    out.mkdir(exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / "tasks").mkdir()
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {out / 'rows.jsonl'}}}}}\ntest_split: test\n"
    (out / "tasks" / "local_clips.yaml").write_text(source + GENERATE)
    (out / "tasks" / "utils.py").write_text(UTILS)
    MODEL_REGISTRY_V2.register_manifest(adapter.manifest(), overwrite=True)


def harness(out: Path, model: Path, arguments: str) -> list[dict]:
    """lmms-eval's logged samples, in the order of the rows."""
    got = evaluator.simple_evaluate(
        model="bitsandheads",
        model_args=f"pretrained={model},reader=pyav,{arguments}",
        tasks=["local_clips"],
        batch_size=1,
        device="cpu",
        task_manager=TaskManager(include_path=str(out / "tasks"), include_defaults=False),
        log_samples=True,
    )["samples"]["local_clips"]
    return sorted(got, key=lambda s: s["doc_id"])


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
    local_task(out, rows)
    return out


def test_answers_are_those_of_a_session(folder: Path) -> None:
    got = harness(folder, folder / "model", f"plan={PLAN},frames={FRAMES}")
    model, processor = video.load(str(folder / "model"), "cpu")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, got, strict=True):
        session = video.Session(model, processor, PLAN)
        answer = session.ask(row["question"], [row["clip"]], frames=FRAMES, reader="pyav", max_new_tokens=5)
        assert session.cache.memory().in_use["codes"] > 0 and answer.frames == FRAMES
        assert sample["resps"][0][0] == answer.text


@pytest.mark.parametrize("plan", ["bf16", "vidkv-1.25/1.58"])
def test_answers_and_scores_are_those_of_the_runner(tmp_path: Path, plan: str) -> None:
    """Generated questions about generated clips, in files, each asked after its clip was packed."""
    samples = list(clips.samples(4, "test", per_clip=2))
    for s in samples:
        write_mp4(tmp_path / f"{s.clip[0]}.mp4", clips.frames_of([s])[0])
    local_task(tmp_path, [{"clip": str(tmp_path / f"{s.clip[0]}.mp4"), "question": s.prompt, "answer": s.answer} for s in samples])
    theirs = harness(tmp_path, TINY, f"plan={plan},frames=32,packed_question=True")

    def encode(processor, some):
        (s,) = some
        turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": s.prompt}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        clip = video.Clip(clips.frames_of([s])[0], tuple(range(32)), 32, 5, "memory")
        more = {"do_sample_frames": False, "video_metadata": [clip.metadata()]}
        return dict(processor(text=[text], videos=[clip.frames], videos_kwargs=more, return_tensors="pt"))

    def read_then_ask(model, inputs, cache, config):
        more = {"past_key_values": cache}
        text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        end = int((text["input_ids"][0] == model.config.video_token_id).nonzero()[-1]) + 1
        with enabled(model):
            model(**{k: v[:, :end] for k, v in text.items()}, pixel_values_videos=inputs["pixel_values_videos"], **more)
            return model.generate(**text, **more, generation_config=config)

    model, processor = video.load(str(TINY), "cpu")
    task = Task("clips", samples, lambda s, output: float(output == s.answer), 5, encode=encode)
    found = generate_records(model, processor, task, plan_cache(plan), plan=plan, batch_size=1, generate=read_then_ask)
    ours = {r.id: r for records in found for r in records}
    assert [s["resps"][0][0] for s in theirs] == [ours[s.id].output for s in samples]
    assert [s["exact_match"] for s in theirs] == [ours[s.id].score for s in samples]
    assert sum(r.score for r in ours.values()) >= 3 and all((r.bits_per_element < 5) == (plan != "bf16") for r in ours.values())


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
