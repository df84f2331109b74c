"""A key that a position may not see takes no part at all: whatever x holds there, nobody else can tell."""

import numpy as np
import pytest
from adversarial import generator

import fastblock
from fastblock import reference

NAN, INF = np.nan, np.inf
GARBAGE = [NAN, INF, -INF, "largest"]


def parameters(rng, features, hidden, width, dtype):
    shapes = [
        (hidden, features),
        hidden,
        (features, hidden),
        features,
        (width, features),
        (width, features),
        width,
        width,
    ]
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def both(arrays):
    """(the block, the reference), each to be called as f(x, causal=..., key_mask=...)"""
    layers, attention = arrays[:4], dict(zip(("w_q", "w_k", "b_q", "b_k"), arrays[4:], strict=True))
    block = fastblock.Block(*layers, **attention)
    return block, lambda x, **options: reference.block(x, *layers, **attention, **options)


def masks(rng, positions):
    """(name, key_mask) with at least one position that is masked out, where there is one"""
    number = np.arange(positions)
    yield "right", number < max(1, positions // 2)
    yield "left", number >= positions // 3 + 1
    yield "holes", rng.random(positions) < 0.6
    yield "none left", np.zeros(positions, bool)
    yield "one left", number == positions // 2


def spoiled(x, keep, value):
    """x with garbage where it is masked out, one kind in each row."""
    x, value = x.copy(), np.finfo(x.dtype).max if value == "largest" else value
    x[~keep] = value
    return x


# features and hidden units of a vector (the way of small blocks), of several panels, and more than a block of k
SIZES = [
    (1, 3, 4, 2),
    (2, 2, 3, 1),
    (5, 3, 4, 2),
    (9, 2, 7, 3),
    (31, 4, 5, 8),
    (33, 3, 4, 2),
    (17, 20, 33, 5),
    (40, 130, 17, 3),
]
LONG = [(255, 5, 6, 2), (257, 3, 20, 3), (300, 33, 6, 2), (520, 2, 18, 1)]


@pytest.mark.parametrize("sizes", [*SIZES, *LONG], ids=str)
def test_masked_keys(sizes, dtype, every_tier, same_bytes):
    positions = sizes[0]
    rng = generator("masked keys", sizes)
    block, expected = both(parameters(rng, *sizes[1:], dtype))
    clean = rng.standard_normal((positions, sizes[1])).astype(dtype)
    for number, (name, keep) in enumerate(masks(rng, positions)):
        for causal in (False, True):
            x = spoiled(clean, keep, GARBAGE[(number + causal) % len(GARBAGE)])
            want = expected(x, causal=causal, key_mask=keep)
            unspoiled = expected(clean, causal=causal, key_mask=keep)
            same_bytes(want[keep], unspoiled[keep], "the reference itself")
            for tier in every_tier():
                for threads in (1, 3):
                    with fastblock.num_threads(threads):
                        got = block(x, causal=causal, key_mask=keep)
                    same_bytes(got, want, f"{name}, causal {causal}, {tier}, {threads} threads")


@pytest.mark.parametrize("sizes", [*SIZES, *LONG], ids=str)
@pytest.mark.parametrize("value", GARBAGE)
def test_later_keys(sizes, value, dtype, every_tier, same_bytes):
    """With causal, garbage at one position reaches that position and those behind it only."""
    positions = sizes[0]
    rng = generator("later keys", sizes)
    block, expected = both(parameters(rng, *sizes[1:], dtype))
    clean = rng.standard_normal((positions, sizes[1])).astype(dtype)
    unspoiled = expected(clean, causal=True)
    for where in sorted({0, positions // 2, min(256, positions - 1), positions - 1}):
        x = spoiled(clean, np.arange(positions) != where, value)
        want = expected(x, causal=True)
        same_bytes(want[:where], unspoiled[:where], "the reference itself")
        for tier in every_tier():
            for threads in (1, 3):
                with fastblock.num_threads(threads):
                    same_bytes(block(x, causal=True), want, f"{value} at {where}, {tier}, {threads} threads")


def test_weights_that_underflow_hide_nothing(dtype, every_tier, same_bytes):
    """A weight of +0.0 at an allowed key meets an infinite feature: that is NaN, and no excluded key."""
    positions = 37
    x = np.zeros((positions, 2), dtype)
    x[:, 0] = np.arange(positions) * 1000  # so far apart that only the last allowed key has a weight
    x[3, 1] = INF
    one = np.array([[1, 0]], dtype)
    layers = [np.eye(2, dtype=dtype), None, np.eye(2, dtype=dtype), None]
    block = fastblock.Block(*layers, w_q=one, w_k=one, b_q=np.ones(1, dtype))
    for options in (
        {},
        {"causal": True},
        {"key_mask": np.arange(positions) != 5},
        {"key_mask": np.arange(positions) != 3},
    ):
        want = reference.block(x, *layers, w_q=one, w_k=one, b_q=np.ones(1, dtype), **options)
        for tier in every_tier():
            same_bytes(block(x, **options), want, f"{options}, {tier}")


@pytest.mark.parametrize("positions", [5, 40, 300])
def test_every_item_of_a_batch_has_its_own_mask(positions, dtype, every_tier, same_bytes):
    """Also where the batch is so large that it is done in several steps, 16 MiB of keys, queries and x at a time, by
    several threads."""
    batch, width = {5: (7, 2), 40: (3, 2), 300: (40, 260)}[positions]
    rng = generator("masks of a batch", positions)
    arrays = parameters(rng, 3, 4, width, dtype)
    block, expected = both(arrays)
    keep = rng.random((batch, positions)) < 0.7
    x = spoiled(rng.standard_normal((batch, positions, 3)).astype(dtype), keep, NAN)
    some = range(batch) if positions < 300 else [0, 3, 7, batch // 2, batch - 2, batch - 1]
    want = [expected(x[b], key_mask=keep[b]) for b in some]
    for tier in every_tier():
        for threads in (1, 3) if positions < 300 else (3,):
            with fastblock.num_threads(threads):
                got = block(x, key_mask=keep)
            for b, item in zip(some, want, strict=True):
                same_bytes(got[b], item, f"item {b}, {tier}, {threads} threads")


def test_a_stack_excludes_the_same_keys_in_every_block(dtype, same_bytes):
    rng = generator("excluded keys of a stack")
    arrays = [parameters(rng, 5, 9, 3, dtype) for _ in range(3)]
    stack = fastblock.Stack([both(a)[0] for a in arrays])
    clean = rng.standard_normal((11, 5)).astype(dtype)
    keep = np.arange(11) % 4 != 2
    same_bytes(stack(spoiled(clean, keep, NAN), key_mask=keep)[keep], stack(clean, key_mask=keep)[keep], "masked")
    later = spoiled(clean, np.arange(11) < 10, INF)
    same_bytes(stack(later, causal=True)[:10], stack(clean, causal=True)[:10], "causal")
