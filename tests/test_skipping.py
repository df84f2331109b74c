"""Zeros that cost nothing change nothing: products large enough for the paths that skip, at every density and edge.

Below 50000 multiply-adds a product is not searched for zeros. Above, every fourth tile of 6 rows is sampled; from 85 %
nonzeros on (25 % of 4 to 7 rows) the dense tiles run, over the range that is not zero in all rows of a tile; below 1/8
the lists of nonzeros are of whole blocks of 256, between of slices of 64. Where w2 has 2 MiB and more, and up to 2
nonzeros, and 70 % of the positions, meet a hidden unit, whole rows of its transpose are read. `down_project` never
skips, so it says what is expected of all; it is compared with the definition in test_exact.py, and here once more for a
sample of rows.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from adversarial import generator

import fastblock
from fastblock import reference


@pytest.fixture(autouse=True)
def threads_as_before():
    before = fastblock.get_num_threads()
    yield
    fastblock.set_num_threads(before)


@pytest.fixture
def dense(same_bytes):
    """dense(a, b, bias): a b^T + bias, skipping nothing. Rows of all calls with the same b are checked together."""
    samples = {}

    def product(a, b, bias=None):
        want = fastblock.down_project(a, b, bias)
        _, _, rows, results = samples.setdefault(id(b), (b, bias, [], []))
        rows.append(a[len(rows) % len(a) :: 149])
        results.append(want[len(results) % len(a) :: 149])
        return want

    yield product
    for b, bias, rows, results in samples.values():
        want = reference.down_project(np.concatenate(rows), b, bias)
        same_bytes(np.concatenate(results), want, "the dense product")


@pytest.fixture
def same_on(every_tier, same_bytes):
    """same_on(want, call, what): call() is compared on every tier, or without the slow one; one thread and several."""

    def compare(want, call, what, portable=True, threads=(1, 3)):
        for tier in every_tier():
            if tier != "portable":
                for n in threads:
                    with fastblock.num_threads(n):
                        same_bytes(call(), want, f"{what}, {tier}, {n} threads")
            elif portable:
                same_bytes(call(), want, f"{what}, {tier}")
        fastblock.use_isa(fastblock.isas()[0])  # for what is expected next

    return compare


def exactly(n, rows, columns, rng):
    """n nonzeros in each row of each block of 256, at random places."""
    blocks = [np.arange(256) < n for _ in range(0, columns, 256)]
    return np.hstack([rng.permuted(np.tile(b, (rows, 1)), axis=1) for b in blocks])[:, :columns]


def edges(columns):
    """Both sides of the edges of slices and blocks."""
    found = {0, columns - 1} | {e + side for e in range(64, columns, 64) for side in (-1, 0)}
    return np.array(sorted(found))


def patterns(rng, rows, columns):
    """(name, True where not zero); the second half is about rows, of which 0, 24, 48, ... are counted."""
    row, column = np.ogrid[:rows, :columns]
    everywhere = np.ones((rows, columns), bool)
    edge = edges(columns)
    yield "all zero", ~everywhere
    yield "all nonzero", everywhere
    for n in (31, 32, 33, 39, 40, 63, 64, 65, 179, 180, 216, 217, 218, 219):  # of 256, 2/13 are 39.4, 85 % are 217.6
        yield f"{n} of 256", exactly(n, rows, columns, rng)
    for density in (0.01, 0.1, 0.125, 0.15, 0.5, 0.8, 0.82, 0.84, 0.85, 0.86, 0.88, 0.9, 0.99):
        yield f"{density}", rng.random((rows, columns)) < density
    yield "one nonzero in a row, at the edges", column == edge[row % len(edge)]
    yield "one zero in a row, at the edges", column != edge[row % len(edge)]
    yield "one nonzero in a row, anywhere", column == rng.integers(columns, size=(rows, 1))
    yield "every other column", everywhere & (column % 2 == 0)
    yield "every other slice", everywhere & (column // 64 % 2 == 0)
    yield "every other block", everywhere & (column // 256 % 2 == 1)
    yield "zeros at the start of a block", everywhere & (column % 256 >= 100)
    yield "zeros at the end of a block", everywhere & (column % 256 < 100)
    yield "zeros at both ends, of each row another number", abs(column % 256 - 128) <= 5 + row % 120
    yield "every other row", everywhere & (row % 2 == 1)
    yield "only the first row", everywhere & (row == 0)
    yield "only the last row", everywhere & (row == rows - 1)
    yield "one nonzero in all", (row == rows // 3) & (column == edge[len(edge) // 2])
    yield "sampled rows are zero, the others not", everywhere & (row % 24 >= 6)
    yield "sampled rows are not zero, the others are", everywhere & (row % 24 < 6)
    yield "a triangle", column <= row * columns // rows


# ---- feed-forward: hidden activations in tiles of at most 128 rows x 256 units


def hidden_layer(pattern, positions, features, rng, dtype):
    """x, w1, b1 whose hidden layer repeats the pattern: position i picks a column of w1."""
    rows, hidden = pattern.shape
    x = np.eye(rows, features, dtype=dtype)[np.arange(positions) % rows]
    w1 = abs(rng.standard_normal((hidden, features)).astype(dtype)) + dtype(0.01)
    w1[:, :rows] *= np.where(pattern.T, 1, -1)
    return x, w1, np.zeros(hidden, dtype)


# Few rows, one tile and several; from 1 panel of columns to 14, the last full or not; last blocks full or not; large w2
HIDDEN_SIZES = [(1, 221, 321), (3, 130, 512), (8, 60, 321), (50, 123, 321), (123, 41, 531), (131, 24, 512)]
LARGE_HIDDEN_SIZES = [(1, 1030, 530), (3, 1040, 768), (13, 1031, 520)]


@pytest.mark.parametrize(("positions", "features", "hidden"), HIDDEN_SIZES + LARGE_HIDDEN_SIZES)
def test_zeros_in_the_hidden_layer(positions, features, hidden, dtype, dense, same_on):
    rng = generator("skip hidden", hidden)
    w2, b2 = (rng.standard_normal(s).astype(dtype) for s in [(features, hidden), features])
    for number, (name, pattern) in enumerate(patterns(rng, min(positions, features), hidden)):
        x, w1, b1 = hidden_layer(pattern, positions, features, rng, dtype)
        h = fastblock.up_project(x, w1, b1)
        assert np.array_equal(h[: len(pattern)] != 0, pattern)
        block = fastblock.Block(w1, b1, w2, b2)
        same_on(dense(h, w2, b2), lambda b=block, x=x: b.feed_forward(x), name, portable=number % 12 == 2)


@pytest.mark.parametrize(("positions", "features"), [(50, 41), (2, 1030)])
def test_weights_that_are_not_finite_behind_zero_units(positions, features, dtype, dense, same_on):
    """0 * inf is NaN, in whichever block of hidden units it is met."""
    hidden = 593
    rng = generator("skip, infinite weights")
    zero = [0, 255, 256, 511, 512, 592]
    pattern = rng.random((features, hidden)) < 0.3
    pattern[:, zero] = False
    x, w1, b1 = hidden_layer(pattern, positions, features, rng, dtype)
    h = fastblock.up_project(x, w1, b1)
    for unit in zero:
        w2 = rng.standard_normal((features, hidden)).astype(dtype)
        column = unit % features
        w2[column, unit] = rng.choice([np.inf, -np.inf, np.nan])
        want = dense(h, w2)
        assert np.isnan(want[:, column]).all()
        assert np.isfinite(np.delete(want, column, axis=1)).all()
        block = fastblock.Block(w1, b1, w2, None)
        same_on(want, lambda b=block: b.feed_forward(x), f"unit {unit}", portable=unit == 256)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("positions", "features"), [(123, 41), (3, 1030)])
def test_activations_that_are_not_finite(positions, features, density, dtype, dense, same_on):
    """Infinite where a product overflows, NaN in a whole unit; the weights are finite, so zeros are skipped."""
    hidden = 593
    rng = generator("skip, infinite activations", density)
    x, w1, b1 = hidden_layer(rng.random((features, hidden)) < density, positions, features, rng, dtype)
    big = np.finfo(dtype).max / 4
    x = x * dtype(8)
    w1[(rng.random(w1.shape) < 0.03) & (w1 > 0)] = big
    for nan in ([], [592], [3, 255, 256, 592]):  # the last one alone, behind the last whole vector
        w1[nan, 0] = np.nan
        h = fastblock.up_project(x, w1, b1)
        assert np.isinf(h).any() and np.isnan(h).any() == bool(nan)
        w2 = rng.standard_normal((features, hidden)).astype(dtype)
        w2[rng.random(w2.shape) < 0.3] = 0  # inf * 0
        block = fastblock.Block(w1, b1, w2, None)
        same_on(dense(h, w2), lambda b=block: b.feed_forward(x), f"NaN: {nan}", portable=density == 0.5)


# ---- mix_positions: blocks of 256 positions, at most 128 rows and 1024 columns at a time

MIX_SIZES = [(36, 32), (60, 8), (100, 5), (300, 8), (333, 17), (200, 49), (600, 3), (70, 1030)]


def mixing_patterns(rng, positions):
    row, column = np.ogrid[:positions, :positions]
    yield "causal", column <= row
    yield "anticausal", column >= row
    yield "strictly causal", column < row
    yield "banded", abs(row - column) <= 3
    yield "wide band", abs(row - column) <= positions // 4
    yield "padded", np.broadcast_to(column < positions - positions // 3, (positions, positions))
    yield "causal, padded at the start", (column <= row) & (column >= positions // 3)
    yield "identity", row == column
    yield "permutation", rng.permutation(positions)[:, None] == column
    yield from patterns(rng, positions, positions)


@pytest.mark.parametrize(("positions", "features"), MIX_SIZES)
def test_zeros_in_the_attention_weights(positions, features, dtype, dense, same_on):
    rng = generator("skip mix", positions, features)
    x = rng.standard_normal((positions, features)).astype(dtype)
    columns = np.ascontiguousarray(x.T)
    values = rng.standard_normal((positions, positions)).astype(dtype)
    zeros = np.where(rng.random(values.shape) < 0.5, dtype(0), dtype(-0.0))
    for number, (name, pattern) in enumerate(mixing_patterns(rng, positions)):
        weights = np.where(pattern, values if number % 3 else dtype(1), zeros)
        portable = number % 12 == 0 and positions <= 333
        same_on(dense(weights, columns), lambda w=weights: fastblock.mix_positions(w, x), name, portable)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_features_that_are_not_finite_behind_zero_weights(bad, dtype, dense, same_on):
    """In each block of positions in turn: that block takes the dense path, the others skip."""
    positions, features = 600, 9
    rng = generator("skip, infinite features", bad)
    for j in (0, 255, 256, 599):
        x = rng.standard_normal((positions, features)).astype(dtype)
        x[j, j % features] = bad
        weights = np.where(rng.random((positions, positions)) < 0.1, rng.standard_normal((positions, positions)), 0)
        weights = weights.astype(dtype)
        weights[:, j] = 0
        want = dense(weights, np.ascontiguousarray(x.T))
        assert np.isnan(want[:, j % features]).all()
        assert np.isfinite(np.delete(want, j % features, axis=1)).all()
        same_on(want, lambda w=weights, x=x: fastblock.mix_positions(w, x), f"position {j}", portable=j == 256)


@pytest.mark.parametrize(("positions", "features"), [(300, 8), (333, 17)])
def test_attention_weights_that_are_not_finite(positions, features, dtype, dense, same_on):
    """They are nonzeros like any other. Features of zero meet them: inf * 0."""
    rng = generator("skip, infinite weights", positions)
    x = np.maximum(rng.standard_normal((positions, features)), 0).astype(dtype)
    for density in (0.02, 0.5, 0.95):
        weights = np.where(rng.random((positions, positions)) < density, 1, 0).astype(dtype)
        for place in ((0, 0), (24, 255), (25, 256), (100, 64), (299, 63), (299, 299)):
            weights[place] = rng.choice([np.inf, -np.inf, np.nan])
        want = dense(weights, np.ascontiguousarray(x.T))
        same_on(want, lambda w=weights: fastblock.mix_positions(w, x), f"{density}", portable=density == 0.5)


# ---- the block: mixed positions in tiles of at most 128 rows


@pytest.mark.parametrize(
    ("leading", "positions", "features", "hidden"),
    [((), 600, 9, 300), ((2,), 130, 33, 257), ((3,), 97, 16, 64), ((), 350, 3, 20), ((2,), 60, 120, 300)],
)
def test_block(leading, positions, features, hidden, dtype, same_on):
    rng = generator("skip block", positions)
    x, w1, b1, w2, b2, w_q, w_k = (
        rng.standard_normal(s).astype(dtype)
        for s in [
            (*leading, positions, features),
            (hidden, features), hidden, (features, hidden), features, (8, features), (8, features),
        ]
    )  # fmt: skip
    b1 -= dtype(0.8 * features**0.5)  # more zeros than not
    block = fastblock.Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k)
    keep = np.arange(positions) < positions - 30

    def expected(weights):
        """No step of it skips."""
        z = np.empty_like(x)
        for i in np.ndindex(leading):
            z[i] = fastblock.down_project(weights[i], np.ascontiguousarray(x[i].T))
        return fastblock.down_project(fastblock.up_project(z, w1, b1), w2, b2)

    for name, options in {"own": {}, "causal": {"causal": True}, "padded": {"causal": True, "key_mask": keep}}.items():
        weights = fastblock.attention_weights(x, w_q, w_k, **options)
        want = expected(weights)
        portable = name == "causal" and positions < 200
        same_on(want, lambda o=options: block(x, **o), name, portable)
        same_on(want, lambda a=weights: block(x, a), f"{name}, as weights", False)
    band = abs(np.subtract.outer(np.arange(positions), np.arange(positions))) <= 2
    weights = np.broadcast_to((band * rng.standard_normal(band.shape)).astype(dtype), (*leading, *band.shape))
    same_on(expected(weights.copy()), lambda: block(x, weights[(0,) * len(leading)]), "banded, shared", positions < 200)


# ---- memory

MEASURE = """
import sys
import numpy as np
import fastblock

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

dtype, threads, positions = sys.argv[1], int(sys.argv[2]), [int(n) for n in sys.argv[3:]]
rng = np.random.default_rng(0)
d, f = 256, 1024
block = fastblock.Block(*(rng.standard_normal(s).astype(dtype) for s in [(f, d), f, (d, f), d]))
fastblock.set_num_threads(threads)
block.feed_forward(np.ones((threads * 48, d), dtype))  # starts the threads
for n in positions:
    x = np.ones((n, d), dtype)
    x[:, ::2] = -1  # many units are zero, and lists are made of the others
    out = np.ones_like(x)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    block.feed_forward(x, out=out)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory in /proc")
@pytest.mark.parametrize(
    ("threads", "positions"),
    [(1, (1, 2048, 8192)), (2, (95, 96, 2048)), (8, (383, 384)), (32, (128, 1535))],
    ids=["1", "2", "8", "32"],
)
def test_workspace_of_a_feed_forward(threads, positions, dtype):
    """At most 2 MiB a thread, however many positions. All hidden activations of 8192 would be 32 MiB."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, np.dtype(dtype).name, str(threads), *map(str, positions)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    for n, used in zip(positions, result.stdout.split(), strict=True):
        assert int(used) <= (2 * threads + 1) * 2**20, f"{int(used) / 2**20:.1f} MiB for {n} positions"
