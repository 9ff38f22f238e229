"""Tokens per second of sampling: our engine with and without CUDA graphs and gates, and transformers' generate. A random small model.

python benchmarks/bench_rollouts.py --output benchmarks/results/rollouts-h100.json
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bitsandheads.demo import versions, write_json
from bitsandheads.gates.rollout import RolloutEngine, Rollouts
from bitsandheads.plan import Window
from bitsandheads.seam import disable_gates, enable_gates
from bitsandheads.tasks import reasoning

ROWS, NEW, SHORT = 1024, 400, 60  # SHORT: new tokens of the slow ones


def seconds(function: Any) -> tuple[Any, float]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = function()
    torch.cuda.synchronize()
    return out, time.perf_counter() - started


def distance(model: Any, prompts: list[list[int]], out: Rollouts) -> float:
    """Mean distance of the rollout's log-probabilities from those of a pass over all tokens."""
    found = []
    for prompt, tokens, logprobs in list(zip(prompts, out.tokens, out.logprobs, strict=True))[:16]:
        with torch.no_grad():
            own = model(torch.tensor([prompt + tokens]).cuda()).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        found.append((own.gather(1, torch.tensor(tokens).cuda()[:, None])[:, 0].cpu() - torch.tensor(logprobs)).abs())
    return float(torch.cat(found).mean())


def generate(model: Any, prompts: list[list[int]]) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).cuda()
    mask = (torch.arange(width)[None] >= torch.tensor([[width - len(p)] for p in prompts])).long().cuda()
    model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=SHORT, min_new_tokens=SHORT, eos_token_id=1, pad_token_id=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = Qwen3Config(
        vocab_size=len(reasoning.VOCABULARY), hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    master = Qwen3ForCausalLM(config).eval()
    prompts = [reasoning.encode(s.prompt) for s in reasoning.samples("train", ROWS, 0)]
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = master.to("cuda", dtype)
        for gated in (False, True):
            if gated:
                with torch.no_grad():
                    enable_gates(model, Window(16, 64)).alpha.uniform_(0, 1)
            for graphs in (True, False):
                engine = RolloutEngine(model, ROWS, [config.vocab_size], 0, graphs=graphs)  # no token ends a sequence
                new = NEW if graphs else SHORT
                engine.generate(prompts, new, 1.0, 5)
                out, spent = seconds(lambda e=engine, n=new: e.generate(prompts, n, 1.0, 5))
                rows.append({"dtype": str(dtype), "by": "graphs" if graphs else "no graphs", "gates": gated, "new_tokens": new})
                rows[-1] |= {"tokens_per_second": round(out.count / spent), "logprob_distance": distance(model, prompts, out)}
                print(rows[-1], flush=True)
        disable_gates(model)
        _, spent = seconds(lambda m=model: generate(m, prompts))
        rows.append({"dtype": str(dtype), "by": "transformers generate", "gates": False, "new_tokens": SHORT})
        rows[-1] |= {"tokens_per_second": round(ROWS * SHORT / spent)}
        print(rows[-1], flush=True)
    about = {"device": torch.cuda.get_device_name(), "versions": versions(), "rows": ROWS, "parameters": master.num_parameters()}
    write_json(about | {"measurements": rows}, args.output)


if __name__ == "__main__":
    main()
