"""Train the tiny video model: a LLaVA-OneVision of a few million weights that answers questions about generated clips.

    python training/tiny_video.py --out models/tiny-video --minutes 8.5        # one GPU
    python training/tiny_video.py processor models/tiny-video                  # adds the processor; needs torchvision

From scratch, no data files: clips and questions come from bitsandheads.tasks.video, simulated and rendered on the training
device; test clips are left out by their hash. Clips grow longer while training goes on. Every batch is new, so the accuracy
in the log is that on unseen clips; the last lines are accuracies by kind on test clips by generation.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy

from bitsandheads.eval.clips import encode, halve, pixels, video_tokens
from bitsandheads.tasks import video

Model = transformers.LlavaOnevisionForConditionalGeneration
PAD, USER, ASSISTANT, END, VIDEO, IMAGE, UNKNOWN = "<pad>", "<user>", "<assistant>", "<end>", "<video>", "<image>", "<unk>"
SPECIAL = (PAD, USER, ASSISTANT, END, VIDEO, IMAGE, UNKNOWN)
CHAT = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant> ' }}{% if m.content is string %}{{ m.content + ' ' }}{% else %}"
    "{% for c in m.content %}{{ '<video> ' if c.type == 'video' else '<image> ' if c.type == 'image' else c.text + ' ' }}{% endfor %}{% endif %}"
    "{{ '<end> ' if m.role == 'assistant' else '' }}{% endfor %}{{ '<assistant>' if add_generation_prompt else '' }}"
)


LOG_SECONDS = 10
WORDS_EACH = 13  # tokens of a question and its answer, on average at most


@dataclass(frozen=True)
class Config:
    """Sizes of model and training. stages: (share of the time, frames, clips in a batch)."""

    hidden: int = 256
    layers: int = 6
    ffn: int = 768
    vision_hidden: int = 128
    vision_layers: int = 2
    vision_ffn: int = 384
    patch: int = 6
    muon: bool = True
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 200
    decay: float = 0.6
    asked: int = 16
    stages: tuple[tuple[float, int, int], ...] = ((0.3, 8, 128), (0.2, 16, 64), (0.5, 32, 32))
    compiled: bool = True
    seed: int = 0


CONFIGS = {
    "base": Config(),
    "slow": Config(lr=1e-3),
    "adamw": Config(muon=False, lr=1e-3),
    "plain": Config(compiled=False),
    "test": Config(
        hidden=128,
        layers=2,
        ffn=256,
        vision_hidden=64,
        vision_layers=1,
        vision_ffn=128,
        stages=((0.5, 8, 4), (0.5, 12, 2)),
        compiled=False,
        warmup=5,
    ),
}
PLACE_STD = 0.4  # of the initial position embeddings of patches
PLACE_WAVES = 6  # cosines along each axis that they are made of


def vocabulary() -> list[str]:
    """Every token: special ones, then the words of questions and answers."""
    words = {w for _, template, _ in video.TEMPLATES for w in template.split() if "{" not in w}
    return [*SPECIAL, *sorted(words | set(video.WORDS) | set(video.ANSWERS))]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each word."""
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token=UNKNOWN))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    out = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, VIDEO, IMAGE],
        padding_side="left",
    )
    out.chat_template = CHAT
    return out


def model_config(c: Config) -> transformers.LlavaOnevisionConfig:
    """The transformers configuration."""
    words = vocabulary()
    text = transformers.Qwen2Config(
        vocab_size=-(-len(words) // 8) * 8,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        pad_token_id=words.index(PAD),
        bos_token_id=None,
        eos_token_id=words.index(END),
        tie_word_embeddings=False,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=c.vision_hidden,
        intermediate_size=c.vision_ffn,
        num_hidden_layers=c.vision_layers,
        num_attention_heads=c.vision_hidden // 64,
        image_size=video.SIZE,
        patch_size=c.patch,
        vision_use_head=False,
    )
    return transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.index(IMAGE),
        video_token_index=words.index(VIDEO),
        image_grid_pinpoints=[[video.SIZE, video.SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


class Encoder:
    """Questions of whole batches to token ids, by table."""

    def __init__(self, device: torch.device) -> None:
        words = vocabulary()
        self.id = {w: i for i, w in enumerate(words)}
        self.words = torch.tensor([self.id[w] for w in video.WORDS], device=device)
        self.answers = torch.tensor([self.id[w] for w in video.ANSWERS], device=device)
        rows = [[USER, *template.split(), ASSISTANT] for _, template, _ in video.TEMPLATES]
        slots = {"{a}": -1, "{b}": -2}
        width = max(map(len, rows))
        pad = self.id[PAD]
        self.table = torch.tensor([[slots.get(w) or self.id[w] for w in r] + [pad] * (width - len(r)) for r in rows], device=device)

    def dialogue(self, asked: video.Questions) -> tuple[Tensor, Tensor, Tensor]:
        """All questions of a clip with their answers, one after another, cut at WORDS_EACH tokens for each.

        Returns:
            ids [N, L] padded on the right; the next token of ids[:, 1:] where it is an answer or its end, else -100: [N, L - 2];
            templates of those places where it is an answer, else the number of templates: [N, L - 2].
        """
        pad = self.id[PAD]
        ids = self.table[asked.template]
        ids = torch.where(ids == -1, self.words[asked.a][..., None], ids)
        ids = torch.where(ids == -2, self.words[asked.b][..., None], ids)
        end = torch.full_like(asked.answer, self.id[END])
        ids = torch.cat([ids, self.answers[asked.answer][..., None], end[..., None]], -1)
        ids = torch.where(asked.valid[..., None], ids, pad)
        which = torch.full_like(ids, -1)
        which[..., -2], which[..., -1] = asked.template, len(video.TEMPLATES)
        order = (ids.flatten(1) == pad).int().argsort(dim=1, stable=True)[:, : WORDS_EACH * asked.valid.shape[1]]
        ids, which = (x.flatten(1).gather(1, order) for x in (ids, which))
        wanted = (which[:, 2:] >= 0) & (ids[:, 2:] != pad)
        return ids, torch.where(wanted, ids[:, 2:], -100), torch.where(wanted, which[:, 2:], len(video.TEMPLATES))


class Stream:
    """Endless new training clips and questions of one length, in batches."""

    def __init__(self, start: int, device: torch.device, block: int, asked: int) -> None:
        self.next, self.device, self.block, self.asked = start, device, block, asked
        self.frames = self.at = 0
        self.scenes: video.Scenes | None = None
        self.questions: video.Questions | None = None

    def batch(self, size: int, frames: int) -> tuple[video.Scenes, video.Questions]:
        """`size` clips of `frames` frames."""
        while self.scenes is None or self.questions is None or frames != self.frames or self.at + size > len(self.scenes.ids):
            numbers = torch.arange(self.next, self.next + self.block, device=self.device)
            self.scenes, self.frames, self.at = video.clips("train", numbers, frames), frames, 0
            self.questions = video.questions(self.scenes, self.asked)
            self.next += self.block
        part = slice(self.at, self.at + size)
        self.at += size
        return self.scenes.pick(part), self.questions.pick(part)


def accuracy_line(right: Tensor, total: Tensor) -> dict[str, float]:
    """Accuracy by kind and by template from counts [templates]."""
    out = {}
    for kind in video.KINDS:
        of = torch.tensor([k == kind for k, _, _ in video.TEMPLATES] + [False], device=right.device)
        out[kind] = float(right[of].sum() / total[of].sum().clamp(min=1))
    out |= {f"t{i}": float(r / max(float(n), 1)) for i, (r, n) in enumerate(zip(right[:-1], total[:-1], strict=True))}
    return {name: round(x, 3) for name, x in out.items()}


@torch.no_grad()
def place_patches(model: Model) -> None:
    """Smooth initial position embeddings: with transformers' own, small and random, places are not learned for thousands of steps."""
    weight = model.model.vision_tower.embeddings.position_embedding.weight
    side = math.isqrt(len(weight))
    at = (torch.arange(side, device=weight.device) + 0.5) * math.pi / side
    waves = torch.cos(at[:, None] * torch.arange(1, PLACE_WAVES + 1, device=weight.device))  # [side, waves]
    code = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], -1).flatten(0, 1)
    weight.copy_(code @ torch.randn(2 * PLACE_WAVES, weight.shape[1], device=weight.device) * PLACE_STD / PLACE_WAVES**0.5)


class Step:
    """Forward and backward on fixed buffers: on a GPU recorded once as a CUDA graph, then replayed.

    Attributes:
        clips: uint8 [B, T, 3, SIZE, SIZE]; ids: [B, L]; target: [B, L - 2], the next token of ids[:, 1:] or -100; to be filled before
            `run`. loss, hits: results of the last `run`; hits: bool [B, L - 2].
    """

    def __init__(self, model: Model, size: int, frames: int, width: int) -> None:
        self.model, device = model, model.device
        self.clips = torch.zeros(size, frames, 3, video.SIZE, video.SIZE, dtype=torch.uint8, device=device)
        self.ids = torch.zeros(size, width, dtype=torch.long, device=device)
        self.target = torch.zeros(size, width - 2, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = self.hits = torch.zeros(())

    def _gradients(self) -> None:
        model, on_gpu = self.model, self.ids.is_cuda
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            seen = model.model.get_video_features(pixels(self.clips)).pooler_output
            if seen.shape[1] < video_tokens(model.config, self.clips.shape[1]):  # transformers before 5.18 add the newline elsewhere
                seen = torch.cat([seen, model.model.image_newline.expand(len(seen), 1, -1).to(seen.dtype)], 1)
            words = model.get_input_embeddings()(self.ids)
            tokens = torch.cat([words[:, :1], seen, words[:, 1:]], 1)  # the clip stands in the first turn, as the chat template has it
            read = model.model.language_model(inputs_embeds=tokens, attention_mask={"full_attention": None}, use_cache=False)
            logits = model.lm_head(read.last_hidden_state[:, -self.target.shape[1] - 1 : -1])
        self.loss = cross_entropy(logits.float().flatten(0, 1), self.target.flatten())
        self.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.hits = logits.argmax(-1) == self.target

    def run(self) -> None:
        """New gradients for all weights."""
        if self.graph is not None:
            self.graph.replay()
            return
        self.model.zero_grad(set_to_none=True)
        self._gradients()

    def record(self) -> None:
        """Record the graph, after three runs that warm up."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(aside)
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._gradients()
        except RuntimeError as error:
            print(f"no CUDA graph, steps run one kernel at a time: {error}", flush=True)
            torch.cuda.synchronize()
            return
        self.graph = graph


def make_optimizers(model: Model, c: Config) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    known = set(hidden)
    rest = [p for p in model.parameters() if p not in known]
    adamw = {"lr": c.lr, "betas": (0.9, 0.97), "fused": model.device.type == "cuda"}
    if not c.muon:
        return [torch.optim.AdamW([{"params": hidden, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}], **adamw)]
    muon = torch.optim.Muon(hidden, lr=c.lr, weight_decay=c.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, weight_decay=0.0, **adamw)]


def train(c: Config, out: Path, minutes: float, device: torch.device) -> Model:
    """Train for so many minutes; writes train.jsonl as it goes."""
    started = time.perf_counter()
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high")
    config, on_gpu = model_config(c), device.type == "cuda"
    model = Model(config).to(device).train()
    place_patches(model)
    model.model.apply_pooling = halve
    if c.compiled:
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            layer.compile(dynamic=False)
    optimizers = make_optimizers(model, c)
    encoder, stream = Encoder(device), Stream(1 << 40, device, 8192 if on_gpu else 512, c.asked)
    templates = len(video.TEMPLATES) + 1
    right, total, losses = torch.zeros(templates, device=device), torch.zeros(templates, device=device), torch.zeros((), device=device)
    number = since = seen = 0
    told = started
    step: Step | None = None
    log = (out / "train.jsonl").open("w")
    log.write(json.dumps({"config": asdict(c), "weights": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}) + "\n")
    while (done := (time.perf_counter() - started) / (60 * minutes)) < 1:
        _, frames, size = next(s for i, s in enumerate(c.stages) if done < sum(x[0] for x in c.stages[: i + 1]) + 1e-9)
        scenes, asked = stream.batch(size, frames)
        ids, target, which = encoder.dialogue(asked)
        fresh = step is None or step.clips.shape[:2] != (size, frames)
        if step is None or fresh:
            step = None  # the old graph's memory goes first
            step = Step(model, size, frames, ids.shape[1])
        lr = c.lr * min(1, (number + 1) / c.warmup, (1 - done) / c.decay)
        step.clips.copy_(video.render(scenes))
        step.ids.copy_(ids)
        step.target.copy_(target)
        if fresh and on_gpu:
            step.record()
        step.run()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        hits = step.hits.float().flatten()
        right.index_add_(0, which.flatten(), hits)
        total.index_add_(0, which.flatten(), torch.ones_like(hits))
        losses += step.loss.detach()
        number, since, seen = number + 1, since + 1, seen + size
        if time.perf_counter() - told > LOG_SECONDS:
            told = time.perf_counter()
            line = {"step": number, "frames": frames, "clips": seen, "lr": round(lr, 6), "loss": round(float(losses) / since, 4)}
            line |= {"seconds": round(time.perf_counter() - started, 1)} | accuracy_line(right, total)
            log.write(json.dumps(line) + "\n")
            log.flush()
            print({k: v for k, v in line.items() if not k[1:].isdigit()}, flush=True)
            right.zero_(), total.zero_(), losses.zero_()
            since = 0
    log.close()
    return model


@torch.no_grad()
def evaluate(model: Model, count: int, frames: int, batch: int) -> dict[str, object]:
    """Answers to `count` questions about test clips, by generation in bfloat16, each after its own clip and one turn."""
    device, words = model.device, vocabulary()
    tok = tokenizer()
    model = model.eval()
    rows = list(video.samples(count, "test", frames))
    right = {kind: [0, 0] for kind in video.KINDS}
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        inputs = {k: v.to(device) for k, v in encode(model.config, tok, part, device).items()}
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
        got = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for s, tokens in zip(part, got.tolist(), strict=True):
            right[s.kind][0] += video.score(s, words[tokens[0]])
            right[s.kind][1] += 1
    hits, n = (sum(x[i] for x in right.values()) for i in range(2))
    return {"questions": n, "frames": frames, "accuracy": hits / n} | {kind: a / max(b, 1) for kind, (a, b) in right.items()}


def save(model: Model, out: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer."""
    plain = Model(model.config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer().save_pretrained(out)


def save_processor(out: Path) -> None:
    """The processor's files, so that AutoProcessor loads the folder."""
    config = transformers.AutoConfig.from_pretrained(out)
    size = {"height": video.SIZE, "width": video.SIZE}
    half = [0.5, 0.5, 0.5]
    images = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[video.SIZE] * 2], image_mean=half, image_std=half)
    videos = transformers.LlavaOnevisionVideoProcessor(size=size, image_mean=half, image_std=half)
    side = config.vision_config.image_size // config.vision_config.patch_size
    processor = transformers.LlavaOnevisionProcessor(
        images, tokenizer(), videos, num_image_tokens=side * side, vision_feature_select_strategy="full", chat_template=CHAT
    )
    processor.save_pretrained(out)


def main() -> None:
    """Train, save, evaluate; or add the processor."""
    if sys.argv[1:2] == ["processor"]:
        save_processor(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", choices=CONFIGS, default="base")
    parser.add_argument("--minutes", type=float, default=8.5, help="of training; loading, saving and evaluation come on top")
    parser.add_argument("--questions", type=int, default=1536, help="of the evaluation at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = replace(CONFIGS[options.config], seed=options.seed)
    began = time.perf_counter()
    model = train(config, options.out, options.minutes, torch.device(options.device))
    save(model, options.out)
    plain = Model.from_pretrained(options.out, dtype=torch.bfloat16).to(options.device)
    result = evaluate(plain, options.questions, config.stages[-1][1], 64)
    result |= {"config": options.config, "minutes": options.minutes, "seconds": time.perf_counter() - began}
    (options.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
