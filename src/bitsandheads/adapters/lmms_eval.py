"""lmms-eval with a compressed cache: its image and video tasks, with every plan.

    lmms-eval --model bitsandheads --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,plan=balanced,frames=16 --tasks videomme

lmms-eval finds the model by its entry point. Each question has a cache of its own: the clip and the question are read in full
precision and packed, the answer is decoded from the packed cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from .. import video
from ..errors import BitsAndHeadsError
from ..methods import get_plan

NAME = "bitsandheads"
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")
PASSED_ON = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")  # to model.generate


class AdapterError(BitsAndHeadsError, ValueError):
    """A request or setting that the adapter cannot serve."""


def manifest() -> ModelManifest:
    """What lmms-eval's entry point wants."""
    return ModelManifest(NAME, chat_class_path=f"{__name__}.BitsAndHeadsVLM")


class BitsAndHeadsVLM(lmms):
    """A vision-language model of transformers with a new cache of `plan` for every question.

    Args:
        pretrained: see `video.load`. plan: a preset, a plan file, or a plan with head scores.
        frames, reader: see `video.read_video`. kernels: "auto", "reference", "triton" or "cuda".
        max_new_tokens: where the task does not say.
        packed_question: see `video.Session.ask`. For tasks whose answers are a letter it must be set, or the packed cache is never read.
        batch_size: 1. max_batch_size: not used; lmms-eval hands it over.
    Raises:
        AdapterError: another batch size.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        plan: str = "balanced",
        frames: int = video.FRAMES,
        reader: str = "auto",
        kernels: str = "auto",
        max_new_tokens: int = 1024,
        packed_question: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise AdapterError(f"batch_size is {batch_size}; clips have different lengths and are asked one at a time. Leave it at 1.")
        self.model, self.processor = video.load(pretrained, device)
        self.plan = get_plan(plan, self.model)
        self.frames, self.reader, self.kernels, self.max_new_tokens = int(frames), reader, kernels, int(max_new_tokens)
        self.packed_question = str(packed_question).lower() in ("true", "1")

    def _session(self) -> video.Session:
        return video.Session(self.model, self.processor, self.plan, self.kernels)

    def _question(self, request: Instance) -> tuple[video.Session, dict[str, Any], dict[str, Any]]:
        """A session, the question as arguments of `ask`, and the task's generation settings."""
        _, to_messages, settings, doc, task, split = request.args
        *before, last = to_messages(self.task_dict[task][split][doc])
        if [m["role"] for m in before] not in ([], ["system"]) or last["role"] != "user":
            raise AdapterError(f"The task's messages have the roles {[m['role'] for m in (*before, last)]}; only [system,] user is served.")
        session = self._session()
        session.messages += before
        words = [part["text"] for part in last["content"] if part["type"] == "text"]
        return session, _asked("\n".join(words), [part["url"] for part in last["content"] if part["type"] != "text"]), settings

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request; its end is cut at the task's stop words."""
        out, bits, seconds, tokens = [], [], 0.0, 0
        for request in tqdm(requests, desc=f"answers, {self.plan.name}", disable=self.rank != 0):
            session, question, settings = self._question(request)
            generation = {k: settings[k] for k in PASSED_ON if settings.get(k) is not None}
            if not settings.get("temperature"):
                generation = {k: v for k, v in generation.items() if k in ("num_beams", "repetition_penalty")}
            limit = int(settings.get("max_new_tokens", self.max_new_tokens))
            answer = session.ask(
                **question,
                frames=self.frames,
                reader=self.reader,
                max_new_tokens=limit,
                packed_question=self.packed_question,
                **generation,
            )
            text = answer.text
            for stop in _listed(settings.get("until")):
                text = text.split(stop)[0] if stop else text
            bits.append(answer.bits_per_element)
            tokens += answer.new_tokens
            seconds += answer.first_token_seconds + ((answer.new_tokens - 1) / answer.tokens_per_second if answer.tokens_per_second else 0)
            out.append(GenerationResult(text, TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)))
        mean_bits = sum(bits) / len(bits) if bits else float("nan")
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"bits_per_element": mean_bits})
        return out

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval (0.7.3) turns the pair that this would return into text, so its own scores fail with every model."""
        raise AdapterError(
            "Log-likelihood tasks are not served; lmms-eval's tasks that generate are. For text use the adapter for lm-eval."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: rounds bring new images, and a cache is continued with text only."""
        raise AdapterError("Tasks of several rounds are not served. Ask them through bitsandheads.video.Session.")


def _asked(prompt: str, media: Sequence[Any]) -> dict[str, Any]:
    """Arguments of `Session.ask`: files by their endings, everything else is an image."""
    if odd := [type(m).__name__ for m in media or () if isinstance(m, dict)]:
        raise AdapterError(f"The task brings {odd}: parts of videos. Only whole files and images are served.")
    videos = [m for m in media or () if isinstance(m, str) and Path(m).suffix.lower() not in IMAGES]
    return {"prompt": prompt, "videos": videos, "images": [m for m in media or () if m not in videos]}


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
