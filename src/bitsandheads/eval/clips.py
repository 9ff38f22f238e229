"""Questions about generated clips as a task of the runner, for the tiny video model.

A one-word answer is decided by the first new token, and that token comes from the prompt, which a model reads in full precision. So the
clip is packed first, together with a first turn (another question and its answer), and only then the question that counts is read: it
and its answer attend to the packed clip.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..seam import CompressedCache, enabled
from ..tasks import video
from .tasks import Task


def pixels(frames: Tensor) -> Tensor:
    """Frames uint8 [..., 3, SIZE, SIZE] -> what the tiny model's processor makes of them: float32 of the same shape, -1 to 1."""
    return (frames.float() / 255 - 0.5) / 0.5


def video_tokens(config: Any, frames: int) -> int:
    """Tokens of a clip in a LLaVA-OneVision: patches after 2 x 2 pooling, and the newline."""
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    return frames * side * side + 1


def halve(frames: Tensor) -> Tensor:
    """LLaVA-OneVision's pooling of a frame: patches of an even square, halved along both axes, by mean: [N, side * side, C] to [N, side * side / 4, C].

    The same values as the class's bilinear `interpolate`, whose kernel gives all channels of all frames to one thread for each
    pixel: 106 of the 147 ms of a training step on an H100. Takes its place as `model.model.apply_pooling`.
    """
    n, places, channels = frames.shape
    side = math.isqrt(places)
    return frames.view(n, side // 2, 2, side // 2, 2, channels).mean((2, 4)).flatten(1, 2)


def left_padded(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """ids and mask [B, longest] of texts, padded on the left."""
    out = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    return out.input_ids, out.attention_mask


def encode(config: Any, tokenizer: Any, samples: Sequence[video.VideoSample], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`<user> clip question <assistant> answer <end> | <user> question <assistant>`, with padding after the clip and after the bar.

    Returns:
        input_ids and attention_mask int64 [B, N] on the CPU, pixel_values_videos float32 [B, T, 3, SIZE, SIZE] on `device`.
    """
    first, first_mask = left_padded(tokenizer, [f"{q} <assistant> {a} <end>" for q, a in (s.before for s in samples)])
    last, last_mask = left_padded(tokenizer, [f"<user> {s.prompt} <assistant>" for s in samples])
    user = torch.full((len(samples), 1), tokenizer.convert_tokens_to_ids("<user>"))
    clip = torch.full((len(samples), video_tokens(config, samples[0].clip[1])), config.video_token_id)
    parts = (user, clip, first, last)
    masks = (torch.ones_like(user), torch.ones_like(clip), first_mask, last_mask)
    frames = pixels(video.frames_of(samples, device))
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1), "pixel_values_videos": frames}


def same_as_before(*rows: Tensor) -> Tensor:
    """Which rows of tensors [B, ...] repeat the row before them in all of these tensors: bool [B]."""
    out = torch.ones(len(rows[0]), dtype=torch.bool, device=rows[0].device)
    out[0] = False
    for x in rows:
        out[1:] &= (x[1:] == x[:-1]).flatten(1).all(1)
    return out


def ask_packed(model: Any, inputs: Mapping[str, Tensor], cache: Any, config: Any) -> Tensor:
    """The runner's `generate`: reads everything up to the last `<end>` of the prompt, which packs it, and then asks.

    Questions in a row about the same clip and first turn share one reading of them: what is packed is then repeated for each.
    A plan that protects tokens by given scores gets random ones for the clip's tokens.

    Args:
        inputs: see `encode`.
        cache: an empty cache of transformers or of ours.
        config: a GenerationConfig.
    Returns:
        int64 [B, N + new tokens]: prompts and answers.
    """
    ids, mask, frames = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values_videos"]
    ends = (ids == model.generation_config.eos_token_id).nonzero()[:, 1]
    cut = int(ends.max()) + 1
    fresh = ~same_as_before(ids[:, :cut], mask[:, :cut], frames)
    first, first_mask = ids[fresh, :cut], mask[fresh, :cut]
    if isinstance(cache, CompressedCache) and any(layer.scored_by == "given" for layer in cache.compressed_layers()):
        chance = torch.rand(first.shape, device=ids.device)
        cache.set_token_scores(chance.masked_fill(first != model.config.video_token_id, -1.0))
    with enabled(model):
        model(
            input_ids=first,
            attention_mask=first_mask,
            position_ids=(first_mask.cumsum(1) - 1).clamp(min=0),
            pixel_values_videos=frames[fresh].to(model.dtype),
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_select_indices(fresh.cumsum(0) - 1)
        return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config)


def clip_task(config: Any, samples: Sequence[video.VideoSample], device: torch.device | str = "cpu") -> Task:
    """The task of these samples for a tiny video model with this configuration; run it with `generate=ask_packed`.

    device: where clips are rendered.
    """
    return Task(
        "clips",
        samples,
        video.score,
        max_new_tokens=3,
        encode=lambda tokenizer, some: encode(config, tokenizer, some, device),  # type: ignore[arg-type]
    )
