"""Reading video files and asking about them, with real encoded files and transformers' own processors where their libraries are installed."""

import importlib
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_models as tm
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import bitsandheads as bh
from bitsandheads import video
from bitsandheads.cli import main

av = pytest.importorskip("av")


def works(name: str) -> bool:
    """Whether a library is installed and its shared libraries load."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):
        return False
    return True


READERS = [
    "pyav",
    pytest.param(
        "torchcodec", marks=pytest.mark.skipif(bool(video._missing("torchcodec")), reason="torchcodec or FFmpeg is not installed")
    ),
]
needs_torchvision = pytest.mark.skipif(not works("torchvision"), reason="transformers' video processors need torchvision")


def write_mp4(path: Path, frames: torch.Tensor, codec: str = "libx264rgb") -> None:
    """Encode frames uint8 [T, 3, H, W] without loss, 5 in a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height = frames.shape[3], frames.shape[2]
        stream.pix_fmt, stream.options = "rgb24", {"crf": "0", "qp": "0"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A file and the frames in it."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (23, 3, 32, 48), dtype=torch.uint8, generator=random)
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_mp4(path, frames)
    return path, frames


# -- readers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("count", [1, 2, 7, 23, 99])
def test_readers_give_the_frames_that_were_written(reader: str, count: int, clip: tuple[Path, torch.Tensor]) -> None:
    path, frames = clip
    got = video.read_video(path, count, reader)
    assert (got.reader, got.total, got.fps, got.note) == (reader, 23, 5.0, "")
    assert list(got.indices) == video.spread(23, count)
    assert got.frames.dtype is torch.uint8 and got.frames.shape == (min(count, 23), 3, 32, 48)
    assert (got.frames.int() - frames[list(got.indices)].int()).abs().max() <= 2


def test_frames_are_spread_evenly() -> None:
    assert video.spread(10, 4) == [0, 3, 6, 9]
    assert video.spread(3, 8) == [0, 1, 2]
    assert video.spread(9, 1) == [0]
    for total in (2, 31, 1000):
        for count in range(2, min(total, 40)):
            got = video.spread(total, count)
            assert got[0] == 0 and got[-1] == total - 1 and len(set(got)) == count
            gaps = [b - a for a, b in itertools.pairwise(got)]
            assert max(gaps) - min(gaps) <= 1


def test_fallback_says_why(clip: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    got = video.read_video(clip[0], 4)
    assert got.reader == "pyav" and "torchcodec cannot be loaded" in got.note
    with pytest.raises(video.VideoReaderError, match=r"torchcodec cannot be loaded.*bitsandheads\[video\]"):
        video.read_video(clip[0], 4, "torchcodec")
    decoders = types.ModuleType("torchcodec.decoders")
    without_ffmpeg = types.ModuleType("torchcodec")
    without_ffmpeg.__dict__.update(decoders=decoders, ffmpeg_major_version=None)
    monkeypatch.setitem(sys.modules, "torchcodec", without_ffmpeg)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    got = video.read_video(clip[0], 4)
    assert got.reader == "pyav" and got.note == "torchcodec cannot be loaded (FFmpeg's libraries are not found)"
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(video.VideoReaderError, match=r"torchcodec cannot be loaded.*pyav cannot be loaded"):
        video.read_video(clip[0], 4)


@pytest.mark.parametrize("reader", READERS)
def test_bad_files(reader: str, clip: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(video.VideoFileError, match=r"There is no file .*gone\.mp4"):
        video.read_video(tmp_path / "gone.mp4", 4, reader)
    (tmp_path / "text.mp4").write_text("not a video at all")
    with pytest.raises(video.VideoFileError, match=r"text\.mp4 cannot be read as a video"):
        video.read_video(tmp_path / "text.mp4", 4, reader)
    (tmp_path / "half.mp4").write_bytes(clip[0].read_bytes()[: clip[0].stat().st_size // 2])
    with pytest.raises(video.VideoFileError, match=r"half\.mp4"):
        video.read_video(tmp_path / "half.mp4", 4, reader)
    with pytest.raises(video.VideoFileError, match="frames is 0"):
        video.read_video(clip[0], 0, reader)


def test_unknown_reader(clip: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(video.VideoReaderError, match=r"'decord'.*'auto', 'torchcodec', 'pyav'"):
        video.read_video(clip[0], 4, "decord")


def test_container_that_does_not_count_its_frames(tmp_path: Path, clip: tuple[Path, torch.Tensor]) -> None:
    path = tmp_path / "clip.mkv"
    write_mp4(path, clip[1])
    assert av.open(str(path)).streams.video[0].frames == 0
    got = video.read_video(path, 5, "pyav")
    assert got.total == 23 and len(got.frames) == 5


def test_bad_image(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(video.VideoFileError, match=r"x\.png cannot be read as an image"):
        video.read_image(tmp_path / "x.png")


# -- sessions --------------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }} {% else %}{% for c in m.content %}"
    "{{ 'VIDEO ' if c.type == 'video' else 'IMAGE ' if c.type == 'image' else c.text + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{{ '<assistant> ' if add_generation_prompt else '' }}"
)
SPECIAL = {90: "<image>", 91: "<video>", 92: "<start>", 93: "<end>"}


def tokenizer(names: dict[int, str]) -> transformers.PreTrainedTokenizerFast:
    """96 words, the special ones at the places that the tiny models know."""
    words = {0: "<pad>", 1: "<unk>", 2: "<user>", 3: "<assistant>", **names}
    vocabulary = {words.get(i, f"w{i}"): i for i in range(96)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=[*names.values(), "<user>", "<assistant>"]
    )
    return out


class PlainProcessor:
    """Does for tiny LLaVA-OneVision models what transformers' processor does, without torchvision: 28 x 28 pixels, 1 token a frame."""

    def __init__(self) -> None:
        self.tokenizer, self.chat_template = tokenizer(SPECIAL), CHAT

    def apply_chat_template(self, messages, **kwargs):
        return self.tokenizer.apply_chat_template(messages, chat_template=CHAT, **kwargs)

    def __call__(self, text, return_tensors, videos=(), videos_kwargs=None):
        (words,) = text
        for clip in videos:
            words = words.replace("VIDEO", "<video> " * (len(clip) + 1), 1)
        out = dict(self.tokenizer(words, return_tensors=return_tensors, add_special_tokens=False))
        if videos:
            out["pixel_values_videos"] = torch.stack(list(videos))[..., :28, :28].float() / 127.5 - 1
        return out


def session(plan: "str | bh.CachePlan" = "bf16", name: str = "llava-onevision") -> video.Session:
    model = tm.make(name)
    model.generation_config.suppress_tokens = list(SPECIAL)
    return video.Session(model, PlainProcessor(), plan)


def test_answer_and_its_figures(clip: tuple[Path, torch.Tensor]) -> None:
    asked = session("kivi-2")
    answer = asked.ask("w10 w11 w12", [clip[0], clip[1]], frames=16, max_new_tokens=6, reader="pyav")
    assert (answer.frames, answer.images, answer.visual_tokens, answer.new_tokens) == (32, 0, 34, 6)
    assert answer.prompt_tokens == 34 + 3 + 2 and answer.cache_tokens == 34 + 5 + 5
    assert answer.cache_bytes == asked.cache.memory_bytes() and answer.plan == "kivi-2"
    assert answer.full_bytes == 44 * 2 * 2 * 64 * 2 * 2  # tokens, keys and values, heads, head_dim, layers, bytes
    assert answer.bits_per_element == pytest.approx(16 * answer.cache_bytes / answer.full_bytes)
    assert answer.first_token_seconds > 0 and answer.tokens_per_second > 0
    assert answer.text.split() and all(w.startswith("w") for w in answer.text.split())


def test_turns_equal_one_conversation_with_dynamic_cache(clip: tuple[Path, torch.Tensor]) -> None:
    """Two turns through a session give the tokens of the model's own cache over the same ids."""
    asked = session(bh.CachePlan("bf16"))
    asked.cache = bh.CompressedCache("bf16", asked.model)  # whole tokens in the model's dtype: bit for bit
    first = asked.ask("w10 w11", [clip[1]], frames=8, max_new_tokens=4)
    second = asked.ask("w20 w21 w22", max_new_tokens=4)
    assert (second.frames, second.visual_tokens, second.prompt_tokens) == (0, 0, 5)
    ids = asked.ids
    assert ids.shape[1] == first.prompt_tokens + 4 + 5 + 4
    bh.disable(asked.model)
    pixels = clip[1][video.spread(23, 8)][None, ..., :28, :28].float() / 127.5 - 1
    settings = dict(do_sample=False, max_new_tokens=4, pad_token_id=0)
    alone = asked.model.generate(input_ids=ids[:, :-4], attention_mask=torch.ones_like(ids[:, :-4]), pixel_values_videos=pixels, **settings)
    assert torch.equal(alone, ids)


def test_packed_question_reads_the_clip_through_the_cache(clip: tuple[Path, torch.Tensor]) -> None:
    """The first new token then depends on the plan; read as one, it is full precision's."""
    coarse = bh.TensorQuant((bh.AxisClass(1, 1.0, "sign"),))
    quant = bh.KVQuant(coarse, coarse, group_size=16, tile=16, residual=0, sink=0, basis_tokens=16)
    logits = {}
    for packed in (False, True):
        for plan in (bh.CachePlan("coarse", (bh.HeadGroup(quant=quant),)), "bf16"):
            asked = session(plan)
            asked.cache = bh.CompressedCache(plan, asked.model)
            seen = []
            asked.model.lm_head.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o[0, -1]))
            answer = asked.ask("w10 w11", [clip[1]] * 3, frames=23, max_new_tokens=1, packed_question=packed)
            assert answer.prompt_tokens == 3 * 24 + 4 and answer.new_tokens == 1 and answer.visual_tokens == 72
            logits[packed, asked.cache.plan.name] = seen[-1]
    assert torch.equal(logits[False, "coarse"], logits[False, "bf16"])
    torch.testing.assert_close(logits[True, "bf16"], logits[False, "bf16"], atol=1e-4, rtol=1e-4)
    assert (logits[True, "coarse"] - logits[True, "bf16"]).norm() > 0.02 * logits[True, "bf16"].norm()


def test_text_model_with_turns() -> None:
    model = tm.make("llama")
    words = tokenizer(SPECIAL)
    words.chat_template = CHAT
    asked = video.Session(model, words, "kivi-2-sink")
    assert asked.ask("w10 w11", max_new_tokens=3).visual_tokens == 0
    assert asked.ask("w12", max_new_tokens=3).prompt_tokens == 3
    with pytest.raises(bh.PlanError, match="reads text only"):
        asked.ask("w10", videos=[torch.zeros(4, 3, 28, 28, dtype=torch.uint8)])


@pytest.mark.parametrize("last, expected", [(94, "<user> w11 <assistant>"), (20, "<stop> <user> w11 <assistant>")])
def test_an_end_token_is_not_written_twice(last: int, expected: str) -> None:
    """A turn that ended by itself holds its end token already; one that was cut short gets it from the template."""
    asked = session()
    asked.processor.tokenizer = tokenizer(SPECIAL | {94: "<stop>"})
    asked.model.generation_config.eos_token_id = 94
    asked.messages = [
        {"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "w10"), ("assistant", "w20"), ("user", "w11"))
    ]
    asked.text, asked.ids = "<user> w10 <assistant> ", torch.tensor([[2, 10, 3, 20, last]])
    assert asked._since_answer("<user> w10 <assistant> w20 <stop> <user> w11 <assistant> ").split() == expected.split()
    with pytest.raises(bh.ModelMismatchError, match="rewrites earlier turns"):
        asked._since_answer("<user> w10 <assistant> <user> w11 <assistant> ")


def test_bad_requests(clip: tuple[Path, torch.Tensor]) -> None:
    asked = session()
    with pytest.raises(video.VideoFileError, match=r"\[4, 28, 28, 3\].*uint8 \[T, 3, height, width\]"):
        asked.ask("w10", [torch.zeros(4, 28, 28, 3, dtype=torch.uint8)])
    asked = session()
    asked.ask("w10", [clip[1]], frames=4, max_new_tokens=2)
    with pytest.raises(bh.PlanError, match="first turn"):
        asked.ask("w10", [clip[1]])
    bare = PlainProcessor()
    bare.chat_template = None
    with pytest.raises(bh.ModelMismatchError, match="no chat template"):
        video.Session(tm.make("llava-onevision"), bare)


# -- transformers' own processors -----------------------------------------------------------------------------------------------------


def own_processor(name: str):
    half = [0.5, 0.5, 0.5]
    if name == "llava-onevision":
        size = {"height": 28, "width": 28}
        return transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[28, 28]], image_mean=half, image_std=half),
            tokenizer(SPECIAL),
            transformers.LlavaOnevisionVideoProcessor(size=size, image_mean=half, image_std=half),
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=CHAT.replace("VIDEO", "<video>").replace("IMAGE", "<image>"),
        )
    names = {90: "<|image_pad|>", 91: "<|video_pad|>", 92: "<|vision_start|>", 93: "<|vision_end|>"}
    kind = "Qwen2_5_VL" if name == "qwen2.5-vl" else "Qwen3VL"
    videos = "Qwen2VLVideoProcessor" if name == "qwen2.5-vl" else "Qwen3VLVideoProcessor"
    return getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(patch_size=14, merge_size=2),
        tokenizer(names),
        getattr(transformers, videos)(patch_size=14, merge_size=2),
        chat_template=CHAT.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>").replace(
            "IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )


@needs_torchvision
@pytest.mark.parametrize("name", tm.VISION)
@pytest.mark.parametrize("plan", ["bf16", "vidkv-1.5/1.66-stp"])
@pytest.mark.parametrize("packed", [False, True])
def test_session_with_the_models_own_processor(name: str, plan: str, packed: bool, clip: tuple[Path, torch.Tensor]) -> None:
    from PIL import Image

    model = tm.make(name)
    model.generation_config.suppress_tokens = list(SPECIAL)
    asked = video.Session(model, own_processor(name), plan)
    still = Image.new("RGB", (56, 56), (200, 30, 60))
    first = asked.ask("w10 w11", [clip[0], clip[0]], [still], frames=8, reader="pyav", max_new_tokens=3, packed_question=packed)
    assert first.frames == 16 and first.images == 1 and first.visual_tokens >= 12
    second = asked.ask("w12 w13", max_new_tokens=3, packed_question=True)
    assert second.visual_tokens == 0 and second.cache_tokens == asked.ids.shape[1] - 1


@needs_torchvision
def test_command_line(clip: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """A saved model, a real file, two turns, from the shell."""
    tm.make("llava-onevision").save_pretrained(tmp_path / "model")
    own_processor("llava-onevision").save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "bitsandheads", "generate", "--model", str(tmp_path / "model"), "--video", str(clip[0])]
    command += [
        "--prompt",
        "w10 w11",
        "--prompt",
        "w12",
        "--frames",
        "8",
        "--plan",
        "kivi-2",
        "--max-new-tokens",
        "4",
        "--json",
        str(tmp_path / "o.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 frames, 0 images, 9 visual tokens" in done.stdout and "bits per element" in done.stdout
    answers = json.loads((tmp_path / "o.json").read_text())["answers"]
    assert [a["new_tokens"] for a in answers] == [4, 4]


def test_command_line_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys, "argv", ["bitsandheads", "generate", "--model", str(tmp_path), "--prompt", "x", "--video", str(tmp_path / "no.mp4")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("VideoFileError: There is no file")
