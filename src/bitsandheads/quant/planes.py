"""Bit planes: how unsigned codes of 1 or 2 bits, and trits, lie in memory. The one place that knows.

A *tile* is `tokens` consecutive tokens (16, 32, 64 or 128) of one KV head. Token t of a tile is written t = 16 f + i: row i
of field f. A *slot* is one code for each token of the tile. Slots are packed into 16-bit words; a word of a plane with
`bits`-bit codes holds F = tokens / 16 fields of E = 16 / bits / F slots, at bit (f E + e) * bits:

    two bits, 128 tokens (F = 8, E = 1)      one bit, 128 tokens (F = 8, E = 2)
    bit 15 14 ... 3 2 1 0                    bit 15     14     ... 1      0
        f=7    ... f=1 f=0                       f7 e1  f7 e0      f0 e1  f0 e0

so that `word & (3 << 2 f)`, read as an fp16 subnormal, *is* code * 2^(2 f - 24): a tensor-core operand without conversion.
A plane of n slots has C = ceil(n / E) word columns; slot s is (e, c) = divmod(s, C). (n is a multiple of 8, so that it is
one of E too, except for one-bit planes of 16-token tiles, where E = 16: there up to 8 slots stay empty.)

    key plane    int16 [C / W, 16 rows i, W]     W = gcd(C, 32): one lane reads 8 neighbouring slots in 16 bytes
    value plane  int16 [C, 16 columns i]

Trits (codes 0, 1, 2) are the codes of the words of a two-bit value plane, in order (of the words, and of the bits of a word), five to a byte in base 3:
1.6 bits for each element. The 40 codes of five words fill eight bytes, so a kernel makes words of bytes without a look at what is beside them:
with q_n = byte // 3^n the five codes are the bits of byte + q_1 + 4 q_2 + 16 q_3 + 64 q_4.
"""

import math

import torch
from torch import Tensor

ROWS = 16
WORD_BITS = 16
TRITS_PER_BYTE = 5


def fields(tokens: int) -> int:
    """Number of 16-token fields in a tile of `tokens` tokens."""
    return tokens // ROWS


def slots_per_word(bits: int, tokens: int) -> int:
    """E: how many slots share one 16-bit word."""
    return WORD_BITS // bits // fields(tokens)


def plane_bytes(slots: int, bits: int, tokens: int) -> int:
    """Bytes of a plane: slots * tokens * bits / 8, slots rounded up to whole words."""
    return 2 * ROWS * -(-slots // slots_per_word(bits, tokens))


def trit_bytes(slots: int, tokens: int) -> int:
    """Bytes of a trit plane: five trits a byte, slots rounded up to whole words, the last byte filled up."""
    words = ROWS * -(-slots // slots_per_word(2, tokens))
    return -(-words * (WORD_BITS // 2) // TRITS_PER_BYTE)


def _shifts(bits: int, tokens: int, device: torch.device) -> Tensor:
    """Bit positions [E, F] of (slot in word, field)."""
    f, e = fields(tokens), slots_per_word(bits, tokens)
    return (torch.arange(f, device=device)[None] * e + torch.arange(e, device=device)[:, None]) * bits


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """codes [..., slots, tokens] -> words int32 [..., C, 16 rows]."""
    *lead, slots, tokens = codes.shape
    e, f = slots_per_word(bits, tokens), fields(tokens)
    if slots % e:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -slots % e))
        slots = codes.shape[-2]
    split = codes.to(torch.int32).reshape(*lead, e, slots // e, f, ROWS)
    shifts = _shifts(bits, tokens, codes.device)[:, None, :, None]
    return (split << shifts).sum((-4, -2), dtype=torch.int32)


def _from_words(words: Tensor, bits: int, tokens: int) -> Tensor:
    """words int16 [..., C, 16 rows] -> codes uint8 [..., slots, tokens]."""
    *lead, columns, _ = words.shape
    e = slots_per_word(bits, tokens)
    shifts = _shifts(bits, tokens, words.device)[:, None, :, None].to(torch.int16)
    codes = (words[..., None, :, None, :] >> shifts) & ((1 << bits) - 1)  # the mask takes the sign's copies away
    return codes.to(torch.uint8).reshape(*lead, e * columns, tokens)


def _as_bytes(words: Tensor) -> Tensor:
    """int32 words below 2^16 -> their low 16 bits as uint8 [..., 2 * words]."""
    signed = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    return signed.contiguous().flatten(-1).view(torch.uint8)


def pack_key_plane(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of keys.

    Args:
        codes: integers below 2^bits, [..., slots, tokens].
        bits: 1 or 2.
    Returns:
        uint8 [..., plane_bytes].
    """
    words = _to_words(codes, bits).transpose(-1, -2)  # [..., 16, C]
    columns = words.shape[-1]
    width = math.gcd(columns, 32)
    words = words.unflatten(-1, (columns // width, width)).transpose(-3, -2)  # [..., C / W, 16, W]
    return _as_bytes(words.flatten(-3))


def unpack_key_plane(data: Tensor, bits: int, tokens: int) -> Tensor:
    """Inverse of `pack_key_plane`: uint8 [..., plane_bytes] -> codes uint8 [..., slots (and empty ones), tokens]."""
    words = data.contiguous().view(torch.int16)
    columns = words.shape[-1] // ROWS
    width = math.gcd(columns, 32)
    words = words.unflatten(-1, (columns // width, ROWS, width)).transpose(-3, -2).flatten(-2)  # [..., 16, C]
    return _from_words(words.transpose(-1, -2), bits, tokens)


def pack_value_plane(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of values: [..., slots, tokens] -> uint8 [..., plane_bytes]."""
    return _as_bytes(_to_words(codes, bits).flatten(-2))


def unpack_value_plane(data: Tensor, bits: int, tokens: int) -> Tensor:
    """Inverse of `pack_value_plane`: uint8 [..., plane_bytes] -> codes uint8 [..., slots (and empty ones), tokens]."""
    words = data.contiguous().view(torch.int16).unflatten(-1, (-1, ROWS))
    return _from_words(words, bits, tokens)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack ternary codes 0, 1, 2: [..., slots, tokens] -> uint8 [..., trit_bytes]."""
    e, f = slots_per_word(2, codes.shape[-1]), fields(codes.shape[-1])
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % e)).to(torch.uint8)
    flat = codes.unflatten(-1, (f, ROWS)).unflatten(-3, (e, -1)).movedim(-4, -1).transpose(-2, -3).flatten(-4)  # [..., C, row, f, e]
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % TRITS_PER_BYTE)).unflatten(-1, (-1, TRITS_PER_BYTE))
    weights = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device)
    return (flat * weights).sum(-1, dtype=torch.uint8)


def unpack_trits(data: Tensor, slots: int, tokens: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 [..., trit_bytes] -> codes uint8 [..., slots, tokens]."""
    e, f = slots_per_word(2, tokens), fields(tokens)
    columns = -(-slots // e)
    weights = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=data.device)
    flat = (data[..., None] // weights % 3).flatten(-2)[..., : columns * e * tokens]
    codes = flat.unflatten(-1, (columns, ROWS, f, e)).transpose(-2, -3).movedim(-1, -4)  # [..., e, C, f, row]
    return codes.flatten(-2).flatten(-3, -2)[..., :slots, :]
