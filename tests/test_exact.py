"""Every operation on every tier, in both dtypes, returns the bytes of the reference.

Sizes straddle every edge of the tiles: rows come in tiles of up to 14 (and row blocks of 128), columns in panels
of 16 or 8 and groups of 48 or 96, sums in blocks of 256 and sub-blocks of 64. An element of a product depends on one
row, one column and the depth only, so the reference computes the largest product once for each depth, and every
smaller one is a corner of it. The fast tiers meet the full product of all three lists; the portable tier, whose
emulated arithmetic is slow, meets every size of each list with several of the others.
"""

import itertools

import numpy as np
import pytest
from adversarial import INPUT_CLASSES, fma_sets, generator

import fastblock
from fastblock import _core, reference

ROWS = [*range(10), *range(11, 18), 27, 28, 29, 95, 96, 97, 127, 128, 129]
COLUMNS = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 96, 97]
DEPTHS = [0, 1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 768, 1025]
POSITIONS = sorted({*ROWS, 63, 64, 65, 255, 256, 257})  # where they are both rows and depth


def several_of_each(*sizes):
    """Tuples in which each size of each list appears three times, with others that change."""
    rng = generator(sizes)
    longest = max(map(len, sizes))
    chosen = set()
    for _ in range(3):
        shuffled = [[int(v) for v in rng.permutation(s)] for s in sizes]
        chosen |= set(zip(*(list(itertools.islice(itertools.cycle(s), longest)) for s in shuffled), strict=True))
    return sorted(chosen)


def relu_like(rng, shape, dtype):
    """What a hidden layer holds: about half of it +0.0."""
    return np.maximum(rng.standard_normal(shape), 0).astype(dtype)


# ---- primitives


def test_fma(dtype, every_tier, same_bytes):
    for name, a, b, c in fma_sets(dtype, 20_000 if dtype == np.float32 else 4000):
        want = reference.canonical(reference.fma(a, b, c))
        negative = np.signbit(reference.fma(a, b, c))[want == 0]
        for tier in every_tier():
            got = _core._fma(a, b, c)
            same_bytes(reference.canonical(got), want, f"{name}, {tier}")
            same_bytes(np.signbit(got)[want == 0], negative, f"signs of zeros, {name}, {tier}")


def test_fma_of_every_length(dtype, every_tier, same_bytes):
    for name, a, b, c in fma_sets(dtype, 71):
        if name.startswith("midpoint"):
            want = reference.fma(a, b, c)
            for tier, n in itertools.product(every_tier(), range(71)):
                same_bytes(_core._fma(a[:n].copy(), b[:n].copy(), c[:n].copy()), want[:n], f"{tier}, {n} elements")


# ---- sizes


def compare_corners(every_tier, same_bytes, operation, a, b, bias, depth):
    """operation(a (rows, depth), b (columns, depth), bias (columns)), all sizes."""
    name = operation.__name__
    want = getattr(reference, name)(a, b, bias)
    few = {(r, c) for r, c, d in several_of_each(ROWS, COLUMNS, DEPTHS) if d == depth}
    for tier in every_tier():
        for rows, columns in few if tier == "portable" else itertools.product(ROWS, COLUMNS):
            got = operation(a[:rows], b[:columns], bias[:columns])
            same_bytes(got, want[:rows, :columns], f"{name} {rows} x {depth} -> {columns}, {tier}")


@pytest.mark.parametrize("depth", DEPTHS)
def test_up_project_sizes(depth, dtype, every_tier, same_bytes):
    rng = generator("up", depth)
    x, w1, b1 = (
        rng.standard_normal(s).astype(dtype) for s in [(max(ROWS), depth), (max(COLUMNS), depth), max(COLUMNS)]
    )
    compare_corners(every_tier, same_bytes, fastblock.up_project, x, w1, b1, depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_down_project_sizes(depth, dtype, every_tier, same_bytes):
    rng = generator("down", depth)
    h = relu_like(rng, (max(ROWS), depth), dtype)
    w2, b2 = (rng.standard_normal(s).astype(dtype) for s in [(max(COLUMNS), depth), max(COLUMNS)])
    compare_corners(every_tier, same_bytes, fastblock.down_project, h, w2, b2, depth)


@pytest.mark.parametrize("positions", POSITIONS)
def test_mix_positions_sizes(positions, dtype, every_tier, same_bytes):
    rng = generator("mix", positions)
    weights, x = (rng.standard_normal((positions, n)).astype(dtype) for n in (positions, max(COLUMNS)))
    want = reference.mix_positions(weights, x)
    few = {c for p, c in several_of_each(POSITIONS, COLUMNS) if p == positions}
    for tier in every_tier():
        for features in few if tier == "portable" else COLUMNS:
            got = fastblock.mix_positions(weights, x[:, :features])
            same_bytes(got, want[:, :features], f"{positions} x {features}, {tier}")


@pytest.mark.parametrize(("positions", "features"), [(40, 1100), (2050, 5)])
def test_mix_positions_of_more_than_is_packed_at_a_time(positions, features, dtype, every_tier, same_bytes):
    rng = generator("wide and deep mixing", positions)
    weights, x = (rng.standard_normal((positions, n)).astype(dtype) for n in (positions, features))
    want = reference.mix_positions(weights, x)
    for tier in every_tier():
        same_bytes(fastblock.mix_positions(weights, x), want, tier)


def test_bias_relu_sizes(dtype, every_tier, same_bytes):
    rng = generator("bias_relu")
    x, bias = rng.standard_normal((max(ROWS), 600)).astype(dtype), rng.standard_normal(600).astype(dtype)
    want = reference.bias_relu(x, bias)
    for tier, rows, features in itertools.product(every_tier(), ROWS, [*COLUMNS, 255, 256, 257, 600]):
        got = fastblock.bias_relu(x[:rows, :features], bias[:features])
        same_bytes(got, want[:rows, :features], f"{rows} x {features}, {tier}")


# Hidden sizes straddle the blocks of 256 hidden units, too.
FEED_FORWARD_SIZES = several_of_each(ROWS, COLUMNS, [*COLUMNS, 63, 64, 65, 255, 256, 257, 511, 512, 513])


def test_feed_forward_sizes(dtype, every_tier, same_bytes):
    for positions, features, hidden in FEED_FORWARD_SIZES:
        rng = generator("feed forward", positions, features, hidden)
        sizes = [(positions, features), (hidden, features), hidden, (features, hidden), features]
        x, *parameters = (rng.standard_normal(s).astype(dtype) for s in sizes)
        want = reference.feed_forward(x, *parameters)
        packed = fastblock.Block(*parameters)
        for tier in every_tier():
            what = f"{positions} x {features} -> {hidden}, {tier}"
            same_bytes(fastblock.feed_forward(x, *parameters), want, what)
            same_bytes(packed.feed_forward(x), want, f"Block, {what}")


# ---- kinds of input


def same_operation(every_tier, same_bytes, name, args, what, **options):
    want = getattr(reference, name)(*args, **options)
    for tier in every_tier():
        same_bytes(getattr(fastblock, name)(*args, **options), want, f"{name}, {what}, {tier}")
    return want


# (P, D, F): small, odd, and deep enough that sums have two blocks. Subnormal results are slow to define in float64.
CLASS_SIZES = [(5, 3, 4), (13, 9, 17), (1, 17, 259), (6, 259, 8)]
OPERANDS = {
    "mix_positions": lambda p, d, f: [(p, p), (p, d)],
    "bias_relu": lambda p, d, f: [(p, f), f],
    "up_project": lambda p, d, f: [(p, d), (f, d), f],
    "down_project": lambda p, d, f: [(p, f), (d, f), d],
    "feed_forward": lambda p, d, f: [(p, d), (f, d), f, (d, f), d],
    "attention_weights": lambda p, d, f: [(p, d), (f, d), (f, d), f, f],
}


@pytest.mark.parametrize("operation", OPERANDS)
@pytest.mark.parametrize("kind", INPUT_CLASSES)
def test_input_classes(kind, operation, dtype, every_tier, same_bytes):
    for sizes in CLASS_SIZES if operation != "mix_positions" else [*CLASS_SIZES, (259, 2, 0)]:
        shapes = OPERANDS[operation](*sizes)
        rng = generator("class", kind, operation, sizes)
        args = [INPUT_CLASSES[kind](rng, s, dtype) for s in shapes]
        same_operation(every_tier, same_bytes, operation, args, f"all {kind}, {sizes}")
        if max(sizes) > 64:
            continue
        for i in range(len(args)):  # one operand at a time: less is drowned in NaN
            alone = [rng.standard_normal(s).astype(dtype) for s in shapes]
            alone[i] = args[i]
            same_operation(every_tier, same_bytes, operation, alone, f"{kind} only in operand {i}, {sizes}")


@pytest.mark.parametrize("operation", ["up_project", "down_project", "feed_forward", "attention_weights"])
def test_without_biases(operation, dtype, every_tier, same_bytes):
    for sizes in CLASS_SIZES:
        rng = generator("no bias", operation, sizes)
        args = [rng.standard_normal(s).astype(dtype) for s in OPERANDS[operation](*sizes)]
        biases = [i for i, a in enumerate(args) if a.ndim == 1]
        for missing in itertools.product([True, False], repeat=len(biases)):
            some = [None if i in itertools.compress(biases, missing) else a for i, a in enumerate(args)]
            same_operation(every_tier, same_bytes, operation, some, f"{sizes}, missing {missing}")


# ---- zeros, which may be skipped, and what stands behind them, which may not


def zero_patterns(rng, rows, columns):
    """(name, True where not zero)"""
    ones = np.ones((rows, columns), bool)
    row, column = np.ogrid[:rows, :columns]
    yield "all nonzero", ones
    yield "all zero", ~ones
    yield "one nonzero", (row == rows // 2) & (column == columns // 2)
    yield "one nonzero in a row", column == row * 37 % columns
    yield "one zero in a row", column != row * 37 % columns
    yield "every other row zero", ones & (row % 2 == 0)
    yield "only the last row", ones & (row == rows - 1)
    yield "every other zero", (row + column) % 2 == 0
    yield "every other column zero", ones & (column % 2 == 1)
    yield "every other 64 columns zero", ones & (column // 64 % 2 == 1)
    yield "only the last column", ones & (column == columns - 1)
    for density in (0.03, 0.5, 0.8, 0.85, 0.88, 0.9, 0.92, 0.95, 0.98):  # around where dense tiles take over
        yield f"{density} nonzero", rng.random((rows, columns)) < density
    yield "denser from row to row", rng.random((rows, columns)) < (row + 1) / rows
    yield "denser from column to column", rng.random((rows, columns)) < (column + 1) / columns


def behind(kind, weights, rng):
    """Put some `kind` values into `weights`."""
    values = {"infinite": [np.inf, -np.inf], "nan": [np.nan]}[kind]
    weights = weights.copy()
    for _ in range(3):
        weights[tuple(rng.integers(weights.shape))] = rng.choice(values)
    return weights


HIDDEN_SIZES = [(5, 17, 63), (17, 33, 257), (29, 97, 577)]


@pytest.mark.parametrize(("positions", "features", "hidden"), HIDDEN_SIZES)
def test_zeros_in_the_hidden_layer(positions, features, hidden, dtype, every_tier, same_bytes):
    """Row i of the first layer picks column i of W1, so the hidden layer has any pattern that is asked for."""
    for name, pattern in zero_patterns(generator("hidden", hidden), positions, hidden):
        rng = generator("hidden", name, hidden)
        x = np.eye(positions, features, dtype=dtype)
        w1 = rng.standard_normal((hidden, features)).astype(dtype)
        w1[:, :positions] = np.where(pattern.T, 1, -1) * np.abs(w1[:, :positions]) + 0.0
        b1 = np.zeros(hidden, dtype)
        w2, b2 = (rng.standard_normal(s).astype(dtype) for s in [(features, hidden), features])
        h = reference.up_project(x, w1, b1)
        assert np.array_equal(h != 0, pattern)
        want = reference.down_project(h, w2, b2)
        packed = fastblock.Block(w1, b1, w2, b2)
        for tier in every_tier():
            what = f"{name}, {positions} x {features} -> {hidden}, {tier}"
            same_bytes(fastblock.down_project(h, w2, b2), want, f"down_project, {what}")
            same_bytes(fastblock.feed_forward(x, w1, b1, w2, b2), want, f"feed_forward, {what}")
            same_bytes(packed.feed_forward(x), want, f"Block, {what}")


@pytest.mark.parametrize("kind", ["infinite", "nan"])
@pytest.mark.parametrize(("positions", "features", "hidden"), HIDDEN_SIZES)
def test_weights_that_are_not_finite(positions, features, hidden, kind, dtype, every_tier, same_bytes):
    rng = generator("not finite", kind, hidden)
    sizes = [(positions, features), (hidden, features), hidden, (features, hidden), features]
    finite = [rng.standard_normal(s).astype(dtype) for s in sizes]
    for i, name in enumerate(["x", "w1", "b1", "w2", "b2"]):
        args = list(finite)
        args[i] = behind(kind, args[i], rng)
        want = same_operation(every_tier, same_bytes, "feed_forward", args, f"{kind} values in {name}")
        if name != "x":
            for tier in every_tier():
                same_bytes(fastblock.Block(*args[1:]).feed_forward(args[0]), want, f"Block, {kind} in {name}, {tier}")

    # 0 * inf: a unit that is zero everywhere still makes NaN of an infinite weight
    x, w1, b1, w2, b2 = finite
    b1 = b1.copy()
    b1[hidden // 2] = -1e30
    w2 = w2.copy()
    w2[features // 2, hidden // 2] = np.inf if kind == "infinite" else np.nan
    want = same_operation(every_tier, same_bytes, "feed_forward", [x, w1, b1, w2, b2], "behind a zero unit")
    assert np.isnan(want[:, features // 2]).all()
    assert np.isfinite(np.delete(want, features // 2, axis=1)).all()
    packed = fastblock.Block(w1, b1, w2, b2)
    for tier in every_tier():
        same_bytes(packed.feed_forward(x), want, f"Block, behind a zero unit, {tier}")


MIX_SIZES = [(1, 3), (5, 3), (17, 16), (65, 97), (130, 49), (300, 17)]


def weight_patterns(rng, positions):
    yield from zero_patterns(rng, positions, positions)
    row, column = np.ogrid[:positions, :positions]
    yield "causal", column <= row
    yield "anticausal", column >= row
    yield "banded", abs(row - column) <= 2
    yield "wide band", abs(row - column) <= positions // 3
    yield "padded", np.broadcast_to(column < positions - positions // 3, (positions, positions))
    yield "identity", row == column


@pytest.mark.parametrize(("positions", "features"), MIX_SIZES)
def test_zeros_in_the_attention_weights(positions, features, dtype, every_tier, same_bytes):
    for name, pattern in weight_patterns(generator("mix", positions), positions):
        rng = generator("mix", name, positions)
        x = rng.standard_normal((positions, features)).astype(dtype)
        weights = np.where(pattern, rng.standard_normal(pattern.shape), 0).astype(dtype)
        same_operation(every_tier, same_bytes, "mix_positions", [weights, x], f"{name}, {x.shape}")
        if positions > 65:
            continue
        # the same zeros with either sign, and ones elsewhere: sums of some rows
        weights = np.where(pattern, 1, rng.choice([0.0, -0.0], pattern.shape)).astype(dtype)
        same_operation(every_tier, same_bytes, "mix_positions", [weights, x], f"0/1 {name}, {x.shape}")


@pytest.mark.parametrize("kind", ["infinite", "nan"])
@pytest.mark.parametrize(("positions", "features"), [s for s in MIX_SIZES if s[0] > 1])
def test_features_that_are_not_finite_behind_zero_weights(positions, features, kind, dtype, every_tier, same_bytes):
    bad = np.inf if kind == "infinite" else np.nan
    for name, pattern in weight_patterns(generator("mix", positions), positions):
        if name in ("all zero", "causal", "banded", "identity", "0.03 nonzero", "one nonzero"):
            rng = generator("mix behind", name, positions)
            x = rng.standard_normal((positions, features)).astype(dtype)
            x[-1, -1] = bad
            weights = np.where(pattern, rng.standard_normal(pattern.shape), 0).astype(dtype)
            want = same_operation(every_tier, same_bytes, "mix_positions", [weights, x], f"{name}, {x.shape}")
            assert np.isnan(want[:-1, -1]).any()
            assert np.isfinite(want[:, :-1]).all()


@pytest.mark.parametrize("positions", [255, 256, 257, 512])
def test_features_that_are_not_finite_in_whole_blocks(positions, dtype, every_tier, same_bytes):
    """The last block of k canonicalises NaN, be it full or not, be it the first one or not."""
    rng = generator("whole blocks", positions)
    x = rng.standard_normal((positions, 3)).astype(dtype)
    x[:, 1] = np.copysign(np.nan, -1)  # its bits are not those of the canonical NaN
    x[0, 2], x[-1, 2] = np.inf, -np.inf
    weights = rng.standard_normal((positions, positions)).astype(dtype)
    want = same_operation(every_tier, same_bytes, "mix_positions", [weights, x], "whole blocks")
    assert not np.signbit(want[:, 1]).any()


def test_mix_positions_broadcasts_batches(dtype, every_tier, same_bytes):
    shapes = [
        ((5, 5), (3, 5, 4)),
        ((3, 5, 5), (5, 4)),
        ((2, 1, 5, 5), (3, 5, 4)),
        ((2, 3, 17, 17), (2, 3, 17, 9)),
        ((0, 5, 5), (5, 4)),
        ((1, 0, 0), (4, 0, 3)),
    ]
    for weights_shape, x_shape in shapes:
        rng = generator("broadcast", weights_shape, x_shape)
        args = [rng.standard_normal(s).astype(dtype) for s in (weights_shape, x_shape)]
        same_operation(every_tier, same_bytes, "mix_positions", args, f"{weights_shape} {x_shape}")


@pytest.mark.parametrize("leading", [(), (0,), (1,), (3,), (2, 3), (2, 0, 3)])
def test_leading_dimensions(leading, dtype, every_tier, same_bytes):
    p, d, f = 5, 9, 17
    for operation, operands in OPERANDS.items():
        rng = generator("leading", operation, leading)
        first, *others = operands(p, d, f)
        if operation == "mix_positions":
            others = [(*leading, *others[0])]
        args = [rng.standard_normal(s).astype(dtype) for s in [(*leading, *first), *others]]
        same_operation(every_tier, same_bytes, operation, args, f"leading {leading}")


@pytest.mark.parametrize("operation", ["bias_relu", "up_project", "down_project", "feed_forward"])
def test_one_position_may_have_one_dimension(operation, dtype, every_tier, same_bytes):
    rng = generator("one position", operation)
    first, *others = OPERANDS[operation](5, 9, 17)
    args = [rng.standard_normal(s).astype(dtype) for s in [first[1:], *others]]
    same_operation(every_tier, same_bytes, operation, args, "one position")


# ---- attention


def masks(rng, leading, positions):
    """(name, options of attention_weights)"""
    some = rng.random((*leading, positions)) < 0.6
    yield "no mask", {}
    yield "causal", {"causal": True}
    yield "some keys", {"key_mask": some}
    yield "causal, some keys", {"causal": True, "key_mask": some}
    yield "no key", {"key_mask": np.zeros(positions, bool)}
    yield "causal, all keys", {"causal": True, "key_mask": np.ones((*leading, positions), bool)}
    yield "last key only", {"causal": True, "key_mask": np.arange(positions) == positions - 1}


ATTENTION_SIZES = several_of_each(  # P, D, E
    [*range(20), 27, 28, 29, 33, 63, 64, 65, 95, 96, 97],
    [0, 1, 3, 8, 16, 17, 33, 65, 257],
    [0, 1, 2, 7, 8, 9, 15, 16, 17, 64, 65, 257],
)


def attention_arguments(rng, leading, positions, features, head_width, dtype):
    shapes = [(*leading, positions, features), *[(head_width, features)] * 2, head_width, head_width]
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def test_attention_weights_sizes(dtype, every_tier, same_bytes):
    for number, sizes in enumerate(ATTENTION_SIZES):
        rng = generator("attention", sizes)
        args = attention_arguments(rng, (), *sizes, dtype)
        unmasked, *others = masks(rng, (), sizes[0])
        for name, options in [unmasked, others[number % len(others)]]:
            same_operation(every_tier, same_bytes, "attention_weights", args, f"{sizes}, {name}", **options)


@pytest.mark.parametrize("positions", [257, 300, 513])
def test_attention_weights_of_many_positions(positions, dtype, every_tier, same_bytes):
    rng = generator("attention", positions)
    args = attention_arguments(rng, (), positions, 5, 3, dtype)
    for name, options in list(masks(rng, (), positions))[:4]:
        same_operation(every_tier, same_bytes, "attention_weights", args, f"{positions}, {name}", **options)


@pytest.mark.parametrize("leading", [(3,), (2, 2), (0,)])
def test_attention_weights_masks_in_batches(leading, dtype, every_tier, same_bytes):
    rng = generator("attention batch", leading)
    args = attention_arguments(rng, leading, 19, 6, 4, dtype)
    for name, options in masks(rng, leading, 19):
        same_operation(every_tier, same_bytes, "attention_weights", args, f"{leading}, {name}", **options)
    # one mask for every batch, and one for the inner batch
    for shape in [(19,), (leading[-1], 19), (1,) * len(leading) + (19,)]:
        options = {"key_mask": rng.random(shape) < 0.5}
        same_operation(every_tier, same_bytes, "attention_weights", args, f"{leading}, mask {shape}", **options)


@pytest.mark.parametrize("kind", ["overflows", "infinities", "nans", "wide exponents", "signed zeros"])
def test_attention_weights_of_scores_that_are_not_tame(kind, dtype, every_tier, same_bytes):
    for positions in (7, 34):
        rng = generator("scores", kind, positions)
        args = attention_arguments(rng, (2,), positions, 4, 3, dtype)
        args[0] = INPUT_CLASSES[kind](rng, args[0].shape, dtype)
        for name, options in masks(rng, (2,), positions):
            same_operation(every_tier, same_bytes, "attention_weights", args, f"{kind}, {positions}, {name}", **options)


def test_attention_weights_of_infinite_scores(dtype, every_tier, same_bytes):
    """Rows with -inf, +inf, both, or NaN among their scores, in every position and at every place of a mask."""
    positions = 21
    for value in (np.inf, -np.inf, np.nan):
        for where in (0, 7, 8, 20):
            x = np.zeros((positions, 2), dtype)
            x[:, 0] = np.arange(positions) % 3
            x[where, 1] = value
            w_q, w_k = np.array([[0, 0]], dtype), np.array([[1, 1]], dtype)
            args = [x, w_q, w_k, np.ones(1, dtype)]
            for name, options in masks(generator("infinite scores"), (), positions):
                what = f"{value} at {where}, {name}"
                same_operation(every_tier, same_bytes, "attention_weights", args, what, **options)


# ---- whole blocks


BLOCK_SIZES = [  # (leading, P, D, F, E)
    ((), 5, 3, 4, 2),
    ((3,), 5, 3, 4, 2),
    ((2,), 17, 33, 65, 16),
    ((), 97, 48, 257, 7),
    ((2, 2), 1, 16, 64, 8),
    ((), 130, 33, 300, 17),
    ((), 40, 530, 20, 3),  # features of several passes over the tile of weights
    ((), 0, 3, 4, 2),
    ((0,), 5, 3, 4, 2),
    ((2,), 5, 0, 4, 2),
    ((2,), 5, 3, 0, 2),
    ((2,), 5, 3, 4, 0),
]


def block_parameters(rng, features, hidden, head_width, dtype):
    w1, b1, w2, b2, w_q, w_k, b_q, b_k = (
        rng.standard_normal(s).astype(dtype)
        for s in [
            (hidden, features), hidden, (features, hidden), features,
            (head_width, features), (head_width, features), head_width, head_width,
        ]
    )  # fmt: skip
    return (w1, b1, w2, b2), {"w_q": w_q, "w_k": w_k, "b_q": b_q, "b_k": b_k}


@pytest.mark.parametrize(("leading", "positions", "features", "hidden", "head_width"), BLOCK_SIZES)
def test_block(leading, positions, features, hidden, head_width, dtype, every_tier, same_bytes):
    rng = generator("block", leading, positions, features, hidden)
    x = rng.standard_normal((*leading, positions, features)).astype(dtype)
    layers, attention = block_parameters(rng, features, hidden, head_width, dtype)
    block = fastblock.Block(*layers, **attention)
    for name, options in list(masks(rng, leading, positions))[: 7 if positions < 64 else 4]:
        want = reference.block(x, *layers, **attention, **options)
        for tier in every_tier():
            same_bytes(block(x, **options), want, f"{name}, {tier}")
    for shape in {(positions, positions), (*leading, positions, positions)}:
        weights = rng.standard_normal(shape).astype(dtype)
        want = reference.block(x, *layers, weights)
        for tier in every_tier():
            same_bytes(block(x, weights), want, f"given weights {shape}, {tier}")
            same_bytes(fastblock.Block(*layers)(x, weights), want, f"no query-key module, {shape}, {tier}")


@pytest.mark.parametrize("kind", INPUT_CLASSES)
def test_small_blocks(kind, dtype, every_tier, same_bytes):
    """Sizes around those from which a block of a few numbers is not small any more, guarded against writes outside."""
    rng = generator("small blocks", kind)
    sizes = [(1, 1, 1), (2, 4, 2), (5, 3, 4), (7, 2, 0), (9, 7, 9), (31, 3, 8), (32, 8, 8), (33, 2, 3), (6, 9, 3)]
    for positions, features, hidden in sizes:
        x, weights = (INPUT_CLASSES[kind](rng, s, dtype) for s in [(2, positions, features), (2, positions, positions)])
        layers = [
            INPUT_CLASSES[kind](rng, s, dtype) for s in [(hidden, features), (hidden,), (features, hidden), (features,)]
        ]
        want = reference.block(x, *layers, weights)
        block = fastblock.Block(*layers)
        memory = np.full(x.size + 32, 7, dtype)
        out = memory[16:-16].reshape(x.shape)
        for tier in every_tier():
            what = f"{positions} x {features} -> {hidden}, {tier}"
            same_bytes(block(x, weights, out=out), want, what)
            same_bytes(block(x[0], weights[0]), want[0], f"{what}, one item")
            assert (memory[:16] == 7).all() and (memory[-16:] == 7).all(), what


def test_a_large_batch_of_small_blocks(dtype, every_tier, same_bytes):
    """Enough of them for several threads."""
    rng = generator("batch of small blocks")
    x, w1, w2 = (rng.standard_normal(s).astype(dtype) for s in [(30_000, 5, 3), (4, 3), (3, 4)])
    weights = rng.random((5, 5)).astype(dtype)
    block = fastblock.Block(w1, None, w2, None)
    some = slice(None, None, 997)
    want = reference.block(x[some], w1, None, w2, None, weights)
    for tier in every_tier():
        with fastblock.num_threads(3):
            same_bytes(block(x, weights)[some], want, tier)


def test_block_without_biases(dtype, every_tier, same_bytes):
    rng = generator("block without biases")
    x, w1, w2, w_q, w_k = (rng.standard_normal(s).astype(dtype) for s in [(2, 9, 5), (17, 5), (5, 17), (3, 5), (3, 5)])
    want = reference.block(x, w1, None, w2, None, w_q=w_q, w_k=w_k, causal=True)
    block = fastblock.Block(w1, None, w2, None, w_q=w_q, w_k=w_k)
    for tier in every_tier():
        same_bytes(block(x, causal=True), want, tier)


def test_stack(dtype, every_tier, same_bytes):
    """Three blocks of the same features, everything else different."""
    rng = generator("stack")
    x = rng.standard_normal((2, 9, 5)).astype(dtype)
    parameters = [block_parameters(rng, 5, *sizes, dtype) for sizes in [(8, 3), (20, 1), (65, 8)]]
    stack = fastblock.Stack([fastblock.Block(*layers, **attention) for layers, attention in parameters])
    weights = [rng.standard_normal(s).astype(dtype) / 8 for s in [(9, 9), (2, 9, 9), (1, 9, 9)]]

    def expected(weights, **options):
        y = x
        for (layers, attention), a in zip(parameters, weights, strict=True):
            y = reference.block(y, *layers, a, **({} if a is not None else attention), **options)
        return y

    for name, options in masks(rng, (2,), 9):
        want = expected([None] * 3, **options)
        for tier in every_tier():
            same_bytes(stack(x, **options), want, f"{name}, {tier}")
    each, shared = expected(weights), expected(weights[:1] * 3)
    for tier in every_tier():
        same_bytes(stack(x, weights), each, f"weights of each, {tier}")
        same_bytes(stack(x, weights[0]), shared, f"the same weights, {tier}")


@pytest.mark.parametrize("batch", [(), (0,), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("positions", [0, 1, 3])
@pytest.mark.parametrize("features", [0, 1, 3])
def test_axes_of_length_0_and_1(batch, positions, features, dtype, same_bytes):
    x = np.ones((*batch, positions, features), dtype)
    weights = np.ones((*batch, positions, positions), dtype)
    w = np.ones((2, features), dtype)
    for threads in (1, 2):
        with fastblock.num_threads(threads):
            same_bytes(fastblock.mix_positions(weights, x), reference.mix_positions(weights, x), f"mix, {threads}")
            same_bytes(
                fastblock.attention_weights(x, w, w), reference.attention_weights(x, w, w), f"attention, {threads}"
            )
