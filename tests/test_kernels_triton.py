"""The Triton decode kernels in Triton's CPU interpreter, against the reference in float64 on the same bytes."""

from dataclasses import replace

import torch
from interpreter import needs_interpreter, run_under_interpreter
from real_caches import real_caches
from test_decode_cuda import THREE_BITS

from bitsandheads.methods import get_plan
from bitsandheads.ops import decode_attention, flatten_sets, reference
from bitsandheads.ops.synthetic import head_set
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant

NOISE_FREE = KVQuant(
    TensorQuant((AxisClass(3, 0.5), AxisClass(1, 0.5)), transform="dct"), TensorQuant((AxisClass(2, 1.0),)), tile=16, group_size=16
)

TRITS = KVQuant(
    TensorQuant((AxisClass(2, 0.25), AxisClass("ternary", 0.75, "ternary"))),
    TensorQuant((AxisClass(3, 0.5), AxisClass("ternary", 0.125, "ternary", centre=False), AxisClass(1, 0.375))),
    metadata="fp8",
)


CASES = {
    "balanced": ("balanced", 128, 4, 1, [2, 1], [40, 7]),
    "balanced, 64 channels, 2 queries": ("balanced", 64, 2, 2, [1, 2], [5, 130]),
    "extreme": ("extreme", 128, 2, 1, [1, 0], [3, 2]),
    "kivi-2": ("kivi-2", 64, 4, 1, [1, 2], [33, 1]),
    "values for each token, no centres": (THREE_BITS, 64, 4, 1, [3, 5], [1, 20]),
    "vidkv-1.5/1.58": ("vidkv-1.5/1.58", 128, 2, 1, [1, 1], [12, 31]),
    "small tiles, 80 channels": (NOISE_FREE, 80, 12, 1, [3, 5], [1, 20]),
    "trits": (TRITS, 64, 2, 1, [2, 1], [5, 40]),
    "trits, 24 query rows": (replace(TRITS, group_size=32), 64, 12, 2, [1, 2], [5, 40]),
    "trits, tiles of 32": (replace(TRITS, tile=32, group_size=32), 64, 2, 1, [3, 5], [1, 20]),
    "trits, tiles of 16": (replace(TRITS, tile=16, group_size=16), 80, 2, 1, [3, 5], [1, 20]),
    "whole precision, 96 channels": (None, 96, 16, 1, [0, 0], [70, 37]),
}


def run_cases() -> None:
    for name, (quant, dim, group, queries, tiles, tails) in CASES.items():
        torch.manual_seed(0)
        quant = get_plan(quant).groups[0].quant if isinstance(quant, str) else quant
        one = head_set(quant, dim, (1,), [3, 1], tiles, tails, torch.float32, "cpu")
        two = head_set(None, dim, (0,), [2, 0], tiles, [9, 30], torch.float32, "cpu", window=12)
        q = torch.randn(2, 2 * group, queries, dim)
        got, lse = decode_attention(q, [one, two], dim**-0.5, backend="triton")
        want, want_lse = reference.decode_attention(q.double(), [one, two], dim**-0.5, dtype=torch.float64)
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 1e-3, f"{name}: {error}"
        assert (lse - want_lse).abs().max() < 5e-3, name
        again, _ = decode_attention(q, [one, two], dim**-0.5, backend="triton")
        assert torch.equal(got, again), name
        print(name, error, flush=True)
    salient_part()
    for name, q, heads in list(real_caches())[::5]:
        whole = {k: getattr(heads, k).float() for k in ("sink_k", "sink_v", "tail_k", "tail_v")}  # the interpreter takes one dtype
        heads = replace(heads, **whole)
        got, _ = decode_attention(q.float(), [heads], 0.125, backend="triton")
        want, _ = reference.decode_attention(q.double(), [heads], 0.125, dtype=torch.float64)
        assert ((got.double() - want).norm() / want.norm()) < 1e-3, name


def salient_part() -> None:
    """A head set with a second packed part whose values have other codes."""
    one = head_set(NOISE_FREE, 64, (0, 1), [3, 1], [1, 2], [4, 9], torch.float32, "cpu")
    values = replace(NOISE_FREE, values=replace(NOISE_FREE.values, classes=(AxisClass(3, 1.0),)))
    more = head_set(values, 64, (0, 1), [0, 0], [2, 0], [0, 0], torch.float32, "cpu", seed=1)
    one.extra = (more,)
    q = torch.randn(2, 4, 1, 64)
    got, lse = decode_attention(q, [one], 0.125, backend="triton")
    want, want_lse = reference.decode_attention(q.double(), [one], 0.125, dtype=torch.float64)
    assert ((got.double() - want).norm() / want.norm()) < 1e-3 and (lse - want_lse).abs().max() < 5e-3


@needs_interpreter
def test_interpreter() -> None:
    run_under_interpreter(__file__)


def test_operator() -> None:
    s = head_set(NOISE_FREE, 64, (0, 1), [3, 1], [1, 2], [4, 9], torch.float32, "cpu")
    tensors, number = flatten_sets([s])
    q = torch.randn(2, 4, 1, 64)
    torch.library.opcheck(torch.ops.bitsandheads.decode_attention.default, (q, tensors, number, 0.125, None, "reference"))


if __name__ == "__main__":
    run_cases()


def test_compiled_without_a_graph_break() -> None:
    s = head_set(NOISE_FREE, 64, (0, 1), [3, 1], [1, 2], [4, 9], torch.float32, "cpu")
    q = torch.randn(2, 4, 1, 64)

    def step(q: torch.Tensor) -> torch.Tensor:
        return decode_attention(q * 2, [s], 0.125)[0] + 1

    want = step(q)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(q), want)
