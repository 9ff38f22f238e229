"""Generated clips of coloured shapes that move, collide, appear and vanish, with questions about them.

Everything about a clip is decided by its number through integer arithmetic, on any device: the same number gives the same
clip, frames, questions and answers. A clip belongs to the test split if the hash of its contents says so, so that no test clip
is ever trained on. Whole batches of clips are simulated and rendered at once, fast enough to train on without storing any.
(Longer than other files: what happens in a clip, how it looks and what is asked go by one set of rules.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import BitsAndHeadsError
from . import Sample

Split = Literal["train", "test"]

CELL = 6  # pixels; shapes move from cell to cell
GRID = 12  # cells
SPAN = 2  # cells, of every shape
SIZE = GRID * CELL  # pixels, of a frame
OBJECTS = 5  # at most, in a clip
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
PALETTE = (  # background first
    (128, 128, 128),
    (230, 30, 30),
    (30, 180, 40),
    (40, 60, 240),
    (240, 230, 40),
    (150, 40, 190),
    (40, 220, 230),
    (250, 140, 20),
    (245, 245, 245),
)
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("0", "1", "2", "3", "4", "5")
WAYS = ("left", "right", "up", "down", "nowhere")
ANSWERS = (*COLORS, *SHAPES, *NUMBERS, *WAYS, "yes", "no", "top", "bottom", "nothing")
KINDS = ("frame", "motion", "order", "count")
MIDDLE = (GRID - SPAN) // 2  # cell of a shape in the middle
GAP = 2  # frames between two events whose order is asked
TEST_SHARE = 16  # one clip in so many is a test clip


class VideoTaskError(BitsAndHeadsError, ValueError):
    """A clip that cannot be generated as asked."""


# -- numbers from a counter ---------------------------------------------------------------------------------------------------


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN = 0x9E3779B97F4A7C15


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), int64 in and out."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


class Draws:
    """Random integers that depend on the clip's number and on how many were drawn before."""

    def __init__(self, ids: Tensor, stream: int = 0) -> None:
        self.state = _mix(_mix(ids) + _signed(GOLDEN * (stream + 1)))
        self.drawn = 0

    def __call__(self, low: int, high: int, columns: int = 0) -> Tensor:
        """int64 [N] or [N, columns], low <= x < high."""
        at = torch.arange(self.drawn + 1, self.drawn + max(columns, 1) + 1, device=self.state.device)
        self.drawn += max(columns, 1)
        out = _shift(_mix(self.state[:, None] + at * _signed(GOLDEN)), 1) % (high - low) + low
        return out if columns else out[:, 0]


# -- scenes -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """A batch of N clips of T frames with K = OBJECTS slots, the first `count` of them in use.

    Attributes (int64 unless said otherwise):
        ids: [N]. count: [N].
        color, shape: [N, K] indices of COLORS and SHAPES; the colours of a clip differ, those of empty slots too.
        begin, end: [N, K] first frame, and the frame from which it is gone (T: never).
        way: [N, K] index of WAYS when it begins.
        period: [N, K] frames between two steps of one cell.
        place: [N, T, K, 2] upper left cell (x, y), 0 .. GRID - SPAN.
        alive: bool [N, T, K].
        turns: [N, K] how often it reversed. first_turn: [N, K] frame, or T.
        hit: [N, K, K] frame of the first collision of two shapes, or T.
        clean: bool [N, K] no collision or turn so late that it could not be seen.
        total_colors: [N, 8] all colours in the clip's own order: `color` and then the absent ones.
    """

    ids: Tensor
    count: Tensor
    color: Tensor
    shape: Tensor
    begin: Tensor
    end: Tensor
    way: Tensor
    period: Tensor
    place: Tensor
    alive: Tensor
    turns: Tensor
    first_turn: Tensor
    hit: Tensor
    clean: Tensor
    total_colors: Tensor

    @property
    def frames(self) -> int:
        """T."""
        return self.place.shape[1]

    def pick(self, index: Tensor | slice) -> "Scenes":
        """The clips of these indices (or of a slice or bool mask)."""
        return Scenes(**{name: t[index] for name, t in vars(self).items()})

    def objects(self, which: Tensor) -> Callable[[Tensor], Tensor]:
        """which: [N] slots -> a function that reads them off a tensor [N, K]."""
        return lambda t: t.gather(1, which[:, None])[:, 0]


def simulate(ids: Tensor, frames: int) -> tuple[Scenes, Tensor, Tensor]:
    """The clips of these numbers.

    Args:
        ids: int64 [N], on the device where everything is made.
        frames: T, at least 8.
    Returns:
        scenes, whether each is possible (nothing appears on top of another shape) bool [N], and its content's hash int64 [N].
    Raises:
        VideoTaskError: fewer than 8 frames.
    """
    if frames < 8:
        raise VideoTaskError(f"frames is {frames}; a clip needs at least 8.")
    draw, device, n, k, t_all = Draws(ids), ids.device, len(ids), OBJECTS, frames
    slot = torch.arange(k, device=device)
    crowd = torch.tensor([14, 32, 60], device=device)  # crowded scenes are often impossible, so drawn more often
    count = 2 + (draw(0, 100, 1) >= crowd).sum(1, keepdim=True)
    exists = slot < count
    order = draw(0, 1 << 40, len(COLORS)).argsort(dim=1)
    shape = draw(0, len(SHAPES), k)
    late = (draw(0, 100, k) < 55) & (slot > 0)
    begin = torch.where(late, draw(2, t_all - 4, k), 0)
    brief = draw(0, 100, k) < 30
    stay = torch.where(brief, draw(3, 6, k), draw(max(3, t_all // 6), t_all, k))
    end = torch.where((draw(0, 100, k) < 60) & (begin + stay <= t_all - 2), begin + stay, t_all)
    way, period = draw(0, len(WAYS), k), draw(2, 5, k)
    start = torch.stack([draw(0, GRID - SPAN + 1, k) for _ in range(2)], -1)
    velocity = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]], device=device)[way]
    content = [x * exists for x in (order[:, :k], shape, begin, end, way, period, start[..., 0], start[..., 1])]
    digest = torch.full((n,), t_all, device=device)
    for column in torch.cat([count, *content], 1).T:
        digest = _mix(digest + column)

    place, here, alive = torch.empty(n, t_all, k, 2, dtype=torch.long, device=device), start, []
    never = torch.full((n, k), t_all, device=device)
    turns, first_turn, last_event = torch.zeros_like(never), never.clone(), torch.full_like(never, -9)
    hit = torch.full((n, k, k), t_all, device=device)
    possible = torch.ones(n, dtype=torch.bool, device=device)
    apart = ~torch.eye(k, dtype=torch.bool, device=device)

    def touching(a: Tensor, b: Tensor) -> Tensor:
        return ((a[:, :, None] - b[:, None]).abs() < SPAN).all(-1)

    for t in range(t_all):
        now = exists & (begin <= t) & (t < end)
        moved = now & (begin < t) & ((t - begin) % period == 0)
        ahead = here + velocity * moved[..., None]
        wall = ((ahead < 0) | (ahead > GRID - SPAN)).any(-1)
        velocity = torch.where(wall[..., None], -velocity, velocity)
        ahead = here + velocity * moved[..., None]
        both = now[:, :, None] & now[:, None] & apart
        meet = (touching(ahead, ahead) | touching(here, ahead) | touching(ahead, here)) & both
        fresh = (begin == t) & now
        possible &= ~(meet & (fresh[:, :, None] | fresh[:, None])).any((1, 2))
        struck = meet.any(-1)
        velocity = torch.where(struck[..., None], -velocity, velocity)
        here = torch.where(struck[..., None], here, ahead)
        turned = (wall | struck) & (velocity != 0).any(-1)
        turns += turned
        first_turn = torch.where(turned, first_turn.clamp(max=t), first_turn)
        hit = torch.where(meet, hit.clamp(max=t), hit)
        last_event = torch.where(wall | struck, t, last_event)
        place[:, t] = here
        alive.append(now)
    scenes = Scenes(
        ids,
        count[:, 0],
        order[:, :k],
        shape,
        begin,
        end,
        way,
        period,
        place,
        torch.stack(alive, 1),
        turns,
        first_turn,
        hit,
        last_event + period < end,
        order,
    )
    return scenes, possible, digest


def clips(split: Split, numbers: Tensor, frames: int) -> Scenes:
    """Those of the numbered clips that are possible and belong to the split (about 3 in 8 for "train", 1 in 40 for "test").

    Args:
        numbers: int64 [N].
    Raises:
        VideoTaskError: no such split, or fewer than 8 frames.
    """
    if split not in ("train", "test"):
        raise VideoTaskError(f'split is {split!r}; allowed are "train" and "test".')
    scenes, possible, digest = simulate(numbers, frames)
    return scenes.pick(possible & ((_shift(digest, 8) % TEST_SHARE == 0) == (split == "test")))


def _sprites(device: torch.device) -> Tensor:
    """bool [shapes, w, w]: every shape, w pixels wide, with an empty border of one pixel."""
    half = CELL * SPAN - 1  # in half pixels from the centre
    at = torch.arange(-half - 2, half + 3, 2, device=device)
    y, x = at[:, None], at[None]
    inside = torch.maximum(x.abs(), y.abs()) <= half
    circle = x * x + y * y <= (half + 1) ** 2
    square = torch.maximum(x.abs(), y.abs()) <= half - 2
    triangle = (2 * x.abs() <= y + half + 2) & inside
    cross = (torch.minimum(x.abs(), y.abs()) <= 3) & inside
    return torch.stack([circle, square, triangle, cross])


def render(scenes: Scenes) -> Tensor:
    """Frames: uint8 [N, T, 3, SIZE, SIZE] on the scenes' device."""
    device = scenes.ids.device
    sprites = _sprites(device)
    w = sprites.shape[1]
    table, at = sprites.flatten(), torch.arange(SIZE, device=device)
    canvas = torch.zeros(len(scenes.ids), scenes.frames, SIZE, SIZE, dtype=torch.uint8, device=device)
    for k in range(OBJECTS):
        x, y = ((at - CELL * scenes.place[:, :, k, i, None] + 1).clamp(0, w - 1) for i in range(2))
        row = scenes.shape[:, k, None, None] * w * w + y * w
        mask = table[row[..., None] + x[:, :, None]] & scenes.alive[:, :, k, None, None]
        canvas = torch.where(mask, (scenes.color[:, k] + 1).to(torch.uint8)[:, None, None, None], canvas)
    palette = torch.tensor(PALETTE, dtype=torch.uint8, device=device)
    return torch.stack([palette[:, c][canvas.int()] for c in range(3)], 2)


# -- questions ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One question about each clip: words for {a} and {b} of the template, answer (indices of WORDS and ANSWERS), bool valid, all [N]."""

    a: Tensor
    b: Tensor
    answer: Tensor
    valid: Tensor


WORDS = (*COLORS, *SHAPES)
_COLOR, _SHAPE, _NUMBER, _WAY, _YES, _NO, _TOP, _BOTTOM, _NOTHING = (
    ANSWERS.index(w) for w in ("red", "circle", "0", "left", "yes", "no", "top", "bottom", "nothing")
)
_LEFT, _RIGHT = ANSWERS.index("left"), ANSWERS.index("right")
Ask = Callable[[Scenes, Draws], Asked]


def _one(s: Scenes, draw: Draws) -> Tensor:
    return draw(0, 1 << 40) % s.count


def _two(s: Scenes, draw: Draws) -> tuple[Tensor, Tensor]:
    i = _one(s, draw)
    return i, (i + 1 + draw(0, 1 << 40) % (s.count - 1)) % s.count


def _shape_of(s: Scenes, draw: Draws) -> Asked:
    of = s.objects(_one(s, draw))
    return Asked(of(s.color), of(s.color), _SHAPE + of(s.shape), torch.ones_like(s.count, dtype=torch.bool))


def _exists(s: Scenes) -> Tensor:
    return torch.arange(OBJECTS, device=s.count.device) < s.count[:, None]


def _color_of(s: Scenes, draw: Draws) -> Asked:
    of = s.objects(_one(s, draw))
    alone = ((s.shape == of(s.shape)[:, None]) & _exists(s)).sum(1) == 1
    word = len(COLORS) + of(s.shape)
    return Asked(word, word, _COLOR + of(s.color), alone)


def _is_there(s: Scenes, draw: Draws) -> Asked:
    there = draw(0, 2) == 1
    which = torch.where(there, _one(s, draw), s.count + draw(0, 1 << 40) % (len(COLORS) - s.count))
    color = s.total_colors.gather(1, which[:, None])[:, 0]
    return Asked(color, color, torch.where(there, _YES, _NO), torch.ones_like(there))


def _side_at_end(s: Scenes, draw: Draws) -> Asked:
    of = s.objects(_one(s, draw))
    x = of(s.place[:, -1, :, 0]) - MIDDLE
    return Asked(of(s.color), of(s.color), torch.where(x < 0, _LEFT, _RIGHT), (of(s.end) == s.frames) & (x != 0))


def _height_at_begin(s: Scenes, draw: Draws) -> Asked:
    i = _one(s, draw)
    of = s.objects(i)
    y = s.place[..., 1].gather(1, of(s.begin)[:, None, None].expand(-1, 1, OBJECTS))[:, 0]
    y = of(y) - MIDDLE
    return Asked(of(s.color), of(s.color), torch.where(y < 0, _TOP, _BOTTOM), y != 0)


def _way_first(s: Scenes, draw: Draws) -> Asked:
    of = s.objects(_one(s, draw))
    seen = torch.minimum(of(s.first_turn), of(s.end)) - of(s.begin) > of(s.period)
    return Asked(of(s.color), of(s.color), _WAY + of(s.way), seen)


def _hits_first(s: Scenes, draw: Draws) -> Asked:
    i = _one(s, draw)
    of = s.objects(i)
    times = s.hit.gather(1, i[:, None, None].expand(-1, 1, OBJECTS))[:, 0]
    first, partner = times.sort(dim=1, stable=True)
    never = first[:, 0] == s.frames
    clear = (first[:, 1] - first[:, 0] >= GAP) | never
    answer = torch.where(never, _NOTHING, _COLOR + s.color.gather(1, partner[:, :1])[:, 0])
    return Asked(of(s.color), of(s.color), answer, of(s.clean) & clear & (~never | (draw(0, 100) < 15)))


def _does_hit(s: Scenes, draw: Draws) -> Asked:
    i, j = _two(s, draw)
    times = s.hit.gather(1, i[:, None, None].expand(-1, 1, OBJECTS))[:, 0]
    j = torch.where((times.min(1)[0] < s.frames) & (draw(0, 2) == 1), times.argmin(1), j)
    met = times.gather(1, j[:, None])[:, 0] < s.frames
    clean = s.objects(i)(s.clean) & s.objects(j)(s.clean)
    return Asked(s.objects(i)(s.color), s.objects(j)(s.color), torch.where(met, _YES, _NO), clean & (met | (draw(0, 100) < 25)))


def _earlier(s: Scenes, draw: Draws, when: Tensor) -> Asked:
    i, j = _two(s, draw)
    a, b = s.objects(i)(s.color), s.objects(j)(s.color)
    x, y = s.objects(i)(when), s.objects(j)(when)
    return Asked(a, b, _COLOR + torch.where(x < y, a, b), (x - y).abs() >= GAP)


def _appears_first(s: Scenes, draw: Draws) -> Asked:
    return _earlier(s, draw, s.begin)


def _vanishes_first(s: Scenes, draw: Draws) -> Asked:
    return _earlier(s, draw, torch.where(s.end == s.frames, s.frames + GAP, s.end))


def _appears_next(s: Scenes, draw: Draws) -> Asked:
    of = s.objects(_one(s, draw))
    after = torch.where(_exists(s) & (s.begin > of(s.begin)[:, None]), s.begin, s.frames + GAP)
    times, which = after.sort(dim=1, stable=True)
    none = times[:, 0] > s.frames
    answer = torch.where(none, _NOTHING, _COLOR + s.color.gather(1, which[:, :1])[:, 0])
    clear = (times[:, 0] - of(s.begin) >= GAP) & (none | (times[:, 1] - times[:, 0] >= GAP))
    return Asked(of(s.color), of(s.color), answer, clear & (~none | (draw(0, 100) < 30)))


def _vanishes_before(s: Scenes, draw: Draws) -> Asked:
    i, j = _two(s, draw)
    gone, comes = s.objects(i)(s.end), s.objects(j)(s.begin)
    valid = (comes > 0) & ((gone - comes).abs() >= GAP) & ((gone < comes) | (draw(0, 100) < 35))
    return Asked(s.objects(i)(s.color), s.objects(j)(s.color), torch.where(gone < comes, _YES, _NO), valid)


def _counted(s: Scenes, n: Tensor, word: Tensor | None = None, valid: Tensor | None = None) -> Asked:
    word = torch.zeros_like(n) if word is None else word
    return Asked(word, word, _NUMBER + n.clamp(max=5), torch.ones_like(n, dtype=torch.bool) if valid is None else valid)


def _how_many(s: Scenes, draw: Draws) -> Asked:
    return _counted(s, s.count)


def _how_many_shape(s: Scenes, draw: Draws) -> Asked:
    shape = draw(0, len(SHAPES))
    n = ((s.shape == shape[:, None]) & _exists(s)).sum(1)
    return _counted(s, n, len(COLORS) + shape, (n > 0) | (draw(0, 100) < 50))


def _how_many_turns(s: Scenes, draw: Draws) -> Asked:
    of = s.objects(_one(s, draw))
    turns = of(s.turns)
    return _counted(s, turns, of(s.color), of(s.clean) & (turns <= 3) & ((turns > 0) | (draw(0, 100) < 30)))


def _how_many_at_end(s: Scenes, draw: Draws) -> Asked:
    return _counted(s, (s.alive[:, -1]).sum(1))


def _how_many_vanish(s: Scenes, draw: Draws) -> Asked:
    return _counted(s, (_exists(s) & (s.end < s.frames)).sum(1))


TEMPLATES: tuple[tuple[str, str, Ask], ...] = (
    ("frame", "what shape is the {a} one ?", _shape_of),
    ("frame", "what color is the {a} ?", _color_of),
    ("frame", "is there a {a} shape ?", _is_there),
    ("frame", "is the {a} one left or right at the end ?", _side_at_end),
    ("frame", "is the {a} one at the top or the bottom when it appears ?", _height_at_begin),
    ("motion", "which way does the {a} one move first ?", _way_first),
    ("motion", "what color does the {a} one hit first ?", _hits_first),
    ("motion", "does the {a} one hit the {b} one ?", _does_hit),
    ("order", "which appears first , {a} or {b} ?", _appears_first),
    ("order", "which vanishes first , {a} or {b} ?", _vanishes_first),
    ("order", "what color appears right after {a} ?", _appears_next),
    ("order", "does {a} vanish before {b} appears ?", _vanishes_before),
    ("count", "how many shapes are there in all ?", _how_many),
    ("count", "how many {a} shapes are there ?", _how_many_shape),
    ("count", "how many times does the {a} one turn ?", _how_many_turns),
    ("count", "how many shapes are there at the end ?", _how_many_at_end),
    ("count", "how many shapes vanish ?", _how_many_vanish),
)


@dataclass(frozen=True)
class Questions:
    """Questions about N clips, the valid ones first in each row; all [N, Q].

    Attributes:
        template: index of TEMPLATES. a, b: indices of WORDS. answer: index of ANSWERS. valid: bool.
    """

    template: Tensor
    a: Tensor
    b: Tensor
    answer: Tensor
    valid: Tensor

    def pick(self, index: Tensor | slice) -> "Questions":
        """Those about these clips."""
        return Questions(**{name: t[index] for name, t in vars(self).items()})


def questions(scenes: Scenes, count: int, rounds: int = 2) -> Questions:
    """Up to `count` different questions about each clip, in an order that the clip's number decides.

    Args:
        rounds: how often every template is tried with other shapes.
    """
    rows: list[Asked] = []
    which: list[int] = []
    for r in range(rounds):
        for i, (_, _, ask) in enumerate(TEMPLATES):
            rows.append(ask(scenes, Draws(scenes.ids, 1 + r * len(TEMPLATES) + i)))
            which.append(i)
    a, b, answer, valid = (torch.stack([getattr(x, name) for x in rows], 1) for name in ("a", "b", "answer", "valid"))
    template = torch.tensor(which, device=a.device).expand_as(a)
    same = (template * 64 + torch.minimum(a, b)) * 64 + torch.maximum(a, b)
    repeated = ((same[:, :, None] == same[:, None]) & valid[:, None]).tril(-1).any(-1)
    valid = valid & ~repeated
    key = Draws(scenes.ids, 1000)(0, 1 << 40, len(rows))
    order = torch.where(valid, key, key + (1 << 41)).argsort(dim=1)[:, :count]
    return Questions(*(x.gather(1, order) for x in (template, a, b, answer, valid)))


def text(template: int, a: int, b: int) -> str:
    """The words of a question."""
    return TEMPLATES[template][1].format(a=WORDS[a], b=WORDS[b])


# -- samples ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoSample(Sample):
    """A question about a clip.

    Attributes:
        clip: the clip's number and its frames; `frames_of(samples)` renders it.
        before: another question about the clip and its answer, for a turn before this one.
    """

    clip: tuple[int, int] = (0, 0)
    before: tuple[str, str] = ("", "")


def samples(count: int, split: Split = "test", frames: int = 32, per_clip: int = 8, start: int = 0) -> Iterator[VideoSample]:
    """Questions, `per_clip` (or fewer) for each clip, clips in the order of their numbers.

    Args:
        count: how many questions.
        start: number of the first clip that is tried.
    """
    done, block = 0, 256
    while done < count:
        scenes = clips(split, torch.arange(start, start + block), frames)
        start += block
        if not len(scenes.ids):
            continue
        asked = questions(scenes, per_clip + 1)
        for n, clip in enumerate(scenes.ids.tolist()):
            turns = [_turn(asked, n, q) for q in range(per_clip + 1) if asked.valid[n, q]]
            for q, (question, answer, kind) in enumerate(turns[1:]):
                if done == count:
                    return
                yield VideoSample(f"video-{split}-{frames}-{clip}-{q}", question, answer, kind, clip=(clip, frames), before=turns[0][:2])
                done += 1


def _turn(asked: Questions, n: int, q: int) -> tuple[str, str, str]:
    """Question, answer and kind."""
    template, a, b, answer = (int(x[n, q]) for x in (asked.template, asked.a, asked.b, asked.answer))
    return text(template, a, b), ANSWERS[answer], TEMPLATES[template][0]


def frames_of(samples: Sequence[VideoSample], device: torch.device | str = "cpu") -> Tensor:
    """The clips of samples that are equally long, uint8 [B, T, 3, SIZE, SIZE].

    Raises:
        VideoTaskError: they are not equally long.
    """
    lengths = {s.clip[1] for s in samples}
    if len(lengths) != 1:
        raise VideoTaskError(f"The samples' clips have {sorted(lengths)} frames; render those of one length together.")
    numbers, which = torch.tensor([s.clip[0] for s in samples], device=device).unique(return_inverse=True)
    return render(simulate(numbers, lengths.pop())[0])[which]


def score(sample: Sample, output: str) -> float:
    """1.0 if the first word of the output is the answer (case, spaces and a full stop aside), else 0.0."""
    words = output.lower().replace(".", " ").split()
    return float(bool(words) and words[0] == sample.answer)
