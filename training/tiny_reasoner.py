"""Train the tiny reasoner: a Qwen3 decoder of a few million parameters, from scratch, on the problems of bitsandheads.tasks.reasoning.

    python training/tiny_reasoner.py --output models/tiny-reasoner

Worker processes make the problems; a batch holds whole problems of about one length, padded on the right, with the loss on the solution alone.
Levels are unlocked from short to long, each when the loss on the ones before is small. The learning rate is warmed up, held and taken to 0
at the end of the time budget. Every few seconds a line goes to OUTPUT/training-log.csv; the accuracies there come from greedy generation on
the validation split. A checkpoint is written whole or not at all, and the same command goes on from it. At the end the bf16 weights are read
back and measured on the test split (OUTPUT/evaluation.csv). The time budget and the order of the workers' batches make two runs differ in
detail even with one seed.
"""

import argparse
import csv
import math
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bitsandheads.tasks import reasoning

LENGTHS = (96, 160, 256, 384, 512, 640, 768, 928, 1088)  # tokens to which the problems of a batch are padded
IGNORED = -100
ACCURACIES = [f"accuracy_{kind}" for kind in reasoning.KINDS]
COLUMNS = ["step", "tokens", "seconds", "loss", "learning_rate", "highest_level", *ACCURACIES, "accuracy"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each name, digit, sign and keyword."""
    vocabulary = {token: i for i, token in enumerate(reasoning.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(reasoning.PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 decoder with random float32 weights."""
    config = Qwen3Config(
        vocab_size=len(reasoning.VOCABULARY),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.q_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=args.init,
        bos_token_id=None,
        eos_token_id=reasoning.EOS,
        pad_token_id=reasoning.PAD,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=reasoning.EOS, pad_token_id=reasoning.PAD, do_sample=False)
    return model


def make_batches(queue, highest_level, seed: str, batch_tokens: int) -> None:
    """Worker: put (token ids uint16 [samples, length], prompt lengths, total lengths) into the queue, for ever."""
    torch.set_num_threads(1)

    def choose(rng: random.Random) -> tuple[str, int]:
        levels = range(highest_level.value + 1)
        return rng.choice(reasoning.KINDS), rng.choices(levels, [level + 1 for level in levels])[0]

    waiting: dict[int, list[tuple[int, list[int]]]] = {length: [] for length in LENGTHS}
    for sample in reasoning.problem_stream("train", seed, choose, repeats=True):
        prompt = reasoning.encode(sample.prompt)
        ids = prompt + reasoning.encode(sample.solution) + [reasoning.EOS]
        length = next(n for n in LENGTHS if n >= len(ids))
        waiting[length].append((len(prompt), ids))
        if len(waiting[length]) == max(batch_tokens // length, 1):
            rows = waiting[length]
            tokens = np.full((len(rows), length), reasoning.PAD, np.uint16)
            for i, (_, ids) in enumerate(rows):
                tokens[i, : len(ids)] = ids
            queue.put((tokens, np.array([p for p, _ in rows], np.int32), np.array([len(ids) for _, ids in rows], np.int32)))
            waiting[length] = []


def loss_of(model: Qwen3ForCausalLM, tokens: torch.Tensor, prompts: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the solutions. tokens int64 [samples, length], prompts and totals int [samples]: lengths in tokens."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    inside = (place >= prompts[:, None]) & (place < totals[:, None])
    labels = tokens[:, 1:].masked_fill(~inside, IGNORED)
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list, batch: int = 528) -> list[tuple]:
    """(problem, score, output tokens) of each problem under greedy generation with a KV cache, batches padded on the left."""
    rows = []
    by_length = sorted(problems, key=lambda p: len(p.solution))
    for start in range(0, len(problems), batch):
        part = by_length[start : start + batch]
        inputs = tokenizer([p.prompt for p in part], padding=True, return_tensors="pt").to(model.device)
        most = max(len(reasoning.encode(p.solution)) for p in part) + 32
        output = model.generate(**inputs, max_new_tokens=most, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        used = (output != reasoning.PAD).sum(1).tolist()
        rows += [(p, reasoning.score(p, text), n) for p, text, n in zip(part, texts, used, strict=True)]
    return rows


def accuracies(rows: list[tuple]) -> dict[str, str]:
    """The accuracy of each kind and of all, as the log writes them."""
    groups = {name: [s for p, s, _ in rows if p.kind == kind] for name, kind in zip(ACCURACIES, reasoning.KINDS, strict=True)}
    groups["accuracy"] = [s for _, s, _ in rows]
    return {name: f"{sum(scores) / len(scores):.4f}" for name, scores in groups.items() if scores}


def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then give the file its name."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def make_optimizers(model: Qwen3ForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adamw = {"lr": args.lr, "betas": (0.9, 0.98), "fused": True}
    groups = [{"params": rest, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return [torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, *groups], **adamw)]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, **adamw)]


def rate_at(progress: float, step: int, args: argparse.Namespace) -> float:
    """Share of the learning rate: linear warm-up over steps, flat, then linear to 0 over the last part of the time budget."""
    return min(1.0, (step + 1) / args.warmup) * min(1.0, max(0.0, 1 - progress) / args.decay)


def train(args: argparse.Namespace) -> None:
    """Train for the time budget, from the checkpoint if there is one, and save the weights in bf16 and the tokenizer."""
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint_path, log_path = args.output / "checkpoint.pt", args.output / "training-log.csv"
    saved = torch.load(checkpoint_path, weights_only=True) if checkpoint_path.exists() else None
    start_step, seconds_before = (saved["step"], saved["seconds"]) if saved else (0, 0.0)

    context = multiprocessing.get_context("fork")  # before CUDA starts
    queue, highest_level = context.Queue(maxsize=48), context.Value("i", saved["level"] if saved else 0)
    workers = [
        context.Process(target=make_batches, args=(queue, highest_level, f"{args.seed}/{start_step}/{i}", args.batch_tokens), daemon=True)
        for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()

    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = make_tokenizer()
    model = make_model(args).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device_name}", flush=True)
    optimizers = make_optimizers(model, args)
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    problems = reasoning.samples("validation", args.eval_problems, seed=1)

    def half_copy() -> Qwen3ForCausalLM:
        copy = make_model(args).to(device, torch.bfloat16)
        copy.load_state_dict(model.state_dict())
        return copy.eval()

    def save_checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step, "tokens": seen.item()}
        write_whole(checkpoint_path, lambda path: torch.save(state | {"seconds": seconds, "level": highest_level.value}, path))

    step, seconds, losses, unlocked_at = start_step, seconds_before, [], start_step
    seen = torch.tensor(saved["tokens"] if saved else 0, device=device)
    budget, last_save = 60 * args.minutes, time.monotonic()
    next_eval = seconds + args.eval_seconds
    with open(log_path, "a" if saved else "w", newline="") as file:
        log = csv.DictWriter(file, COLUMNS)
        if not saved:
            file.write(f"# {device_name}, torch {torch.__version__}, {vars(args) | {'output': args.output.name}}\n")
            log.writeheader()
        while seconds < budget:
            tokens, prompts, totals = (torch.from_numpy(a.astype(np.int64)).to(device, non_blocking=True) for a in queue.get())
            share = rate_at(seconds / budget, step, args)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_of(model, tokens, prompts, totals)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * share
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen += totals.sum()
            losses.append(loss.detach())
            step += 1
            if step % 20:
                continue
            mean_loss, losses = torch.stack(losses).mean().item(), []
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"The loss is {mean_loss} after {step} steps; use a smaller --lr.")
            seconds = seconds_before + time.monotonic() - start
            level = highest_level.value
            if level < 4 and step - unlocked_at >= 100 and (mean_loss < 0.05 or seconds > 0.09 * (level + 1) * budget):
                highest_level.value, unlocked_at = level + 1, step
            row = {
                "step": step,
                "tokens": seen.item(),
                "seconds": f"{seconds:.1f}",
                "loss": f"{mean_loss:.6f}",
                "learning_rate": f"{args.lr * share:.2e}",
                "highest_level": level,
            }
            if seconds >= next_eval:
                row |= accuracies(evaluate(half_copy(), tokenizer, problems))
                next_eval = seconds + args.eval_seconds
            if "accuracy" in row or step % 100 == 0:
                log.writerow(row)
                file.flush()
                print(row, "queue", queue.qsize(), flush=True)
            if time.monotonic() - last_save > args.save_seconds:
                save_checkpoint()
                last_save = time.monotonic()
    for worker in workers:
        worker.terminate()
    half_copy().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    checkpoint_path.unlink(missing_ok=True)


def test(args: argparse.Namespace) -> None:
    """Measure the saved model on the test split and write evaluation.csv: kind, level, n, correct, mean output tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16).to(device).eval()
    rows = evaluate(model, AutoTokenizer.from_pretrained(args.output), reasoning.samples("test", args.test_problems, seed=0))

    def write(path: Path) -> None:
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["kind", "level", "n", "correct", "mean_output_tokens"])
            for kind in reasoning.KINDS:
                for level in reasoning.LEVELS:
                    cell = [(s, n) for p, s, n in rows if (p.kind, p.level) == (kind, level)]
                    if cell:
                        table.writerow(
                            [kind, level, len(cell), int(sum(s for s, _ in cell)), round(sum(n for _, n in cell) / len(cell), 1)]
                        )

    write_whole(args.output / "evaluation.csv", write)
    print("test split:", accuracies(rows), flush=True)


def main() -> None:
    """Train, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.8, help="time budget of the training; the test comes on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--q-heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--init", type=float, default=0.04, help="standard deviation of the first weights")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the budget in which the learning rate falls to 0")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--eval-seconds", type=float, default=90.0, help="between two accuracies in the log")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="between two checkpoints")
    parser.add_argument("--eval-problems", type=int, default=120)
    parser.add_argument("--test-problems", type=int, default=1050)
    args = parser.parse_args()
    train(args)
    test(args)


if __name__ == "__main__":
    main()
