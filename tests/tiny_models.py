"""Tiny random models from transformers' own classes, large enough in their weights that a wrong key changes the logits."""

from functools import partial

import torch
import transformers as tf
from transformers import DynamicCache

import bitsandheads as bh

TEXT = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.25,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
VISION_TOKENS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)


def _causal(name: str, head_dim: int = 64, **changes):
    config = getattr(tf, f"{name}Config")(**(TEXT | {"head_dim": head_dim} | changes))
    return getattr(tf, f"{name}ForCausalLM")(config)


def _phi3(head_dim: int = 64, **changes):  # Phi3 has no head_dim of its own
    return _causal("Phi3", head_dim, hidden_size=4 * head_dim, **changes)


def _gemma3(head_dim: int = 64, **changes):
    layers = ["sliding_attention", "full_attention"]
    changes = {"sliding_window": 16, "layer_types": layers, "query_pre_attn_scalar": head_dim} | changes
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**(TEXT | {"head_dim": head_dim} | changes)))


def _mrope(head_dim: int = 64) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8]}


def _llava_onevision():
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT, head_dim=64),
        image_token_index=90,
        video_token_index=91,
        image_grid_pinpoints=[[28, 28]],
        vision_feature_layer=-1,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _qwen2_5_vl():
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=256, patch_size=14, window_size=56)
    text = TEXT | {"hidden_size": 256, "rope_parameters": _mrope()}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **VISION_TOKENS))


def _qwen3_vl():
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48, patch_size=14, deepstack_visual_indexes=[0]
    )
    text = TEXT | {"head_dim": 64, "rope_parameters": _mrope() | {"mrope_interleaved": True}}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, vision_config=vision, **VISION_TOKENS))


def _internvl():
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=[56, 56], patch_size=[14, 14]
    )
    text = tf.Qwen2Config(**TEXT, head_dim=64)
    vision_config = tf.InternVLVisionConfig(**vision)
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(vision_config=vision_config, text_config=text, image_token_id=90, image_seq_length=4)
    )


def _smolvlm():
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    config = tf.SmolVLMConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT, head_dim=64), image_token_id=90, scale_factor=2)
    return tf.SmolVLMForConditionalGeneration(config)


def _qwen3_next():
    return _causal(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


MODELS = {
    "llama": partial(_causal, "Llama"),
    "qwen2": partial(_causal, "Qwen2"),
    "qwen3": partial(_causal, "Qwen3"),
    "mistral": partial(_causal, "Mistral", sliding_window=None),
    "mistral-sliding": partial(_causal, "Mistral", sliding_window=16),
    "phi3": _phi3,
    "gemma3": _gemma3,
    "llava-onevision": _llava_onevision,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "qwen3-next": _qwen3_next,
}
FRAMES = ("internvl", "smolvlm")  # videos are rows of images to them, 4 tokens each here
VISION = ("llava-onevision", "qwen2.5-vl", "qwen3-vl")


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """The model, on, in evaluation mode. Every parameter that starts as a constant (norms, biases) is shaken too."""
    torch.manual_seed(seed)
    model = MODELS[name](**changes).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim < 2:
            parameter += torch.randn_like(parameter) * 0.1
    bh.enable(model)
    return model.to(dtype)


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], width: int | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a batch whose sequences have these lengths."""
    width = width or max(lengths)
    ids = tokens(len(lengths), width, seed)
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def inputs_for(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model, inputs: dict[str, torch.Tensor], cache, new: int = 8, **more):
    """Generation with its logits [B, new, vocab]: sequences, logits."""
    defaults = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    out = model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **(defaults | more))
    return out.sequences, torch.stack(out.logits, 1)


def dynamic(model) -> DynamicCache:
    return DynamicCache(config=model.config)


def same(model, inputs, plan, new: int = 8, **more) -> None:
    """Generation with the plan gives the tokens and the logits of DynamicCache, bit for bit."""
    bh.disable(model)
    expected, logits = generate(model, inputs, dynamic(model), new, **more)
    bh.enable(model)
    got, got_logits = generate(model, inputs, bh.CompressedCache(plan, model), new, **more)
    assert torch.equal(got, expected)
    assert torch.equal(got_logits, logits), (got_logits - logits).abs().max()
