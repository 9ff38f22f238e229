"""Random plans for hypothesis."""

from hypothesis import strategies as st

import bitsandheads as bh

SHARES = [(1.0,), (0.5, 0.5), (0.25, 0.75), (0.125, 0.375, 0.5), (0.25, 0.25, 0.25, 0.25), (0.1, 0.2, 0.3, 0.4)]


@st.composite
def axis_classes(draw, ternary: bool = True) -> tuple[bh.AxisClass, ...]:
    shares = draw(st.sampled_from(SHARES))
    classes = []
    for share in shares:
        bits = draw(st.integers(0, 6))
        levels = draw(st.sampled_from(["minmax", "gaussian", *(["sign"] if bits == 1 else [])]))
        classes.append(bh.AxisClass(bits, share, levels, draw(st.booleans()) or (levels == "minmax" and bits > 0)))
    if ternary and draw(st.booleans()):
        at = draw(st.integers(0, len(shares) - 1))
        classes[at] = bh.AxisClass("ternary", shares[at], "ternary", draw(st.booleans()))
    return tuple(classes)


@st.composite
def tensor_quants(draw, keys: bool = True) -> bh.TensorQuant:
    if draw(st.integers(0, 5)) == 0:
        bits = draw(st.integers(1, 4))
        levels = draw(st.sampled_from(["minmax", "gaussian", *(["sign"] if bits == 1 else [])]))
        return bh.TensorQuant((bh.AxisClass(bits, 1.0, levels, levels == "minmax" or draw(st.booleans())),), per="token")
    transform = draw(st.sampled_from(["none", "hadamard", "dct", "fourier", "principal"]))
    fixed = transform in ("hadamard", "dct", "fourier")
    return bh.TensorQuant(
        draw(axis_classes()),
        transform=transform,
        last_class_only=fixed and draw(st.booleans()),
        order="none" if transform == "principal" else draw(st.sampled_from(["none", "range", "variance", "query"])),
        query_weighted=transform == "principal" and draw(st.booleans()),
        refit=transform == "principal" and draw(st.booleans()),
        attention_weight=draw(st.sampled_from([0.0, 0.0, 0.0, 0.6])),
        noise_correction=draw(st.sampled_from([0.0, 0.5, 1.0])) if keys and transform == "principal" else 0.0,
    )


@st.composite
def quants(draw, salience: bool = True) -> bh.KVQuant:
    tile = draw(st.sampled_from([16, 32, 64, 128]))
    values = draw(tensor_quants(keys=False))
    keys, heavy = draw(tensor_quants()), draw(st.sampled_from([0, 0, 1, 7]))
    weighted = heavy or keys.attention_weight or values.attention_weight
    salient = bh.Salience(draw(st.floats(0.05, 0.95)), draw(st.sampled_from(["attention", *([] if weighted else ["given"])])))
    return bh.KVQuant(
        keys,
        values,
        group_size=draw(st.sampled_from([g for g in (16, 32, 64, 128) if g <= tile])),
        tile=tile,
        residual=draw(st.integers(0, 200)),
        sink=draw(st.integers(0, 40)),
        heavy=heavy,
        basis_tokens=draw(st.integers(1, 300)),
        metadata=draw(st.sampled_from(["fp16", "fp8"])),
        salience=salient if salience and values.per == "channel" and draw(st.booleans()) else None,
    )


@st.composite
def partitions(draw, kv_heads: int, salience: bool = True) -> tuple[bh.HeadGroup, ...]:
    heads = draw(st.permutations(range(kv_heads)))
    cuts = sorted(draw(st.sets(st.integers(1, kv_heads - 1), max_size=2))) if kv_heads > 1 else []
    groups = []
    for a, b in zip([0, *cuts], [*cuts, kv_heads], strict=True):
        kind = draw(st.sampled_from(["whole", "window", "quant", "quant"]))
        window = bh.Window(draw(st.integers(0, 40)), draw(st.integers(1, 100))) if kind == "window" else None
        groups.append(bh.HeadGroup(tuple(heads[a:b]), window, draw(quants(salience)) if kind == "quant" else None))
    return tuple(groups)


@st.composite
def plans(draw, kv_heads: int = 3, layers: int = 4, salience: bool = True) -> bh.CachePlan:
    named = draw(st.dictionaries(st.integers(0, layers - 1), partitions(kv_heads, salience), max_size=2))
    return bh.CachePlan(draw(st.text(max_size=10)), draw(partitions(kv_heads, salience)), named, draw(st.text(max_size=10)))
