"""Ask a model about videos, images and text through its own processor, with a compressed cache.

from bitsandheads import video
model, processor = video.load("llava-hf/llava-onevision-qwen2-7b-ov-hf")
session = video.Session(model, processor, plan="vidkv-1.5/1.66")
answer = session.ask("What happens in this clip?", videos=["clip.mp4"])
print(answer.text, answer.bits_per_element)
print(session.ask("What comes first?").text)
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import models
from .errors import BitsAndHeadsError, ModelMismatchError, PlanError
from .plan import CachePlan
from .seam import CompressedCache, enabled

FRAMES = 32  # of a clip, spread evenly; LLaVA-OneVision's own number
INSTALL = "Run `pip install 'bitsandheads[video]'`"


class VideoFileError(BitsAndHeadsError, ValueError):
    """A video or image file that cannot be read."""


class VideoReaderError(BitsAndHeadsError, ImportError):
    """No library that can read videos, or not the one that was asked for; or a processor whose libraries are missing."""


# -- frames -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: uint8 [T, 3, H, W], RGB.
        indices: which frames of the file they are.
        total: frames of the file. fps: its frames in a second (0: unknown).
        reader: "torchcodec" or "pyav", or "memory" for frames that were given.
        note: why another reader was not used, or "".
    """

    frames: Tensor
    indices: tuple[int, ...]
    total: int
    fps: float
    reader: str
    note: str = ""

    def metadata(self) -> dict[str, Any]:
        """What processors of transformers want to know of a clip."""
        height, width = self.frames.shape[2:]
        rate = self.fps or 24.0
        return {
            "total_num_frames": self.total,
            "fps": rate,
            "duration": self.total / rate,
            "frames_indices": list(self.indices),
            "height": height,
            "width": width,
            "video_backend": self.reader,
        }


def spread(total: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly over 0 .. total - 1, both ends among them; all of them if there are fewer."""
    if count >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _by_torchcodec(path: Path, count: int) -> Clip:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), seek_mode="exact")
    total = int(decoder.metadata.num_frames or 0)
    wanted = spread(total, count)
    return Clip(decoder.get_frames_at(indices=wanted).data, tuple(wanted), total, float(decoder.metadata.average_fps or 0), "torchcodec")


def _by_pyav(path: Path, count: int) -> Clip:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        total, fps = stream.frames, float(stream.average_rate or 0)
        total = total or sum(1 for _ in container.decode(stream))  # some containers do not say how many frames they hold
    wanted = spread(total, count)
    found = {}
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(container.streams.video[0])):
            if i in wanted:
                found[i] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    if len(found) < len(wanted):
        raise VideoFileError(
            f"{path} says that it holds {total} frames, but frame {wanted[len(found)]} cannot be decoded: it is cut short."
        )
    return Clip(torch.stack([found[i] for i in wanted]), tuple(wanted), total, fps, "pyav")


READERS: dict[str, Callable[[Path, int], Clip]] = {"torchcodec": _by_torchcodec, "pyav": _by_pyav}


def _missing(reader: str) -> str:
    """Why a reader cannot be used here; "" if it can."""
    try:
        if reader == "torchcodec":
            import torchcodec.decoders

            if getattr(torchcodec, "ffmpeg_major_version", 0) is None:  # newer releases import without FFmpeg and fail at the first file
                raise RuntimeError("FFmpeg's libraries are not found")
        else:
            import av  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # older torchcodec without FFmpeg: RuntimeError
        return f"{reader} cannot be loaded ({str(error).strip().splitlines()[0]})"
    return ""


def read_video(path: str | Path, frames: int = FRAMES, reader: str = "auto") -> Clip:
    """Frames of a video file, spread evenly over it.

    Args:
        frames: how many; all if the file holds fewer.
        reader: "torchcodec", "pyav", or "auto": torchcodec where it can be loaded, else PyAV, and `Clip.note` says why.
    Raises:
        VideoFileError: the file is missing, no video, or damaged.
        VideoReaderError: the reader is not installed, or neither is.
    """
    path = Path(path)
    if reader not in ("auto", *READERS):
        raise VideoReaderError(f"reader is {reader!r}; allowed are 'auto', {', '.join(map(repr, READERS))}.")
    if frames < 1:
        raise VideoFileError(f"frames is {frames}; ask for at least 1.")
    if not path.is_file():
        raise VideoFileError(f"There is no file {path}. Give the path of a video file.")
    notes = []
    for name in READERS if reader == "auto" else (reader,):
        if why := _missing(name):
            notes.append(why)
            continue
        try:
            clip = READERS[name](path, frames)
        except VideoFileError:
            raise
        except Exception as error:  # each library has errors of its own for a file that it cannot decode
            raise VideoFileError(f"{path} cannot be read as a video by {name}: {error}. Give a whole video file.") from error
        return Clip(clip.frames, clip.indices, clip.total, clip.fps, clip.reader, "; ".join(notes))
    raise VideoReaderError(f"No reader for videos: {'; '.join(notes)}. {INSTALL}.")


def read_image(path: str | Path) -> Any:
    """A PIL image in RGB. Raises VideoFileError."""
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise VideoFileError(f"{path} cannot be read as an image: {error}.") from error


# -- models -------------------------------------------------------------------------------------------------------------------


def load(name: str, device: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode and its processor; for a model without images its tokenizer.

    Args:
        name: a local folder, a hub name, or "smollm2".
        device: as in `models.load`.
    Raises:
        ModelNotFoundError: nothing of that name can be loaded.
        VideoReaderError: the processor needs a library that is not installed.
    """
    import transformers

    config = models.load_config(name)
    if not hasattr(config, "vision_config"):
        return models.load(name, device)
    device = models.device_for(device)
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except ImportError as error:
        raise VideoReaderError(
            f"The processor of {name!r} needs a library that is missing: {' '.join(str(error).split())} {INSTALL}."
        ) from error
    except (OSError, *models.UNREADABLE) as error:
        raise models.ModelNotFoundError(f"The model {name!r} is incomplete: {error}.") from error
    return model.to(device).eval(), processor


# -- answers ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        frames, images: that this turn brought. visual_tokens: placeholders for them in the prompt.
        prompt_tokens: of this turn. new_tokens: generated.
        cache_tokens, cache_bytes, bits_per_element: of the whole cache after the answer, everything included.
        full_bytes: what the same tokens take in bfloat16.
        first_token_seconds: from the start of generation (vision included) to the first token; processor and reader not included.
        tokens_per_second: of the further tokens; None with one token.
    """

    text: str
    plan: str
    frames: int
    images: int
    visual_tokens: int
    prompt_tokens: int
    new_tokens: int
    cache_tokens: int
    cache_bytes: int
    full_bytes: int
    bits_per_element: float
    first_token_seconds: float
    tokens_per_second: float | None
    notes: tuple[str, ...] = ()


class _Watch:
    """A streamer of transformers that only notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Session:
    """Turns of questions and answers over one compressed cache. Videos and images belong to the first turn.

    Args:
        model, processor: see `load`; a tokenizer with a chat template serves for a text model.
        plan, backend, dtype: see CompressedCache; tokens that the plan keeps whole are bfloat16 also where a CPU computes in float32.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        plan: str | CachePlan = "balanced",
        backend: str = "auto",
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        self.model, self.processor = model, processor
        self.cache = CompressedCache(plan, model, backend=backend, dtype=dtype)
        self.messages: list[dict[str, Any]] = []
        self.text = ""  # what the ids stand for, without the last answer
        self.ids: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        if not getattr(processor, "chat_template", None):
            raise ModelMismatchError(
                f"{type(processor).__name__} has no chat template, so turns cannot be written. Use a chat or instruct model."
            )

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def ask(
        self,
        prompt: str,
        videos: Sequence[str | Path | Tensor | Clip] = (),
        images: Sequence[Any] = (),
        frames: int = FRAMES,
        reader: str = "auto",
        max_new_tokens: int = 128,
        packed_question: bool = False,
        **settings: Any,
    ) -> Answer:
        """The model's answer, greedy unless the settings say otherwise; the cache keeps the turn.

        Args:
            videos: files, clips, or frames uint8 [T, 3, H, W]. images: files or PIL images.
            frames, reader: see `read_video`.
            packed_question: read and pack everything up to the last visual token first, so that the question, too, sees the clip only
                through the packed cache. Otherwise the prompt is read as one, and an answer of one token never meets packed tokens.
            settings: of `model.generate`, such as do_sample and temperature.
        Raises:
            PlanError: videos or images after the first turn, or for a text model.
            VideoFileError, VideoReaderError: see `read_video`.
        """
        if (videos or images) and (self.ids is not None or self.processor is self.tokenizer):
            why = "this model reads text only" if self.processor is self.tokenizer else "this is a later one; start a new Session"
            raise PlanError(f"Videos and images belong to the first turn of a model that can see; {why}.")
        clips = [_clip(v, frames, reader) for v in videos]
        pictures = [read_image(i) if isinstance(i, str | Path) else i for i in images]
        inputs = self.prepare(prompt, clips, pictures)
        known = 0 if self.ids is None else self.ids.shape[1]
        length = inputs["input_ids"].shape[1]
        watch = _Watch()
        started = time.perf_counter()
        with enabled(self.model):
            if packed_question:
                inputs = self._pack_first(inputs)
            out = self.model.generate(
                **inputs,
                **({"do_sample": False, "pad_token_id": self._pad()} | settings),
                past_key_values=self.cache,
                max_new_tokens=max_new_tokens,
                streamer=watch,
            )
        self.ids = out.cpu()
        new = self.ids[0, length:]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}] if self.sees else text})
        times = watch.times[1:]  # the first call brings the prompt
        tokens = self.cache.get_seq_length()
        each = sum(2 * s.kv_heads * s.head_dim * 2 for s in self.cache.resolved.shapes if s.compressed)
        return Answer(
            text=text,
            plan=self.cache.plan.name,
            frames=sum(len(c.frames) for c in clips),
            images=len(pictures),
            visual_tokens=int(self._visual_mask(inputs["input_ids"][:, known:]).sum()),
            prompt_tokens=length - known,
            new_tokens=len(new),
            cache_tokens=tokens,
            cache_bytes=self.cache.memory_bytes(),
            full_bytes=tokens * each,
            bits_per_element=self.cache.bits_per_element(),
            first_token_seconds=times[0] - started,
            tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            notes=tuple(f"{c.reader}: {c.note}" for c in clips if c.note),
        )

    @torch.no_grad()
    def _pack_first(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the model everything up to the last visual token; returns what is left for `generate`."""
        ids = inputs["input_ids"]
        places = self._visual_mask(ids)[0].nonzero()
        cut = int(places[-1]) + 1 if len(places) else 0
        if cut > self.cache.get_seq_length():
            first = {k: v[:, :cut] if v.ndim == 2 and v.shape[1] == ids.shape[1] else v for k, v in inputs.items()}
            self.model(**first, past_key_values=self.cache)
        return {k: v for k, v in inputs.items() if not k.startswith("pixel_values")}

    @property
    def sees(self) -> bool:
        """Whether the model takes images or videos."""
        return self.processor is not self.tokenizer

    def _pad(self) -> int | None:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def _visual_mask(self, ids: Tensor) -> Tensor:
        kinds = [getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return torch.isin(ids, torch.tensor([k for k in kinds if k is not None], dtype=ids.dtype, device=ids.device))

    def prepare(self, prompt: str, clips: Sequence[Clip] = (), pictures: Sequence[Any] = ()) -> dict[str, Tensor]:
        """Begin a turn: the arguments of the model, input_ids int64 [1, tokens of all turns] and, as the processor makes them, this turn's pixels."""
        content: Any = [{"type": "video"} for _ in clips] + [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
        self.messages.append({"role": "user", "content": content if self.sees else prompt})
        whole = self.processor.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        if self.ids is None:
            inputs = dict(self._process(whole, clips, pictures))
            self.kept = {k: v for k, v in inputs.items() if not k.startswith("pixel_values") and k != "input_ids"}
        else:
            more = self.tokenizer(self._since_answer(whole), add_special_tokens=False, return_tensors="pt").input_ids
            ids = torch.cat([self.ids, more], 1)
            inputs = {k: _extended(k, v, ids.shape[1]) for k, v in self.kept.items()} | {"input_ids": ids}
        self.text = whole
        device, dtype = self.model.device, self.model.dtype
        return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items() if isinstance(v, Tensor)}

    def _process(self, text: str, clips: Sequence[Clip], pictures: Sequence[Any]) -> Any:
        if not self.sees:
            return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        media: dict[str, Any] = {}
        if pictures:
            media["images"] = list(pictures)
        if clips:
            media["videos"] = [c.frames for c in clips]
            media["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [c.metadata() for c in clips]}
        return self.processor(text=[text], return_tensors="pt", **media)

    def _since_answer(self, whole: str) -> str:
        """The text of all turns after what the ids hold already."""
        answer = self.messages[-2]["content"]
        answer = answer[0]["text"] if self.sees else answer
        rest = whole.removeprefix(self.text)
        if rest == whole or not rest.lstrip().startswith(answer.strip()):
            raise ModelMismatchError(
                "This model's chat template rewrites earlier turns, so a cache cannot be continued. Start a new Session."
            )
        rest = rest[rest.index(answer.strip()) + len(answer.strip()) :] if answer.strip() else rest
        assert self.ids is not None
        last = self.tokenizer.decode(self.ids[0, -1:])
        return rest.lstrip()[len(last) :] if int(self.ids[0, -1]) in self._ends() and rest.lstrip().startswith(last) else rest

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _extended(name: str, value: Tensor, length: int) -> Tensor:
    """Tensors with one entry for each token grow with the turns: as real text."""
    if name not in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        return value
    fill = 1 if name == "attention_mask" else 0
    return torch.cat([value, value.new_full((1, length - value.shape[1]), fill)], 1)


def _clip(video: str | Path | Tensor | Clip, frames: int, reader: str) -> Clip:
    if isinstance(video, Clip):
        return video
    if isinstance(video, str | Path):
        return read_video(video, frames, reader)
    if video.ndim != 4 or video.shape[1] != 3 or video.dtype != torch.uint8:
        raise VideoFileError(f"Frames have shape {list(video.shape)} and dtype {video.dtype}; give uint8 [T, 3, height, width].")
    chosen = spread(len(video), frames)
    return Clip(video[chosen], tuple(chosen), len(video), 0.0, "memory")
