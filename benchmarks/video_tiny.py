"""Accuracy by kind of question of the tiny video model under every plan, ablations of VidKV's choices, and head plans.

    python benchmarks/video_tiny.py run --output runs/video --shard 0/4 &   # as many processes as there are cores and memory for
    python benchmarks/video_tiny.py merge --output runs/video               # -> benchmarks/results/video-tiny.json

Each question is asked after its clip has been packed (bitsandheads.eval.clips). Plans stand in order of importance and are dealt to the
shards in turn; each shard has a run folder of its own, so a killed one goes on where it stopped. A plan that is whole in any folder is not
run again. With --seconds a shard starts no plan that would not end in time.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from bitsandheads import CachePlan, HeadGroup, Salience, TensorQuant, get_plan, preset_names
from bitsandheads.demo import write_json
from bitsandheads.eval.clips import ask_packed, clip_task, halve
from bitsandheads.eval.runner import evaluate, plan_cache
from bitsandheads.eval.runs import RunFolder, read_records
from bitsandheads.eval.summary import BASE, row_of, summarise
from bitsandheads.methods.vidkv import SALIENT_SHARE
from bitsandheads.quant.spec import AxisClass, KVQuant
from bitsandheads.tasks import video

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "video-tiny.json"
SCORES = ROOT / "benchmarks" / "results" / "head-scores-video"  # benchmarks/heads_video.py
LONG = 32768
FIRST = (BASE, "balanced", "extreme", "kivi-2")  # the most telling plans
RIVAL = "balanced"  # the plan that all others are compared with, beside bf16
COMPARED = ("difference", "difference_low", "difference_high", "p", "verdict")
FIGURES = ("plan", "kind", "n", "accuracy", "low", "high", "bits_per_element", *COMPARED)


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


def head_plans() -> list[CachePlan]:
    """A part of the KV heads windowed, by each method's scores; both methods in one cache; a larger window; all heads windowed."""
    texts = [f"rlkv:{SCORES / f'{name}.tsv'}@{s}" for s in (0.5, 0.25, 0.75) for name in ("ablation", "mass", "random-0")]
    best = f"rlkv:{SCORES / 'ablation.tsv'}"
    texts[3:3] = [f"balanced+{best}@0.5", f"{best}@1"]
    texts += [f"{best}@0.5@32+512", f"{best}@1@32+512"]
    texts += [f"rlkv:{SCORES / 'random-1.tsv'}@{s}" for s in (0.5, 0.25, 0.75)]
    return [get_plan(text) for text in texts]


def plans() -> dict[str, tuple[str, CachePlan]]:
    """Name -> its group ("setting": a preset, "ablation" or "heads") and the plan, the most important first."""
    names = [*FIRST, *(n for n in preset_names() if n not in FIRST)]
    others = {"ablation": ablations(), "heads": head_plans()}
    return {n: ("setting", get_plan(n)) for n in names} | {p.name: (group, p) for group, own in others.items() for p in own}


def same_plan() -> dict[str, str]:
    """Name -> the first name of a plan with the same head groups; that one is run for all of them."""
    first: dict[Any, str] = {}
    return {name: first.setdefault((plan.groups, *sorted(plan.layers.items())), name) for name, (_, plan) in plans().items()}


Found = dict[str, dict[str, dict[str, dict[str, Any]]]]


def records_of(output: Path) -> Found:
    """dtype of the model -> plan -> id -> record, from all run folders below a folder; bfloat16 (GPUs) before float32 (CPUs)."""
    found: Found = {"torch.bfloat16": {}, "torch.float32": {}}
    for path in sorted(output.rglob("run.json")):
        of_dtype = found[json.loads(path.read_text())["config"]["dtype"]]
        for r in read_records(path.parent):
            of_dtype.setdefault(r["plan"], {})[r["id"]] = r
    return found


def run(args: argparse.Namespace) -> None:
    """The plans of one shard, one after the other."""
    started, longest = time.perf_counter(), 0.0
    number, shards = (int(x) for x in args.shard.split("/"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    whole = {plan for plan, records in records_of(args.output)[str(dtype)].items() if len(records) == args.questions}
    wanted = [name for name in dict.fromkeys(same_plan()[n] for n in args.only or plans()) if name not in whole]
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(device).eval()
    model.model.apply_pooling = halve
    samples = list(video.samples(args.questions, "test", args.frames))
    samples.sort(key=lambda s: len(s.before[0].split()))  # prompts of one length are packed together
    task = clip_task(model.config, samples, device)
    config = {"model": args.model.name, "dtype": str(dtype), "questions": args.questions, "frames": args.frames}
    config |= {"batch": args.batch, "backend": args.backend}
    with RunFolder(args.output / f"shard-{device}-{number}-of-{shards}", config) as folder:
        for name in wanted[number::shards]:
            if args.seconds - (time.perf_counter() - started) < 1.2 * longest:
                print(f"shard {number}: no time left for plans from {name} on", flush=True)
                break
            begun = time.perf_counter()
            caches = {name: plan_cache(plans()[name][1], args.backend)}
            evaluate(model, tokenizer, task, caches, folder, batch_size=args.batch, generate=ask_packed)
            seconds = time.perf_counter() - begun
            longest = max(longest, seconds)
            done = row_of([r for r in folder.records() if r["plan"] == name])
            print(f"{time.strftime('%X')} {name:28} {seconds:6.1f} s  {done['accuracy']:.3f}  {done['bits_per_element']:.2f}", flush=True)


def rows_of(records: list[dict[str, Any]], config: Any) -> list[dict[str, Any]]:
    """Every plan by kind and in all. versus_balanced: the same differences with RIVAL as the base; right: 1 for each question that was
    answered, in the order of their ids (all kinds together only)."""
    known = plans()
    rows = []
    for by in ([], ["kind"]):
        against = summarise(records, by, RIVAL)
        for r, rival in zip(summarise(records, by), against, strict=True):
            group, plan = known[r["plan"]]
            row = {k: ({"kind": "all"} | r)[k] for k in FIGURES} | {"bits_per_element_at_32k": plan.bits_for(config, LONG), "group": group}
            row |= {f"versus_{RIVAL}": {k: rival[k] for k in COMPARED}}
            if not by:
                own = sorted((x for x in records if x["plan"] == r["plan"]), key=lambda x: x["id"])
                row["right"] = "".join(str(int(x["score"])) for x in own)
            rows.append(row)
    return rows


def merge(args: argparse.Namespace) -> None:
    """Rows of the plans that were asked all questions. A plan that both dtypes have counts once, and is compared with plans of its dtype."""
    config, found, rows = transformers.AutoConfig.from_pretrained(args.model), records_of(args.output), []
    missing = dict.fromkeys(plans())
    for dtype, of_dtype in found.items():
        records = []
        for name, run_as in same_plan().items():
            own = of_dtype.get(run_as, {}).values()
            if len(own) == args.questions:
                records += [r | {"plan": name} for r in own]
        rows += [r | {"dtype": dtype} for r in rows_of(records, config) if r["plan"] in missing]
        for r in rows:
            missing.pop(r["plan"], None)
    for name in missing:
        print(f"missing or incomplete: {name}")
    runs = [json.loads(path.read_text()) for path in sorted(args.output.rglob("run.json"))]
    about = {"model": args.model.name, "questions": args.questions, "frames": args.frames}
    write_json(about | {"runs": [{k: r[k] for k in ("config", "versions")} for r in runs], "rows": rows}, args.result)
    for r in rows:
        if r["kind"] == "all":
            bits = f"{r['bits_per_element']:.2f}  {r['bits_per_element_at_32k']:.2f}"
            print(f"{r['plan']:28} {r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]  {bits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "merge"))
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards' run folders")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-video")
    parser.add_argument("--questions", type=int, default=2048)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--backend", default="reference", help="of the cache; the reference compiles nothing")
    parser.add_argument("--only", nargs="+", choices=list(plans()), metavar="PLAN", help="default: all of them")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    {"run": run, "merge": merge}[args.command](args)


if __name__ == "__main__":
    main()
