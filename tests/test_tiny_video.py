"""The kept weights of the tiny video model answer questions about held-out clips, through packed caches too, and need the clip for it; the demo shows it."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_tiny_video_training import tv
from transformers import AutoModelForImageTextToText, AutoTokenizer

import bitsandheads as bh
from bitsandheads import demo_video
from bitsandheads import video as sessions
from bitsandheads.eval.clips import ask_packed, clip_task
from bitsandheads.eval.runner import generate_records, plan_cache
from bitsandheads.tasks import video

QUESTIONS = 24


@pytest.fixture(scope="module")
def tiny():
    model = AutoModelForImageTextToText.from_pretrained(demo_video.MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(demo_video.MODEL)


def right(tiny, plan: bh.CachePlan, start: int = 1 << 20) -> int:
    """Right answers to QUESTIONS questions about three clips that no other evaluation asks about."""
    model, tokenizer = tiny
    samples = list(video.samples(QUESTIONS, "test", 32, start=start))
    found = generate_records(
        model, tokenizer, clip_task(model.config, samples), plan_cache(plan), plan=plan.name, batch_size=QUESTIONS, generate=ask_packed
    )
    return int(sum(r.score for part in found for r in part))


def test_files_are_small_and_belong_together(tiny) -> None:
    model, tokenizer = tiny
    assert sum(f.stat().st_size for f in demo_video.MODEL.iterdir()) <= 16e6
    assert model.config.to_dict()["text_config"]["num_hidden_layers"] == tv.CONFIGS["base"].layers
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tv.vocabulary()))] == tv.vocabulary()
    first, *_, last = map(json.loads, (demo_video.MODEL / "train.jsonl").read_text().splitlines())
    assert first["weights"] == sum(p.numel() for p in model.parameters()) and last["frames"] == 32
    result = json.loads((demo_video.MODEL / "evaluation.json").read_text())
    assert result["accuracy"] >= 0.9 and result["questions"] >= 1500


def test_it_answers_about_packed_clips_and_needs_them(tiny) -> None:
    windowed = bh.CachePlan("windowed", (bh.HeadGroup(window=bh.Window(4, 64)),))
    assert right(tiny, bh.get_plan("bf16")) >= 22
    assert right(tiny, bh.get_plan("balanced")) >= 21
    assert right(tiny, windowed) <= 18  # the last two frames and the words alone


def test_questions_about_one_clip_share_its_packing(tiny) -> None:
    """Answers and bytes are those of questions asked one at a time."""
    model, tokenizer = tiny
    task = clip_task(model.config, list(video.samples(4, "test", 32, per_clip=2)))
    found = [
        [
            (r.id, r.output, r.cache_bytes)
            for part in generate_records(
                model, tokenizer, task, plan_cache("vidkv-1.5/1.66-stp"), plan="p", batch_size=size, generate=ask_packed
            )
            for r in part
        ]
        for size in (4, 1)
    ]
    assert found[0] == found[1]


def test_its_own_processor(tiny) -> None:
    """The folder loads as any other model does; the processor's clip is answered like the encoded one."""
    pytest.importorskip("torchvision")
    model, processor = sessions.load(str(demo_video.MODEL), "cpu")
    samples = list(video.samples(4, "test", 32))
    hits = 0
    for s in samples:
        session = sessions.Session(model, processor, plan="balanced")
        answer = session.ask(s.prompt, videos=[video.frames_of([s])[0]], packed_question=True, max_new_tokens=3)
        assert answer.visual_tokens == 32 * 36 + 1
        hits += video.score(s, answer.text)
    assert hits >= 3


def test_the_example_reads_a_real_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """examples/tiny_video_clip.py: an mp4 that it encodes, and eight turns about it."""
    pytest.importorskip("torchvision")
    pytest.importorskip("av")
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parents[1] / "examples" / "tiny_video_clip.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["tiny_video_clip.py", "--file", str(tmp_path / "clip.mp4"), "--readers", "pyav"])
    assert example.main() >= 7


def test_the_demo_asks_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_video, "QUESTIONS", 8)
    monkeypatch.setattr(demo_video, "PLANS", ("bf16", "extreme"))
    out = io.StringIO()
    data = demo_video.run(Console(file=out, width=140, force_terminal=True, color_system="truecolor"))
    assert data is not None and data["visual_tokens"] == 1153
    bits = {r["plan"]: r["bits_per_element"] for r in data["rows"]}
    assert bits["extreme"] < 5 < bits["bf16"] == 16 and all(r["n"] == 8 for r in data["rows"])
    assert "▀" in out.getvalue() and "8 questions about 1 clips" in out.getvalue()
    out = io.StringIO()
    assert demo_video.run(Console(file=out), tmp_path / "nothing") is None and "No video part" in out.getvalue()
