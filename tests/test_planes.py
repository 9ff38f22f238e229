"""Bit planes and trits: exact round trips, promised sizes, documented positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitsandheads.quant import planes

TOKENS = [16, 32, 64, 128]


def codes(slots: int, tokens: int, top: int, seed: int = 0, lead: tuple[int, ...] = (2,)) -> torch.Tensor:
    return torch.randint(0, top + 1, (*lead, slots, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(
    eights=st.integers(1, 33), tokens=st.sampled_from(TOKENS), bits=st.sampled_from([1, 2]), kind=st.sampled_from(["key", "value"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip(eights: int, tokens: int, bits: int, kind: str, seed: int) -> None:
    slots = 8 * eights
    x = codes(slots, tokens, 2**bits - 1, seed)
    data = getattr(planes, f"pack_{kind}_plane")(x, bits)
    assert data.dtype is torch.uint8 and data.shape == (2, planes.plane_bytes(slots, bits, tokens))
    exact = slots * tokens * bits // 8
    assert data.shape[-1] == exact or (bits == 1 and tokens == 16 and data.shape[-1] == exact + 16)
    assert torch.equal(getattr(planes, f"unpack_{kind}_plane")(data, bits, tokens)[..., :slots, :], x)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("slots", [16, 64, 80])
def test_documented_positions(tokens: int, bits: int, slots: int) -> None:
    """Set one code; find it at token t = 16 f + i, slot s = (e, c): word (c, i), bit (f E + e) * bits."""
    fields = tokens // 16
    per_word = 16 // bits // fields
    columns = slots // per_word
    width = math.gcd(columns, 32)
    for t in (0, 5, 15, 16 * (fields - 1), tokens - 1):
        for s in (0, 1, columns - 1, columns % slots, slots - 1):
            x = torch.zeros(slots, tokens, dtype=torch.uint8)
            x[s, t] = 2**bits - 1
            (f, i), (e, c) = divmod(t, 16), divmod(s, columns)
            expected = (2**bits - 1) << ((f * per_word + e) * bits)
            for pack, place in (
                (planes.pack_key_plane, (c // width * 16 + i) * width + c % width),
                (planes.pack_value_plane, c * 16 + i),
            ):
                words = pack(x, bits).view(torch.int16).to(torch.int32) & 0xFFFF
                assert words.nonzero().flatten().tolist() == [place]
                assert words[place] == expected


def test_two_bit_word_is_a_subnormal_fp16() -> None:
    """The promise to the kernels: word & (3 << 2 f), read as fp16, is code * 2^(2 f - 24)."""
    x = codes(32, 128, 3, lead=())
    words = planes.pack_value_plane(x, 2).view(torch.int16).view(32, 16)
    for f in range(5):  # fields whose two bits lie within the ten bits of the fraction
        part = (words & (3 << 2 * f)).view(torch.float16).float()
        assert torch.equal(part, x[:, 16 * f : 16 * f + 16].float() * 2.0 ** (2 * f - 24))


@given(slots=st.integers(1, 70), tokens=st.sampled_from(TOKENS), seed=st.integers(0, 99))
def test_trits_round_trip(slots: int, tokens: int, seed: int) -> None:
    x = codes(slots, tokens, 2, seed)
    data = planes.pack_trits(x)
    per_word = planes.slots_per_word(2, tokens)
    whole = -(-slots // per_word) * per_word
    assert data.shape == (2, planes.trit_bytes(slots, tokens)) and planes.trit_bytes(slots, tokens) == math.ceil(whole * tokens / 5)
    assert torch.equal(planes.unpack_trits(data, slots, tokens), x)
    assert int(data.max()) <= 242


@pytest.mark.parametrize("tokens", TOKENS)
def test_trit_bytes_make_the_words_of_a_two_bit_plane(tokens: int) -> None:
    """The promise to the kernels: eight bytes are five words, by sums of quotients."""
    x = codes(40, tokens, 2, lead=())
    words = planes.pack_value_plane(x, 2).view(torch.int16).int() & 0xFFFF
    b = planes.pack_trits(x).long()
    bits = b + b // 3 + 4 * (b // 9) + 16 * (b // 27) + 64 * (b // 81)
    for five, eight in zip(words.split(5), bits.split(8), strict=True):
        stream = sum(int(ten) << 10 * i for i, ten in enumerate(eight))
        assert [stream >> 16 * i & 0xFFFF for i in range(5)][: len(five)] == five.tolist()
