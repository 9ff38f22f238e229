"""Pictures of the tiny video model's cache: keys and values by channel, the tokens that are protected, the error by layer.

python benchmarks/video_pictures.py --output docs/pictures      # the errors also go to benchmarks/results/video-errors.json
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitsandheads import get_plan
from bitsandheads.eval.clips import encode
from bitsandheads.eval.environment import versions, write_json
from bitsandheads.layer import CompressedLayer, read_mask
from bitsandheads.methods.vidkv import SALIENT_SHARE, semantic_scores
from bitsandheads.seam import AttentionCall, probed
from bitsandheads.stores.packed import RECENT_QUERIES, Recent
from bitsandheads.tasks import video

matplotlib.use("Agg")
from matplotlib import pyplot

FRAMES = 32
PLANS = ("kivi-2", "vidkv-2/2", "vidkv-1.5/2", "vidkv-1.5/1.58", "vidkv-1.5/1.66", "balanced", "extreme")


@torch.no_grad()
def attention_of(model: Any, inputs: dict[str, Tensor]) -> tuple[list[AttentionCall], Tensor]:
    """The attention of every layer in full precision, and the embeddings that enter the language model."""
    calls: list[AttentionCall] = []
    embeddings: list[Tensor] = []

    def note(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.own()

    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: embeddings.append(k["inputs_embeds"]), with_kwargs=True)
    with probed(model, note):
        model(**inputs, use_cache=False)
    hook.remove()
    return calls, embeddings[0]


def by_channel(calls: list[AttentionCall], path: Path) -> None:
    """Range of every channel of the keys and values of two layers, the widest quarter of the key channels marked."""
    layers = [0, len(calls) - 1]
    figure, axes = pyplot.subplots(len(layers), 2, figsize=(12, 5), squeeze=False, layout="constrained")
    for row, layer in zip(axes, layers, strict=True):
        for axis, name, x in ((row[0], "keys", calls[layer].k[0, 0]), (row[1], "values", calls[layer].v[0, 0])):
            low, high = x.min(0)[0], x.max(0)[0]
            spread = high - low
            wide = spread >= spread.quantile(0.75)
            colors = ["tab:red" if w and name == "keys" else "tab:blue" for w in wide]
            axis.bar(range(len(low)), spread, bottom=low, color=colors)
            axis.plot(x.mean(0), "k.", markersize=3)
            axis.set_title(f"layer {layer}, KV head 0, {name}")
            axis.set_xlabel("channel")
    figure.savefig(path, dpi=110)


def protected(calls: list[AttentionCall], embeddings: Tensor, inputs: dict[str, Tensor], frames: Tensor, clip_id: int, path: Path) -> None:
    """The clip with the protected fifth of its tokens outlined, by embedding and by attention."""
    ids = inputs["input_ids"]
    visual = ids == clip_id
    by_embedding = semantic_scores(embeddings, visual, torch.ones_like(visual))[0, visual[0]][:-1]
    call = calls[len(calls) // 2]
    queries = call.q.unflatten(1, (call.k.shape[1], -1))[:, :, :, -RECENT_QUERIES:]
    weight = torch.ones(1, queries.shape[3])
    mass = Recent(queries, weight).attention_mass(slice(None), call.k, call.scale)[0, 0, visual[0]][:-1]
    shown = list(range(0, FRAMES, 4))
    figure, axes = pyplot.subplots(2, len(shown), figsize=(2 * len(shown), 4.4), layout="constrained")
    for row, name, scores in ((axes[0], "embedding", by_embedding), (axes[1], f"attention, layer {call.layer}, head 0", mass)):
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[scores.topk(round(SALIENT_SHARE * len(scores)))[1]] = True
        side = round((len(scores) / FRAMES) ** 0.5)
        cell = video.SIZE / side
        for axis, t in zip(row, shown, strict=True):
            axis.imshow(frames[t].permute(1, 2, 0).numpy())
            for y, x in chosen.view(FRAMES, side, side)[t].nonzero().tolist():
                axis.add_patch(pyplot.Rectangle((x * cell - 0.5, y * cell - 0.5), cell, cell, fill=False, edgecolor="black"))
            axis.set_title(f"{name}\nframe {t}" if t == 0 else f"frame {t}", fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def error_of(call: AttentionCall, plan: str, model: Any, cut: int) -> float:
    """Relative error of a layer's attention output for the tokens after `cut`, the tokens before being packed."""
    resolved = get_plan(plan).resolve(model.config)
    groups = resolved.layers[call.layer]
    assert groups is not None
    layer = CompressedLayer(call.layer, groups, resolved.shapes[call.layer], "reference", torch.bfloat16)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=True).transpose(1, 2)

    outputs = []
    for start, end in ((0, cut), (cut, call.q.shape[2])):
        layer.stage(call.k[:, :, start:end], call.v[:, :, start:end])
        outputs.append(layer.attend(call.q[:, :, start:end], read_mask(None, end - start), call.scale, whole))
    true = call.own()[:, cut:]
    return float((outputs[1] - true).norm() / true.norm())


def by_layer(calls: list[AttentionCall], model: Any, cut: int, path: Path) -> dict[str, list[float]]:
    """Error of every layer under every plan."""
    errors = {plan: [error_of(call, plan, model, cut) for call in calls] for plan in PLANS}
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for plan, values in errors.items():
        axis.plot(values, "o-", label=plan)
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_ylabel("relative error of the attention output")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-video")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("benchmarks/results/video-errors.json"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    sample = max(video.samples(40, "test", FRAMES), key=lambda s: len(s.prompt))
    inputs = encode(model.config, tokenizer, [sample])
    calls, embeddings = attention_of(model, inputs)
    cut = int((inputs["input_ids"][0] == tokenizer.eos_token_id).nonzero().max()) + 1
    by_channel(calls, args.output / "video-channels.png")
    protected(calls, embeddings, inputs, video.frames_of([sample])[0], model.config.video_token_id, args.output / "video-protected.png")
    errors = by_layer(calls, model, cut, args.output / "video-error-by-layer.png")
    write_json({"clip": list(sample.clip), "relative_error_by_layer": errors, "versions": versions()}, args.data)
    for plan, values in errors.items():
        print(f"{plan:16}", " ".join(f"{x:.3f}" for x in values))


if __name__ == "__main__":
    main()
