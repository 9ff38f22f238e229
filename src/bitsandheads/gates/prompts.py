"""From problems to prompt tokens, the same for training, curriculum and distillation."""

from typing import Any

from ..errors import CacheStateError, TaskError
from ..tasks import Sample
from .rollout import RolloutEngine


def message(sample: Sample, chat: bool) -> Any:
    """A problem's prompt as TRL and the tokenizers take it: a text, or a conversation."""
    return [{"role": "user", "content": sample.prompt}] if chat else sample.prompt


def encode(tokenizer: Any, sample: Sample, chat: bool) -> list[int]:
    """Prompt tokens, the same that training uses. TaskError where there is no chat template to use."""
    if chat and not tokenizer.chat_template:
        raise TaskError("The tokenizer has no chat template, so prompts cannot be put into one. Ask for none (--no-chat, chat: false).")
    if chat:
        return tokenizer.apply_chat_template(message(sample, True), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    return tokenizer(text=sample.prompt)["input_ids"]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an output, the model's and the tokenizer's. CacheStateError where there is none."""
    ids = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not found:
        raise CacheStateError("Neither the model nor its tokenizer names a token that ends an output; set eos_token_id.")
    return sorted(found)


def make_engine(model: Any, tokenizer: Any, batch: int) -> RolloutEngine:
    """A rollout engine with the model's end tokens and a pad token."""
    eos = end_tokens(model, tokenizer)
    return RolloutEngine(model, batch, eos, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0])
