"""Our StreamingLLM and H2O against kvpress on the same prompt. kvpress needs transformers < 5.3, bitsandheads a newer one, so: two environments.

    # in an environment with kvpress (pip install kvpress), which writes what it keeps
    python benchmarks/comparators/kvpress_check.py kvpress --exchange DIR
    # in ours, which compares
    PYTHONPATH=benchmarks python benchmarks/comparators/kvpress_check.py compare --exchange DIR --output benchmarks/results/kvpress-check.json

Both build the same small Qwen3 model from a fixed seed, file by file the same weights (DIR/weights.pt). StreamingLLMPress keeps the
same tokens as our StreamingLLM under the same budget. kvpress has no H2O; its ObservedAttentionPress scores a token by the attention that it
draws, divided by the number of queries that see it, so our accumulated attention divided by that number must be its score. R-KV
is not in kvpress.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

TOKENS, KEEP, SINK = 300, 120, 4


def model(folder: Path) -> Any:
    """The model; the first call writes its weights, later ones read them."""
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=1024, initializer_range=0.25, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    out = transformers.Qwen3ForCausalLM(config).eval()
    weights = folder / "weights.pt"
    if not weights.exists():
        torch.save(out.state_dict(), weights)
    out.load_state_dict(torch.load(weights))
    return out


def prompt() -> torch.Tensor:
    """int64 [1, TOKENS]."""
    return torch.randint(2, 96, (1, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def with_kvpress(folder: Path) -> None:
    """Write the kept places and the scores of every layer."""
    from importlib.metadata import version

    from kvpress import ObservedAttentionPress, StreamingLLMPress

    m = model(folder)
    full = transformers.DynamicCache()
    m(prompt(), past_key_values=full)
    scores: list[list] = []

    class Recorder(ObservedAttentionPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            out = super().score(module, hidden_states, keys, values, attentions, kwargs)
            scores.append(out[0].tolist())
            return out

    kept = []
    cache = transformers.DynamicCache()
    with StreamingLLMPress(compression_ratio=1 - KEEP / TOKENS, n_sink=SINK)(m):
        m(prompt(), past_key_values=cache)
    for whole, pressed in zip(full.layers, cache.layers, strict=True):
        same = (whole.keys[0, :, None] == pressed.keys[0, :, :, None]).all(-1)  # [H, kept, TOKENS]
        assert same.sum(-1).eq(1).all()
        kept.append([sorted(row) for row in same.int().argmax(-1).tolist()])
    with Recorder(compression_ratio=0.5)(m):
        m(prompt(), past_key_values=transformers.DynamicCache())
    data = {"kept": kept, "scores": scores, "kvpress": version("kvpress"), "transformers": transformers.__version__}
    (folder / "kvpress.json").write_text(json.dumps(data))


@torch.no_grad()
def compare(folder: Path, output: Path) -> None:
    """Our places and scores beside kvpress's."""
    import bitsandheads as bh
    from bitsandheads.eval.environment import versions, write_json
    from comparators.eviction import EvictionCache
    from comparators.methods import H2O, StreamingLLM

    theirs = json.loads((folder / "kvpress.json").read_text())
    m = model(folder)
    m.set_attn_implementation("sdpa")
    bh.enable(m)
    plan = bh.CachePlan("same budget", (bh.HeadGroup(),))
    same, worst = True, 0.0
    for method in (StreamingLLM(SINK), H2O()):
        cache = EvictionCache(method, plan, m)
        for layer in cache.layers:
            layer.layer.budget._known = [min(t, KEEP if method.name == "streaming-llm" else t) for t in range(TOKENS + 1)]
        m(prompt(), past_key_values=cache)
        for i, layer in enumerate(cache.layers):
            inner = layer.layer
            if method.name == "streaming-llm":
                places = [sorted(p for p in row if p >= 0) for row in inner.place[0].tolist()]
                same &= places == theirs["kept"][i]
            else:
                seen_by = torch.arange(TOKENS, 0, -1)
                ours = inner.sums[0] / seen_by / (inner.shape.q_heads // inner.shape.kv_heads)
                want = torch.tensor(theirs["scores"][i])
                worst = max(worst, float(((ours - want).abs() / want).max()))
    data = {
        "tokens": TOKENS,
        "kept": KEEP,
        "streaming_llm_keeps_the_same_tokens": same,
        "observed_attention_largest_relative_difference": worst,
        "kvpress": theirs["kvpress"],
        "kvpress_transformers": theirs["transformers"],
        "versions": versions(),
    }
    write_json(data, output)
    print(json.dumps(data, indent=1))
    assert same and worst < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("kvpress", "compare"))
    parser.add_argument("--exchange", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.exchange.mkdir(exist_ok=True)
    if args.side == "kvpress":
        with_kvpress(args.exchange)
    else:
        compare(args.exchange, args.output)


if __name__ == "__main__":
    main()
