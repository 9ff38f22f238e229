"""Generated clips: the same for the same number, possible, never shared between splits, and with answers that the pixels bear out."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch

from bitsandheads.tasks import Sample, video

FRAMES = 32
FIRST = ("video-test-32-33-0", "what shape is the orange one ?", "square", ("is there a white shape ?", "yes"))
FIRST_SUM = 63859072


@pytest.fixture(scope="module")
def scenes() -> video.Scenes:
    return video.clips("train", torch.arange(600), FRAMES)


@pytest.fixture(scope="module")
def samples() -> list[video.VideoSample]:
    return list(video.samples(400, "test", FRAMES, per_clip=12))


def colors_in(frame: torch.Tensor) -> dict[str, tuple[int, int, int]]:
    """Color -> (pixels, left edge, upper edge), read off a frame [3, H, W]."""
    found = {}
    for name, rgb in zip(video.COLORS, video.PALETTE[1:], strict=True):
        y, x = (frame == torch.tensor(rgb, dtype=torch.uint8)[:, None, None]).all(0).nonzero(as_tuple=True)
        if len(x):
            found[name] = (len(x), int(x.min()), int(y.min()))
    return found


# -- clips -----------------------------------------------------------------------------------------------------------------------


def test_a_number_is_a_clip() -> None:
    """Alone, in another batch and another order it is the same clip with the same questions."""
    together, possible, digest = video.simulate(torch.arange(40), FRAMES)
    asked = video.questions(together, 10)
    for i in (0, 7, 39):
        alone, fine, other = video.simulate(torch.tensor([i, 3]), FRAMES)
        assert (possible[i], digest[i]) == (fine[0], other[0])
        for name, value in vars(alone.pick(slice(0, 1))).items():
            assert torch.equal(value, getattr(together, name)[i : i + 1]), name
        mine = video.questions(alone, 10)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(vars(mine).values(), vars(asked).values(), strict=True))
    assert len(set(digest.tolist())) == 40


def test_this_clip_never_changes() -> None:
    """A clip as it was when the generator was written, so that a trained model goes on meeting the clips it was trained for."""
    (clip,) = video.samples(1, "test", 32)
    assert (clip.id, clip.prompt, clip.answer, clip.before) == FIRST
    frames = video.frames_of([clip])[0]
    assert int(frames.long().sum()) == FIRST_SUM


def test_splits_share_nothing() -> None:
    numbers = torch.arange(1000)
    train, test = (video.clips(s, numbers, FRAMES) for s in ("train", "test"))
    possible = video.simulate(numbers, FRAMES)[1]
    assert not set(train.ids.tolist()) & set(test.ids.tolist())
    assert len(train.ids) + len(test.ids) == int(possible.sum())
    assert 0.02 < len(test.ids) / int(possible.sum()) < 0.1


def test_shapes_keep_apart_and_inside(scenes: video.Scenes) -> None:
    assert int(scenes.place.min()) >= 0 and int(scenes.place.max()) <= video.GRID - video.SPAN
    gap = (scenes.place[:, :, :, None] - scenes.place[:, :, None]).abs().amax(-1)
    both = scenes.alive[:, :, :, None] & scenes.alive[:, :, None] & ~torch.eye(video.OBJECTS, dtype=torch.bool)
    assert int(gap[both].min()) >= video.SPAN
    step = (scenes.place[:, 1:] - scenes.place[:, :-1]).abs().sum(-1)
    assert int(step.max()) == 1


def test_turns_and_collisions_follow_from_the_places(scenes: video.Scenes) -> None:
    """Reversals counted from the way that shapes go, where nothing is hidden by a stop at the end."""
    checked = 0
    for n in range(60):
        for k in range(int(scenes.count[n])):
            if not scenes.clean[n, k] or scenes.way[n, k] == 4:
                continue
            path = [scenes.place[n, t, k] for t in range(FRAMES) if scenes.alive[n, t, k]]
            moves = [tuple((b - a).tolist()) for a, b in pairwise(path) if not torch.equal(a, b)]
            if len(moves) > 3 and int(scenes.turns[n, k]) <= 2:
                start = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}[int(scenes.way[n, k])]
                seen = sum(a != b for a, b in pairwise([start, *moves]))
                assert (int(scenes.turns[n, k]) - seen) % 2 == 0 and seen <= int(scenes.turns[n, k])
                checked += 1
    assert checked > 40
    assert torch.equal(scenes.hit, scenes.hit.transpose(1, 2))


@pytest.mark.parametrize("frames", [8, 20, 64])
def test_clips_of_any_length(frames: int) -> None:
    scenes = video.clips("train", torch.arange(60), frames)
    assert video.render(scenes).shape == (len(scenes.ids), frames, 3, video.SIZE, video.SIZE)
    assert bool(scenes.alive[:, 0].any(1).all())


def test_bad_requests() -> None:
    with pytest.raises(video.VideoTaskError, match="frames is 7; a clip needs at least 8"):
        video.simulate(torch.arange(2), 7)
    with pytest.raises(video.VideoTaskError, match='"train" and "test"'):
        video.clips("dev", torch.arange(2), 8)
    long, short = (next(iter(video.samples(1, "test", n))) for n in (32, 16))
    with pytest.raises(video.VideoTaskError, match=r"\[16, 32\] frames"):
        video.frames_of([long, short])


# -- pixels ----------------------------------------------------------------------------------------------------------------------


def test_frames_show_the_scene(scenes: video.Scenes) -> None:
    frames = video.render(scenes.pick(slice(0, 12)))
    for n in range(12):
        for t in range(0, FRAMES, 3):
            seen = colors_in(frames[n, t])
            alive = [k for k in range(video.OBJECTS) if scenes.alive[n, t, k]]
            assert set(seen) == {video.COLORS[scenes.color[n, k]] for k in alive}
            for k in alive:
                _, left, top = seen[video.COLORS[scenes.color[n, k]]]
                x, y = (scenes.place[n, t, k] * video.CELL).tolist()
                assert x <= left <= x + 1 and y <= top <= y + 1


def test_shapes_differ() -> None:
    sprites = video._sprites(torch.device("cpu"))
    for i, a in enumerate(sprites):
        for b in sprites[i + 1 :]:
            assert int((a ^ b).sum()) >= 16
    assert not sprites[:, 0].any() and not sprites[:, :, 0].any()


# -- answers -----------------------------------------------------------------------------------------------------------------------


def test_answers_from_pixels_alone(samples: list[video.VideoSample]) -> None:
    """Every question whose answer can be read off the pixels in a few lines, worked out again from the rendered frames."""
    checked = Counter()
    clips = {s.clip: s for s in samples}
    frames_by_clip = {clip: [colors_in(f) for f in video.frames_of([s])[0]] for clip, s in clips.items()}
    for s in samples:
        frames = frames_by_clip[s.clip]
        ever = {c for f in frames for c in f}
        first = {c: next(t for t, f in enumerate(frames) if c in f) for c in ever}
        last = {c: max(t for t, f in enumerate(frames) if c in f) for c in ever}
        gone = {c: last[c] + 1 for c in ever if last[c] + 1 < FRAMES}
        words = re.findall("|".join(video.COLORS), s.prompt)
        middle = video.MIDDLE * video.CELL
        answer = None
        if s.prompt.startswith("is there"):
            answer = "yes" if words[0] in ever else "no"
        elif s.prompt.startswith("which appears first"):
            answer = min(words, key=first.__getitem__)
        elif s.prompt.startswith("which vanishes first"):
            answer = min(words, key=lambda c: gone.get(c, 99))
        elif "vanish before" in s.prompt:
            answer = "yes" if gone.get(words[0], 99) < first[words[1]] else "no"
        elif s.prompt == "how many shapes are there in all ?":
            answer = str(len(ever))
        elif s.prompt == "how many shapes are there at the end ?":
            answer = str(len(frames[-1]))
        elif s.prompt == "how many shapes vanish ?":
            answer = str(len(gone))
        elif "left or right at the end" in s.prompt:
            answer = "left" if frames[-1][words[0]][1] < middle else "right"
        elif "top or the bottom" in s.prompt:
            answer = "top" if frames[first[words[0]]][words[0]][2] < middle else "bottom"
        elif s.prompt.startswith("which way"):
            path = [frames[t][words[0]][1:] for t in range(first[words[0]], last[words[0]] + 1)]
            a, b = next(((a, b) for a, b in pairwise(path) if a != b), ((0, 0), (0, 0)))
            ways = {(-6, 0): "left", (6, 0): "right", (0, -6): "up", (0, 6): "down", (0, 0): "nowhere"}
            answer = ways[b[0] - a[0], b[1] - a[1]]
        if answer is not None:
            assert s.answer == answer, s
            checked[s.prompt.split()[0] + " " + s.prompt.split()[1]] += 1
    assert sum(checked.values()) > 200 and len(checked) >= 6, checked


def test_shape_answers(scenes: video.Scenes) -> None:
    """Each shape has its own number of pixels."""
    counts = {int(n): video.SHAPES[i] for i, n in enumerate(video._sprites(torch.device("cpu")).sum((1, 2)))}
    assert len(counts) == 4
    asked = [s for s in video.samples(300, "test", 8) if s.prompt.startswith("what shape is the")]
    assert len(asked) > 10
    for s in asked:
        color = s.prompt.split()[4]
        seen = next(f[color] for f in map(colors_in, video.frames_of([s])[0]) if color in f)
        assert counts[seen[0]] == s.answer


def test_every_kind_and_answer_is_asked(samples: list[video.VideoSample]) -> None:
    kinds = Counter(s.kind for s in samples)
    assert set(kinds) == set(video.KINDS) and min(kinds.values()) > 20
    assert len({s.answer for s in samples}) > 20
    assert all(s.answer in video.ANSWERS for s in samples)


def test_no_answer_can_be_guessed_from_the_words() -> None:
    """No template has an answer that is right more than half of the time, but for yes, no and the few that numbers allow."""
    scenes = video.clips("train", torch.arange(4000), FRAMES)
    asked = video.questions(scenes, 34)
    for i, (_, template, _) in enumerate(video.TEMPLATES):
        answers = asked.answer[(asked.template == i) & asked.valid]
        share = answers.bincount().max() / len(answers)
        assert len(answers) > 100 and share < (0.8 if template.startswith("does") else 0.6), (template, float(share))


def test_a_clip_is_asked_nothing_twice(samples: list[video.VideoSample]) -> None:
    assert len({s.id for s in samples}) == len(samples)
    by_clip: dict[tuple[int, int], list[str]] = {}
    for s in samples:
        by_clip.setdefault(s.clip, [s.before[0]]).append(s.prompt)
    for s, questions in zip(samples, [by_clip[s.clip] for s in samples], strict=True):
        assert len(set(questions)) == len(set(by_clip[s.clip])) and s.prompt != s.before[0] and s.before[1] in video.ANSWERS
    assert all(len(q) - 1 == len(set(q[1:])) for q in by_clip.values())


@pytest.mark.parametrize("output, right", [("red", 1), (" Red.", 1), ("red blue", 1), ("blue red", 0), ("", 0), ("reddish", 0)])
def test_score(output: str, right: float) -> None:
    assert video.score(Sample("x", "which ?", "red"), output) == right
