"""Head scores of the tiny video model: ablation, attention mass and random scores, on questions about training clips.

    python benchmarks/heads_video.py          # -> benchmarks/results/head-scores-video/*.tsv; minutes of one CPU core

As in benchmarks/video_tiny.py the clip and a first turn are the prompt; the further question and its answer are what a windowed head meets.
"""

import argparse
from pathlib import Path

import torch
import transformers

from bitsandheads import Window
from bitsandheads import headfinding as h
from bitsandheads.eval.clips import halve
from bitsandheads.eval.runs import commit
from bitsandheads.tasks import video

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-video")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "head-scores-video", help="folder")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1), help="of random scores")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    model.model.apply_pooling = halve
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    about = {"name": args.model.name, "commit": commit() or ""}
    for seed in args.seeds:
        h.random_scores(model, seed, **about).save(args.output / f"random-{seed}.tsv")
    sequences = h.clip_sequences(model.config, tokenizer, list(video.samples(args.questions, "train", args.frames, per_clip=2)))
    about |= {"data": f"{args.questions} questions, {args.frames} frames, training clips", "extra": {"sequences": len(sequences)}}
    for name, find in (("mass", h.mass_scores), ("ablation", h.ablation_scores)):
        found = find(model, sequences, Window(32, 128), args.batch, lambda n: print(".", end="", flush=True), **about)
        found.save(args.output / f"{name}.tsv")
        print(f"\n{name}\n{found.values}", flush=True)


if __name__ == "__main__":
    main()
