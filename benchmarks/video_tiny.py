"""Accuracy by kind of question of the tiny video model under every plan, and ablations of VidKV's choices.

    python benchmarks/video_tiny.py --model models/tiny-video --output benchmarks/results/video-tiny.json

Each question is asked after its clip has been packed (bitsandheads.eval.clips). Records are kept in --runs as they come; the same command
goes on after a kill. A GPU answers 2,048 questions in about 20 seconds for each plan.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from bitsandheads import CachePlan, HeadGroup, Salience, TensorQuant, get_plan, preset_names
from bitsandheads.demo import versions, write_json
from bitsandheads.eval.clips import ask_packed, clip_task
from bitsandheads.eval.runner import evaluate, plan_cache
from bitsandheads.eval.runs import RunFolder
from bitsandheads.eval.summary import summarise
from bitsandheads.methods.vidkv import SALIENT_SHARE
from bitsandheads.quant.spec import AxisClass, KVQuant

LONG = 32768


def changed(base: str, name: str, **changes: Any) -> CachePlan:
    """A preset of one head group with changes to its KVQuant."""
    plan = get_plan(base)
    (group,) = plan.groups
    assert group.quant is not None
    return CachePlan(name, (HeadGroup(quant=replace(group.quant, **changes)),))


def quant_of(base: str) -> KVQuant:
    (group,) = get_plan(base).groups
    assert group.quant is not None
    return group.quant


def ablations() -> list[CachePlan]:
    """VidKV's choices one at a time, from vidkv-1.5/1.58 (keys, protection) and vidkv-1.5/2 (values)."""
    keys = quant_of("vidkv-1.5/1.58").keys
    per_token = TensorQuant((AxisClass(2, 1.0, "minmax"),), per="token")
    ternary = quant_of("vidkv-1.5/1.58").values
    plans = [
        changed("vidkv-1.5/2", "values 2 per channel"),
        changed("vidkv-1.5/2", "values 2 per token", values=per_token),
        changed("vidkv-1.5/1.58", "values ternary per channel"),
    ]
    for order in ("range", "variance", "query"):
        plans.append(changed("vidkv-1.5/2", f"keys by {order}", keys=replace(keys, order=order)))
    for transform in ("fourier", "hadamard", "dct"):
        plans.append(changed("vidkv-1.5/2", f"keys turned by {transform}", keys=replace(keys, transform=transform)))
    plans.append(changed("vidkv-1.5/2", "keys not turned", keys=replace(keys, transform="none", last_class_only=False)))
    for by, name in ((None, "none"), ("given", "random"), ("embedding", "embedding"), ("attention", "attention")):
        salience = None if by is None else Salience(SALIENT_SHARE, by)  # type: ignore[arg-type]
        plans.append(changed("vidkv-1.5/1.58", f"protection: {name}", salience=salience, values=ternary))
    plans.append(changed("vidkv-1.5/1.58", "32 first tokens whole", sink=32))
    return plans


def rows_of(records: list[dict[str, Any]], plans: dict[str, CachePlan], group: dict[str, str], config: Any) -> list[dict[str, Any]]:
    """The rows of the results file: every plan by kind and in all."""
    wanted = (
        "plan",
        "kind",
        "n",
        "accuracy",
        "low",
        "high",
        "bits_per_element",
        "difference",
        "difference_low",
        "difference_high",
        "p",
        "verdict",
    )
    found = [r | {"kind": "all"} for r in summarise(records)] + summarise(records, by=["kind"])
    return [
        {k: r[k] for k in wanted} | {"bits_per_element_at_32k": plans[r["plan"]].bits_for(config, LONG), "group": group[r["plan"]]}
        for r in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-video")
    parser.add_argument("--questions", type=int, default=2048)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--plans", nargs="*", default=None, help="default: all presets and the ablations")
    parser.add_argument("--runs", type=Path, default=Path("video-tiny-run"), help="folder of the records")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    from bitsandheads.tasks import video

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(device).eval()
    settings = [get_plan(p) for p in (preset_names() if args.plans is None else args.plans)]
    others = ablations() if args.plans is None else []
    plans = {p.name: p for p in [*settings, *others]}
    group = {p.name: "setting" for p in settings} | {p.name: "ablation" for p in others}
    task = clip_task(model.config, list(video.samples(args.questions, "test", args.frames)), device)
    config = {"model": str(args.model), "questions": args.questions, "frames": args.frames, "batch": args.batch, "plans": list(plans)}
    with RunFolder(args.runs, config) as folder, Progress(console=Console()) as bar:
        line = bar.add_task("questions", total=args.questions * len(plans))
        caches = {name: plan_cache(plan) for name, plan in plans.items()}
        evaluate(model, tokenizer, task, caches, folder, batch_size=args.batch, tick=lambda n: bar.advance(line, n), generate=ask_packed)
        rows = rows_of(folder.records(), plans, group, model.config)
    write_json(config | {"versions": versions(), "rows": rows}, args.output)
    for r in rows:
        if r["kind"] == "all":
            print(
                f"{r['plan']:28} {r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]  {r['bits_per_element']:.2f}  {r['bits_per_element_at_32k']:.2f}"
            )


if __name__ == "__main__":
    main()
