"""Levels, transforms and the codec, against formulas written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import quants

import bitsandheads as bh
from bitsandheads.quant.codec import HalfCodec
from bitsandheads.quant.levels import GAMMA, fit, quantize
from bitsandheads.quant.spec import channel_block
from bitsandheads.quant.tile import TileLayout
from bitsandheads.quant.transforms import fixed_rotation

FIXED = ["none", "hadamard", "dct", "fourier"]


def restored(y: torch.Tensor, cls: bh.AxisClass) -> torch.Tensor:
    """y [tokens, axes] through fit and quantize, in full precision."""
    top = 2 if cls.bits == "ternary" else 2**cls.bits - 1
    step, centre = fit(y, cls)
    return centre + step * (quantize(y, step, centre, top, cls.levels == "ternary").float() - top / 2)


def relative(got: torch.Tensor, x: torch.Tensor) -> float:
    return float((got - x).norm() / x.norm())


# -- levels ------------------------------------------------------------------------------------------------------------------------------

SIGN, TERNARY = bh.AxisClass(1, 1.0, "sign"), bh.AxisClass("ternary", 1.0, "ternary", centre=False)


@pytest.mark.parametrize("cls", [SIGN, TERNARY, bh.AxisClass("ternary", 1.0, "ternary")], ids=str)
def test_least_squares_steps_are_minima(cls: bh.AxisClass) -> None:
    y = torch.randn(64, 40) * torch.rand(40) * 3 + torch.randn(40)
    top = 2 if cls.bits == "ternary" else 1
    step, centre = fit(y, cls)
    codes = quantize(y, step, centre, top, cls.levels == "ternary").float() - top / 2
    error = (centre + step * codes - y).square().sum(0)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert ((centre + factor * step * codes - y).square().sum(0) > error).all()


def test_errors_on_a_normal_distribution() -> None:
    x = torch.randn(128, 200) * 0.2
    assert relative(restored(x, TERNARY), x) <= 0.44
    assert relative(restored(x, SIGN), x) <= 0.61
    errors = [relative(restored(x, bh.AxisClass(bits, 1.0, "gaussian")), x) for bits in range(1, 7)]
    for error, best in zip(errors, [0.603, 0.345, 0.194, 0.108, 0.059, 0.033], strict=True):  # Max (1960), uniform quantizers
        assert error == pytest.approx(best, rel=0.08)


@given(bits=st.integers(1, 6), seed=st.integers(0, 99))
def test_minmax_stays_within_half_a_step(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(32, 8) * torch.rand(8) * 100 + torch.randn(8) * 100
    half_step = (x.amax(0) - x.amin(0)) / (2**bits - 1) / 2
    assert ((restored(x, bh.AxisClass(bits, 1.0, "minmax")) - x).abs() <= half_step * 1.0001 + 1e-4).all()


CLASSES = [bh.AxisClass(b, 1.0, levels) for b in (1, 2, 4) for levels in ("minmax", "gaussian")] + [SIGN, TERNARY, bh.AxisClass(0, 1.0)]


@pytest.mark.parametrize("cls", CLASSES, ids=str)
@pytest.mark.parametrize("metadata", ["fp16", "fp8"])
def test_constant_channels(cls: bh.AxisClass, metadata: str) -> None:
    """A channel without variance restores to itself, as far as its metadata can say it."""
    value = torch.linspace(0.5, 8, 32)
    x = value.expand(1, 1, 32, 32).contiguous()
    quant = bh.KVQuant(bh.TensorQuant((cls,)), bh.TensorQuant((cls,)), tile=32, group_size=32, metadata=metadata)
    codec = HalfCodec(TileLayout.of(quant, 32).keys)
    got = codec.unpack(codec.pack(x, {}), {})
    tolerance = 2**-10 if metadata == "fp16" else 2**-4
    assert ((got - x).abs() <= tolerance * 8.1).all() and got.isfinite().all()
    zero = codec.unpack(codec.pack(torch.zeros_like(x), {}), {})
    assert torch.equal(zero, torch.zeros_like(x))


@pytest.mark.parametrize("cls", [c for c in CLASSES if c.bits != 0], ids=str)
def test_outliers_spoil_only_their_own_channel(cls: bh.AxisClass) -> None:
    x = torch.randn(1, 1, 64, 32)
    wild = x.clone()
    wild[0, 0, 10, 3] = 1e3
    quant = bh.KVQuant(bh.TensorQuant((cls,)), bh.TensorQuant((cls,)), tile=64, group_size=64)
    codec = HalfCodec(TileLayout.of(quant, 32).keys)
    a, b = (codec.unpack(codec.pack(y, {}), {}) for y in (x, wild))
    others = torch.arange(32) != 3
    assert torch.equal(a[..., others], b[..., others]) and b.isfinite().all()
    assert b[0, 0, 10, 3] == b[0, 0, :, 3].max() and b[0, 0, 10, 3] > 10


# -- transforms ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("n", [1, 8, 16, 24, 40, 64, 80, 96, 128, 256])
def test_fixed_rotations_are_orthonormal(name: str, n: int) -> None:
    m = fixed_rotation(name, n).double()
    torch.testing.assert_close(m @ m.T, torch.eye(n, dtype=torch.float64), atol=2e-6, rtol=0)
    assert name == "none" or n == 1 or (m - torch.eye(n)).abs().max() > 0.1


def test_fourier_is_the_discrete_fourier_transform() -> None:
    """Cosine and sine rows hold the real and the (negated) imaginary part of numpy's rfft, normalised."""
    x = torch.randn(64, dtype=torch.float64)
    y, spectrum = fixed_rotation("fourier", 64).double() @ x, torch.fft.rfft(x, norm="ortho")
    torch.testing.assert_close(y[0], spectrum[0].real, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1:-1:2], spectrum[1:-1].real * 2**0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[2:-1:2], -spectrum[1:-1].imag * 2**0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[-1], spectrum[-1].real, atol=1e-5, rtol=1e-5)


def data(head_dim: int, tokens: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(head_dim, head_dim, generator=random) * torch.logspace(0, -1, head_dim)
    return torch.randn(2, 2, tokens, head_dim, generator=random) @ mix + torch.randn(2, 2, 1, head_dim, generator=random) * 3


@settings(max_examples=80)
@given(quant=quants(), head_dim=st.sampled_from([16, 40, 64]), seed=st.integers(0, 99))
def test_encode_decode_and_query(quant: bh.KVQuant, head_dim: int, seed: int) -> None:
    """decode is encode's inverse (but for bfloat16 axes), and q . decode(y) = q' . y + constant for any y."""
    x = data(head_dim, 2 * quant.tile, seed)
    energy = torch.rand(2, 2, head_dim, generator=torch.Generator().manual_seed(seed)) + 0.01
    codec = HalfCodec(TileLayout.of(quant, head_dim).keys)
    basis = codec.find_basis(x, energy)
    y = codec.encode(x, basis)
    spec = quant.keys
    if spec.transform != "principal":
        torch.testing.assert_close(codec.decode(y, basis), x, atol=1e-4, rtol=1e-4)
        assert float((y.norm() - x.norm()).abs()) < 1e-3 * float(x.norm())
    elif not spec.refit and not spec.query_weighted:
        assert relative(codec.decode(y, basis), x) < 0.02
    elif not spec.refit:
        assert relative(codec.decode(y, basis), x) < 0.15  # the map to the axes is kept in fp8
    anything, q = torch.randn_like(y), torch.randn(2, 2, 5, head_dim)
    turned, constant = codec.query(q, basis)
    expected = q.double() @ codec.decode(anything, basis).double().mT
    got = turned.double() @ anything.double().mT + constant[..., None].double()
    torch.testing.assert_close(got, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-4)


@given(order=st.sampled_from(["range", "variance", "query"]), seed=st.integers(0, 99))
def test_ranks_put_the_important_channels_first(order: str, seed: int) -> None:
    spec = bh.TensorQuant((bh.AxisClass(2, 0.5), bh.AxisClass(1, 0.5)), order=order)
    codec = HalfCodec(TileLayout.of(bh.KVQuant(spec, spec, tile=32, group_size=32), 32).keys)
    x, energy = data(32, 64, seed), torch.rand(2, 2, 32) + 0.1
    ranks = codec.find_basis(x, energy)["order"].long()
    weight = {"range": x.amax(2) - x.amin(2), "variance": x.var(2), "query": x.var(2) * energy}[order]
    assert (weight.gather(-1, ranks).diff(dim=-1) <= 1e-5).all()
    assert torch.equal(ranks.sort(-1)[0], torch.arange(32).expand(2, 2, -1))


def test_principal_axes_compact_the_variance() -> None:
    """Most variance lies on the first axes, and of the same bits the principal axes lose less than the channels."""
    classes = (bh.AxisClass(4, 0.25), bh.AxisClass(2, 0.25), bh.AxisClass(0, 0.5))
    errors = {}
    for name in ("none", "principal"):
        spec = bh.TensorQuant(classes, transform=name, order="variance" if name == "none" else "none")
        codec = HalfCodec(TileLayout.of(bh.KVQuant(spec, spec), 64).keys)
        x = data(64, 512, 0)
        basis = codec.find_basis(x, torch.ones(2, 2, 64))
        if name == "principal":
            variance = codec.encode(x, basis).var(2)
            assert variance[..., :16].sum() > 3 * variance[..., 32:].sum()
        errors[name] = relative(codec.unpack(codec.pack(x, basis), basis), x)
    assert errors["principal"] < 0.8 * errors["none"]


# -- a second implementation ---------------------------------------------------------------------------------------------------------------


def oracle(codec: HalfCodec, x: torch.Tensor, basis: dict) -> torch.Tensor:
    """The restored tokens of one (sequence, head), x [T, D], from the formula x' = centre + step * (code - top / 2), channel by channel.

    The bytes are read for steps and centres only; codes are decided here.
    """
    layout, spec = codec.layout, codec.layout.spec
    one = {name: t[None, None] for name, t in basis.items()}
    y = codec.encode(x[None, None], one)[0, 0].double()
    steps, centres = layout.read_metadata(codec.pack(x[None, None], one)[0, 0])
    out = torch.zeros_like(y)
    for n in range(x.shape[0] // layout.tokens):
        for g in range(layout.tokens // layout.group_size):
            rows = slice(n * layout.tokens + g * layout.group_size, n * layout.tokens + (g + 1) * layout.group_size)
            axis = used = centred = 0
            for cls, count in zip(spec.classes, layout.sizes, strict=True):
                for _ in range(count):
                    step = steps[n, g, used].double() if cls.bits != 0 else 0.0
                    centre = centres[n, g, centred].double() if cls.centre else 0.0
                    used, centred = used + (cls.bits != 0), centred + cls.centre
                    z = y[rows, axis] - centre
                    if cls.bits == 0:
                        level = torch.zeros_like(z)
                    elif cls.levels == "ternary":
                        level = torch.where(z.abs() > GAMMA * z.abs().mean(), z.sign(), 0.0)
                    else:
                        top = 2 ** int(cls.bits) - 1
                        levels = torch.arange(top + 1).double() - top / 2
                        level = levels[(z[:, None] - step * levels).abs().argmin(1)]
                    out[rows, axis] = centre + step * level
                    axis += 1
    return codec.decode(out.float()[None, None], one)[0, 0]


@settings(max_examples=40)
@given(quant=quants(), seed=st.integers(0, 99))
def test_against_the_formula(quant: bh.KVQuant, seed: int) -> None:
    if quant.keys.per == "token":
        return
    codec = HalfCodec(TileLayout.of(quant, 32).keys)
    x = data(32, 2 * quant.tile, seed)
    basis = codec.find_basis(x, torch.ones(2, 2, 32))
    got = codec.unpack(codec.pack(x, basis), basis)
    for b, h in ((0, 0), (1, 1)):
        expected = oracle(codec, x[b, h], {name: t[b, h] for name, t in basis.items()})
        close = torch.isclose(got[b, h], expected, atol=1e-3, rtol=1e-3)
        assert close.float().mean() > 0.97  # a code on the border between two levels may fall to either side


@pytest.mark.parametrize("head_dim", [40, 64, 80])
@pytest.mark.parametrize("metadata", ["fp16", "fp8"])
def test_per_token_against_the_formula(head_dim: int, metadata: str) -> None:
    half = bh.TensorQuant((bh.AxisClass(2, 1.0, "minmax"),), per="token")
    codec = HalfCodec(TileLayout.of(bh.KVQuant(half, half, tile=32, group_size=32, metadata=metadata), head_dim).values)
    x = data(head_dim, 64, 0)
    got = codec.unpack(codec.pack(x, {}), {})
    block = channel_block(head_dim)
    blocks, restored_blocks = x.unflatten(-1, (-1, block)), got.unflatten(-1, (-1, block))
    spread = blocks.amax(-1) - blocks.amin(-1)
    slack = 0.51 if metadata == "fp16" else 0.75
    assert (
        (restored_blocks - blocks).abs().amax(-1) <= slack * spread / 3 + (0.01 if metadata == "fp16" else 0.07 * blocks.abs().max())
    ).all()
    assert max(len(row.unique()) for row in restored_blocks.flatten(0, -2)) <= 4
