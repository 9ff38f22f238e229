"""The tiny video model's trainer: what it trains on is what the model is asked later, and its step is the model's own loss."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import bitsandheads as bh
from bitsandheads.eval.clips import ask_packed, clip_task, encode
from bitsandheads.eval.runner import generate_records, plan_cache
from bitsandheads.tasks import video

SCRIPT = Path(__file__).parents[1] / "training" / "tiny_video.py"
spec = importlib.util.spec_from_file_location("tiny_video", SCRIPT)
assert spec is not None and spec.loader is not None
tv = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tv)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tv.Model(tv.model_config(tv.CONFIGS["test"])).eval()


@pytest.fixture(scope="module")
def batch():
    scenes, asked = tv.Stream(1 << 40, CPU, 128, 6).batch(3, 8)
    return scenes, tv.Encoder(CPU).dialogue(asked), asked


def test_dialogues_say_what_was_asked(batch) -> None:
    _, (ids, target, which), asked = batch
    words = tv.vocabulary()
    for n in range(3):
        turns = " ".join(words[i] for i in ids[n] if words[i] != tv.PAD)
        expected = " ".join(
            f"<user> {video.text(int(asked.template[n, q]), int(asked.a[n, q]), int(asked.b[n, q]))} <assistant> "
            f"{video.ANSWERS[asked.answer[n, q]]} <end>"
            for q in range(6)
            if asked.valid[n, q]
        )
        assert expected.startswith(turns) and len(turns) > 0.7 * len(expected)
        told = [words[t] for t, w in zip(target[n], which[n], strict=True) if t != -100 and w < len(video.TEMPLATES)]
        assert told == [video.ANSWERS[a] for a, ok in zip(asked.answer[n], asked.valid[n], strict=True) if ok][: len(told)] and told
        for place, t in enumerate(target[n]):
            assert t == -100 or t == ids[n, place + 2]


def test_step_is_the_models_own_loss(model, batch) -> None:
    """Clip tokens put in by hand or by the model's forward pass: the same loss, from the layout of the chat template."""
    scenes, (ids, target, _), _ = batch
    step = tv.Step(model, 3, 8, ids.shape[1])
    frames = video.render(scenes)
    for buffer, value in ((step.clips, frames), (step.ids, ids), (step.target, target)):
        buffer.copy_(value)
    step.run()
    clip = torch.full((3, tv.video_tokens(model.config, 8)), model.config.video_token_id)
    whole = torch.cat([ids[:, :1], clip, ids[:, 1:]], 1)
    with torch.no_grad():
        logits = model(input_ids=whole, pixel_values_videos=tv.pixels(frames)).logits[:, clip.shape[1] + 1 : -1]
    assert step.loss.item() == pytest.approx(cross_entropy(logits.flatten(0, 1), target.flatten()).item(), rel=1e-5)
    assert torch.equal(step.hits, logits.argmax(-1) == target)


def test_questions_are_asked_as_they_were_trained(model) -> None:
    """Without padding the ids of the evaluation are those of the chat template, and begin like the trainer's."""
    tok = tv.tokenizer()
    (sample,) = video.samples(1, "test", 8)
    got = encode(model.config, tok, [sample])
    question, answer = sample.before
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [{"type": "text", "text": sample.prompt}]},
    ]
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    n = tv.video_tokens(model.config, 8)
    assert n == 8 * 36 + 1
    expected = tok(text.replace(tv.VIDEO, " ".join([tv.VIDEO] * n)), add_special_tokens=False).input_ids
    assert got["input_ids"][0].tolist() == expected and bool(got["attention_mask"].all())
    assert tok.unk_token_id not in expected


def test_pixels_are_the_processors() -> None:
    pytest.importorskip("torchvision")
    frames = video.frames_of(list(video.samples(1, "test", 8)))
    size, half = {"height": video.SIZE, "width": video.SIZE}, [0.5, 0.5, 0.5]
    processor = tv.transformers.LlavaOnevisionVideoProcessor(size=size, image_mean=half, image_std=half)
    torch.testing.assert_close(processor(list(frames), return_tensors="pt").pixel_values_videos, tv.pixels(frames), atol=1e-5, rtol=0)


def test_patches_get_smooth_places(model) -> None:
    tv.place_patches(model)
    weight = model.model.vision_tower.embeddings.position_embedding.weight.detach().view(12, 12, -1)
    assert float(weight.std()) == pytest.approx(tv.PLACE_STD, rel=0.5)
    near, far = ((weight[:, a] - weight[:, b]).norm(dim=-1).mean() for a, b in ((0, 1), (0, 11)))
    assert 1.2 * near < far


def test_halving_is_the_models_pooling(model) -> None:
    patches = torch.randn(5, 144, 16)
    torch.testing.assert_close(tv.halve(patches), model.model.apply_pooling(patches))


def test_a_short_run(tmp_path: Path) -> None:
    """Two stages on a CPU: log, weights that load, an evaluation."""
    config = replace(tv.CONFIGS["test"], asked=3, stages=((0.5, 8, 2), (0.5, 9, 2)))
    trained = tv.train(config, tmp_path, 0.05, CPU)
    tv.save(trained, tmp_path)
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert first["config"]["stages"] == [[0.5, 8, 2], [0.5, 9, 2]]
    loaded = tv.Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {k for k, v in loaded.state_dict().items() if v.dtype is not torch.bfloat16} == set()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name].to(torch.bfloat16)), name
    result = tv.evaluate(loaded, 4, 8, 4)
    assert result["questions"] == 4 and 0 <= result["accuracy"] <= 1


# -- asking through the packed clip ---------------------------------------------------------------------------------------------


def test_the_runner_asks_about_packed_clips(model) -> None:
    """Records of every plan; the whole plan answers like DynamicCache with the same padding, a packed one has fewer bits."""
    samples = list(video.samples(6, "test", 24, per_clip=3))
    tok = tv.tokenizer()
    task = clip_task(model.config, samples)
    model.generation_config.eos_token_id = tok.convert_tokens_to_ids(tv.END)
    random = bh.KVQuant(
        bh.TensorQuant((bh.AxisClass(2, 1.0, "minmax"),)),
        bh.TensorQuant((bh.AxisClass("ternary", 1.0, "ternary", centre=False),)),
        sink=0,
        salience=bh.Salience(0.3, "given"),
    )
    plans = {p: bh.get_plan(p) for p in ("bf16", "vidkv-1.5/1.66-stp", "balanced")}
    plans["random"] = bh.CachePlan("random", (bh.HeadGroup(quant=random),))
    seen = {}
    for name, plan in plans.items():
        factory = plan_cache(plan)
        records = [r for part in generate_records(model, tok, task, factory, plan=name, batch_size=4, generate=ask_packed) for r in part]
        assert [r.id for r in records] == [s.id for s in samples]
        seen[name] = records
    whole = [
        r
        for part in generate_records(
            model, tok, task, lambda m, b: DynamicCache(config=m.config), plan="own", batch_size=4, generate=own_cache
        )
        for r in part
    ]
    assert [r.output for r in whole] == [r.output for r in seen["bf16"]]
    assert seen["bf16"][0].bits_per_element == 16
    size = {name: records[0].held_bytes / seen["bf16"][0].held_bytes for name, records in seen.items()}
    assert max(size["random"], size["vidkv-1.5/1.66-stp"]) < 0.6 and size["balanced"] < 0.8, size


def own_cache(model, inputs, cache, config):
    """The same prompts in one pass with the model's own cache."""
    return model.generate(**inputs, past_key_values=cache, generation_config=config)
