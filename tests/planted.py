"""A very small model that solves a recall task with one attention head: all others are cut off from the output."""

from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bitsandheads.tasks import Sample

VOCABULARY = ["<pad>", "<eos>", "!", "?", *"abcd", *"uvwxyz"]
HEAD = (1, 0)  # layer, KV head
SINK, RECENT = 1, 4


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<pad>|<eos>|."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def problems(n: int, seed: int) -> list[Sample]:
    """`!` filler, the answer among it, filler, `?`: the answer is out of reach of the window and of the sink."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        before, after, answer = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 4), (6, 10), (0, 4)))
        filler = "".join("uvwxyz"[j] for j in torch.randint(0, 6, (before + after,), generator=draw))
        out.append(Sample(str(i), f"!{filler[:before]}{'abcd'[answer]}{filler[before:]}?", "abcd"[answer]))
    return out


def score(sample: Sample, output: str) -> float:
    return float(output == sample.answer)


@cache
def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = _model()
    tok = tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    cut = torch.zeros(2, 64)
    cut[HEAD[0], 32 * HEAD[1] : 32 * (HEAD[1] + 1)] = 1  # 2 query heads of 16 for each KV head
    for step in range(160):
        batch = problems(48, 1000 + step)
        enc = tok([p.prompt + p.answer + "<eos>" for p in batch], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            for layer, keep in zip(model.model.layers, cut, strict=True):
                layer.self_attn.o_proj.weight.mul_(keep)
        labels = enc["input_ids"].clone()
        labels[:, :-2] = -100
        loss = model(**{k: enc[k] for k in ("input_ids", "attention_mask")}, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for layer, keep in zip(model.model.layers, cut, strict=True):
            layer.self_attn.o_proj.weight.mul_(keep)
    return model.state_dict()


def _model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def model() -> Qwen3ForCausalLM:
    """Trained once for each test process, in about three seconds."""
    out = _model()
    out.load_state_dict(_weights())
    return out.eval()
