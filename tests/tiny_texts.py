"""A tokenizer of single bytes and a tiny model that goes with it, for tests that need text."""

from pathlib import Path

from tiny_models import make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """<pad> is 0, <s> 1, </s> 2; every byte is a token."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    out.chat_template = CHAT if chat else None
    return out


def saved_model(folder: Path, chat: bool = False, **changes) -> Path:
    """A folder with a tiny model and the byte tokenizer; the model speaks 259 tokens."""
    settings = dict(vocab_size=259, eos_token_id=2, max_position_embeddings=4096) | changes
    make("qwen3", **settings).save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    return folder
