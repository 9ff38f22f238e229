"""The tile: layout, sizes, codes and metadata through its bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import quants

import bitsandheads as bh
from bitsandheads.errors import NotFiniteError
from bitsandheads.quant import metadata, planes
from bitsandheads.quant.spec import channel_block
from bitsandheads.quant.tile import HalfLayout, TileLayout

HEAD_DIMS = [16, 40, 64, 80, 96, 128, 256]


def random_codes(half: HalfLayout, lead: tuple[int, ...], seed: int) -> torch.Tensor:
    top = torch.tensor(half.top)[:, None]
    x = torch.rand(*lead, half.head_dim, half.tokens, generator=torch.Generator().manual_seed(seed))
    return (x * (top + 1)).long().clamp(max=top).to(torch.uint8)


@settings(max_examples=100)
@given(quant=quants(), head_dim=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 99))
def test_codes_and_metadata_round_trip(quant: bh.KVQuant, head_dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    for half in (TileLayout.of(quant, head_dim).keys, TileLayout.of(quant, head_dim).values):
        codes = random_codes(half, (2, 3), seed)
        steps = torch.rand(2, 3, half.groups, half.counts[0]) * 10
        centres = torch.randn(2, 3, half.groups, half.counts[1])
        (step_bytes, step_factor, kept_steps), (centre_bytes, centre_factor, kept_centres) = (
            metadata.encode(x, half.fmt) for x in (steps, centres)
        )
        data = half.write(codes, step_bytes, centre_bytes, torch.cat([step_factor, centre_factor], -1))
        assert data.shape == (2, 3, half.nbytes) and data.dtype is torch.uint8
        assert torch.equal(half.read_codes(data), codes)
        got_steps, got_centres = half.read_metadata(data)
        assert torch.equal(got_steps, kept_steps) and torch.equal(got_centres, kept_centres)


@settings(max_examples=100)
@given(quant=quants(), head_dim=st.sampled_from(HEAD_DIMS))
def test_bytes_are_what_the_layout_promises(quant: bh.KVQuant, head_dim: int) -> None:
    layout = TileLayout.of(quant, head_dim)
    assert layout.nbytes == layout.keys.nbytes + layout.values.nbytes and layout.nbytes % 16 == 0
    for half in (layout.keys, layout.values):
        spec, size = half.spec, metadata.itemsize(half.fmt)
        code_bits = sum(n * int(c.bits) for c, n in zip(spec.classes, half.sizes, strict=True) if c.bits != "ternary") * quant.tile
        code_bits += sum(n for c, n in zip(spec.classes, half.sizes, strict=True) if c.bits == "ternary") * quant.tile * 8 / 5
        sections = half.sections
        codes = sum(sections[name][1] for name in ("two", "one", "trits"))
        assert code_bits / 8 <= codes <= code_bits / 8 + 1 + (16 if quant.tile == 16 else 0)
        if spec.per == "token":
            n = quant.tile * head_dim // channel_block(head_dim)
            steps, centres, groups = n, n * spec.classes[0].centre, 1
        else:
            groups = quant.tile // quant.group_size
            steps = sum(n for c, n in zip(spec.classes, half.sizes, strict=True) if c.bits != 0) * groups
            centres = sum(n for c, n in zip(spec.classes, half.sizes, strict=True) if c.centre) * groups
        assert sections["steps"][1] == steps * size and sections["centres"][1] == centres * size
        assert sections["factors"][1] == (4 * groups if half.fmt == "fp8" else 0)
        end = 0
        for offset, n in sections.values():  # in order, aligned, without overlap and without holes of 16 bytes
            assert offset % 16 == 0 and end <= offset < end + 16
            end = offset + n
        assert end <= half.nbytes < end + 16


@settings(max_examples=50)
@given(quant=quants(), head_dim=st.sampled_from(HEAD_DIMS))
def test_slots_cover_every_bit_of_every_axis_once(quant: bh.KVQuant, head_dim: int) -> None:
    half = TileLayout.of(quant, head_dim).keys
    capacity = [0] * head_dim
    used: dict[int, list[int]] = {1: [], 2: []}
    for s in half.slots:
        used[s.bits] += range(s.first, s.first + s.count)
        for axis in range(s.axis, s.axis + s.count):
            capacity[axis] += ((1 << s.bits) - 1) * s.weight
    first, count = half.trit_axes
    expected = [0 if first <= a < first + count else top for a, top in enumerate(half.top)]
    assert capacity == expected
    for bits, slots in used.items():
        assert slots == list(range(half.plane_slots(bits)))


def test_a_tile_by_hand() -> None:
    """Three bits of one axis: the two low ones in its two-bit slot, the high one in its one-bit slot."""
    spec = bh.TensorQuant((bh.AxisClass(3, 0.5), bh.AxisClass(2, 0.25), bh.AxisClass(0, 0.25)))
    half = HalfLayout("values", spec, 32, 128, 64, "fp8")
    assert half.sizes == [16, 8, 8] and [(s.bits, s.first, s.axis, s.count, s.weight) for s in half.slots] == [
        (2, 0, 0, 16, 1),
        (2, 16, 16, 8, 1),
        (1, 0, 0, 16, 4),
    ]
    assert half.sections == {
        "two": (0, 768), "one": (768, 256), "trits": (1024, 0), "steps": (1024, 48), "centres": (1072, 64), "factors": (1136, 8)
    }  # fmt: skip
    codes = torch.zeros(32, 128, dtype=torch.uint8)
    codes[5, 17] = 6
    data = half.write(codes, torch.zeros(2, 24, dtype=torch.uint8), torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 2).half())
    two, one = data[:768], data[768:1024]
    assert planes.unpack_value_plane(two, 2, 128)[5, 17] == 2 and planes.unpack_value_plane(one, 1, 128)[5, 17] == 1
    assert int((data != 0).sum()) == 2


@pytest.mark.parametrize("fmt", ["fp16", "fp8"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_metadata_are_rounded_as_little_as_their_format_allows(fmt: str, scale: float) -> None:
    x = torch.randn(5, 3, 40) * scale
    data, factor, kept = metadata.encode(x, fmt)
    assert data.shape == (5, 3, 40 * metadata.itemsize(fmt)) and factor.shape == (5, 3, 1) and factor.dtype is torch.float16
    assert torch.equal(metadata.decode(data, factor, fmt), kept)
    largest = x.abs().amax(-1, keepdim=True)
    relative, smallest = (2**-11, 2**-25) if fmt == "fp16" else (2**-4 + 2**-10, largest / 448 * 2**-10)
    assert ((kept - x).abs() <= x.abs() * relative + smallest * 1.01).all()


@pytest.mark.parametrize("fmt", ["fp16", "fp8"])
def test_metadata_of_nothing_and_of_zeros(fmt: str) -> None:
    data, factor, kept = metadata.encode(torch.zeros(2, 0), fmt)
    assert data.shape == (2, 0) and factor.shape == (2, 1) and kept.shape == (2, 0)
    data, factor, kept = metadata.encode(torch.zeros(2, 4), fmt)
    assert torch.equal(kept, torch.zeros(2, 4)) and torch.equal(metadata.decode(data, factor, fmt), kept)


@pytest.mark.parametrize("fmt", ["fp16", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e7])
def test_metadata_out_of_range(fmt: str, value: float) -> None:
    with pytest.raises(NotFiniteError, match="metadata hold at most"):
        metadata.encode(torch.tensor([[1.0, value]]), fmt)
