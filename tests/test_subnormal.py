"""Subnormal operands: the same bytes as the reference, at about the cost of other numbers.

From 50000 multiply-adds on, a product whose operand holds subnormal numbers is computed from scaled copies, where the
exponents leave room (csrc/fb_subnormal.c): the kinds below stand on both sides of each of these conditions.
"""

import copy
import itertools
import pickle
import platform
import time

import numpy as np
import pytest
from adversarial import generator

import fastblock
from fastblock import reference

# By 2^SHIFT the smallest subnormal number becomes normal; exponents are those of np.frexp.
SHIFT = {np.float32: 24, np.float64: 53}


def ordinary(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def replaced(rng, shape, dtype, share, values):
    """Ordinary numbers, but for a share of them, one at least."""
    a = ordinary(rng, shape, dtype)
    flat = a.reshape(-1)
    at = rng.permutation(a.size)[: max(1, int(share * a.size))]
    flat[at] = np.resize(np.asarray(values, dtype), len(at))
    return a


def subnormals(rng, n, dtype):
    """Of all lengths, the smallest and the largest among them."""
    info = np.finfo(dtype)
    bits = rng.integers(0, 1 << info.nmant, n, np.uint64) >> rng.integers(0, info.nmant, n, np.uint64)
    bits[:4] = np.resize([1, 1, (1 << info.nmant) - 1, 1 << (info.nmant - 1)], min(n, 4))
    values = bits.astype(f"u{info.dtype.itemsize}").view(dtype)
    return values * rng.choice(np.array([-1, 1], dtype), n)


def few(rng, shape, dtype):
    return replaced(rng, shape, dtype, 0.01, subnormals(rng, 50, dtype))


def nothing_else(rng, shape, dtype):
    return subnormals(rng, np.prod(shape), dtype).reshape(shape)


def one(rng, shape, dtype):
    return replaced(rng, shape, dtype, 0, [np.finfo(dtype).smallest_subnormal])


def smallest_that_may_be_lowered(rng, shape, dtype):
    return replaced(rng, shape, dtype, 0.01, [np.finfo(dtype).tiny * dtype(2) ** SHIFT[dtype]])


def a_bit_smaller(rng, shape, dtype):
    smallest = np.finfo(dtype).tiny * dtype(2) ** SHIFT[dtype]
    return replaced(rng, shape, dtype, 0.01, [np.nextafter(smallest, dtype(0))])


def all_a_bit_smaller(rng, shape, dtype):
    """Each loses a bit when it is lowered, and no larger number hides it in a sum."""
    return (dtype(2) - rng.random(shape).astype(dtype)) * np.finfo(dtype).tiny * dtype(2) ** (SHIFT[dtype] - 1)


def largest_that_may_be_raised(rng, shape, dtype):
    largest = np.finfo(dtype).max * dtype(2) ** -SHIFT[dtype]
    return replaced(rng, shape, dtype, 0.02, [largest, *subnormals(rng, 5, dtype)])


def a_bit_larger(rng, shape, dtype):
    largest = np.finfo(dtype).max * dtype(2) ** -SHIFT[dtype]
    return replaced(rng, shape, dtype, 0.02, [np.nextafter(largest, dtype(np.inf)), *subnormals(rng, 5, dtype)])


def infinite(rng, shape, dtype):
    return replaced(rng, shape, dtype, 0.02, [np.inf, *subnormals(rng, 15, dtype), -np.inf])


def infinite_and_large(rng, shape, dtype):
    return replaced(rng, shape, dtype, 0.02, [np.inf, -np.inf])


def not_numbers(rng, shape, dtype):
    return replaced(rng, shape, dtype, 0.02, [np.nan, *subnormals(rng, 15, dtype)])


def zeros(rng, shape, dtype):
    a = few(rng, shape, dtype)
    a[rng.random(shape) < 0.9] = 0
    return a


KINDS = [
    ordinary, few, nothing_else, one, smallest_that_may_be_lowered, a_bit_smaller, all_a_bit_smaller,
    largest_that_may_be_raised, a_bit_larger, infinite, not_numbers, zeros,
]  # fmt: skip
# rows, k, columns: products that are looked at. k of several blocks, of one; few columns; a few rows.
SIZES = [(41, 40, 37), (7, 300, 33), (200, 260, 3), (41, 7, 200), (64, 1, 900)]


def same_on(every_tier, same_bytes, want, call, what):
    for tier in every_tier():
        for n in [1, 3]:
            with fastblock.num_threads(n):
                same_bytes(call(), want, f"{what}, {tier}, {n} threads")


@pytest.mark.parametrize(
    "left, right",
    [
        pytest.param(left, right, marks=[] if few in (left, right) or ordinary in (left, right) else pytest.mark.slow)
        for left, right in itertools.product(KINDS, KINDS)
        if not {left, right} <= {ordinary, infinite, not_numbers}
    ],
    ids=lambda kind: kind.__name__,
)
def test_products(left, right, dtype, every_tier, same_bytes):
    rows, depth, columns = SIZES[(KINDS.index(left) + KINDS.index(right)) % 2]
    rng = generator("subnormal", left.__name__, right.__name__)
    a, b = left(rng, (rows, depth), dtype), right(rng, (columns, depth), dtype)
    bias = ordinary(rng, columns, dtype)
    want = reference.down_project(a, b, bias)
    same_on(every_tier, same_bytes, want, lambda: fastblock.down_project(a, b, bias), "down_project")
    a, b = left(rng, (41, 41), dtype), right(rng, (41, 33), dtype)
    same_on(every_tier, same_bytes, reference.mix_positions(a, b), lambda: fastblock.mix_positions(a, b), "mix")


@pytest.mark.parametrize("size", SIZES)
def test_products_of_other_sizes(size, dtype, every_tier, same_bytes):
    rows, depth, columns = size
    for left, right in [(few, ordinary), (ordinary, few), (few, few), (largest_that_may_be_raised, ordinary)]:
        rng = generator("subnormal", size, left.__name__, right.__name__)
        a, b = left(rng, (rows, depth), dtype), right(rng, (columns, depth), dtype)
        want = reference.up_project(a, b)
        same_on(every_tier, same_bytes, want, lambda a=a, b=b: fastblock.up_project(a, b), f"{left} {right}")
        a, b = left(rng, (rows, rows), dtype), right(rng, (rows, columns), dtype)
        want = reference.mix_positions(a, b)
        same_on(every_tier, same_bytes, want, lambda a=a, b=b: fastblock.mix_positions(a, b), f"mix, {left} {right}")


def test_one_block_of_several_has_them(dtype, every_tier, same_bytes):
    """Each block of 256 k is scaled, or not, on its own, and several steps of a batch, each row of a tile."""
    rng = generator("subnormal blocks")
    weights = ordinary(rng, (2, 520, 520), dtype)
    x = ordinary(rng, (2, 520, 3), dtype)
    for block in range(3):
        a, b = weights.copy(), x.copy()
        a[block % 2, 3::50, 256 * block : 256 * (block + 1)] *= np.finfo(dtype).tiny
        b[1, 256 * block + 3] *= np.finfo(dtype).tiny
        for left, right in [(a, x), (weights, b), (a, b)]:
            want = reference.mix_positions(left, right)
            same_on(every_tier, same_bytes, want, lambda a=left, b=right: fastblock.mix_positions(a, b), f"{block}")
        a = a[0, :30]
        w = ordinary(rng, (40, 520), dtype)
        want = reference.up_project(a, w)
        same_on(every_tier, same_bytes, want, lambda a=a, w=w: fastblock.up_project(a, w), f"rows, {block}")


def test_a_block_that_is_not_the_first(dtype, every_tier, same_bytes):
    """Subnormal rows, first 256 k zero or ordinary, meet weights that are scaled: nothing larger hides a lost bit."""
    rng = generator("subnormal second block")
    w = few(rng, (48, 520), dtype)
    for first in (0, 256):
        x = np.zeros((40, 520), dtype)
        x[:, first : first + 256] = ordinary(rng, (40, 256), dtype)
        x[20:] = 0
        x[20:, 256:] = subnormals(rng, 20 * 264, dtype).reshape(20, 264)
        want = reference.up_project(x, w)
        same_on(every_tier, same_bytes, want, lambda x=x: fastblock.up_project(x, w), f"{first}")


def test_mixing_rows_of_several_kinds(dtype, every_tier, same_bytes):
    """From 128 rows on x is packed once and meets weights of another kind: it is scaled to and fro."""
    rng = generator("subnormal tiles of rows")
    for kind in [
        ordinary,
        few,
        infinite,
        infinite_and_large,
        not_numbers,
        largest_that_may_be_raised,
        all_a_bit_smaller,
    ]:
        x = kind(rng, (520, 20), dtype)
        weights = ordinary(rng, (520, 520), dtype)
        weights[:128] = few(rng, (128, 520), dtype)
        weights[256:384] = all_a_bit_smaller(rng, (128, 520), dtype)
        weights[384:500] = few(rng, (116, 520), dtype)
        want = reference.mix_positions(weights, x)
        same_on(every_tier, same_bytes, want, lambda x=x, a=weights: fastblock.mix_positions(a, x), kind.__name__)


@pytest.mark.parametrize("positions", [3, 70])
@pytest.mark.parametrize("kind", [few, one, nothing_else, largest_that_may_be_raised, not_numbers])
def test_feed_forward(kind, positions, dtype, every_tier, same_bytes):
    shapes = [(positions, 33), (300, 33), 300, (33, 300), 33]
    rng = generator("subnormal feed-forward", kind.__name__, positions)
    for i in range(len(shapes)):
        args = [ordinary(rng, s, dtype) for s in shapes]
        args[i] = kind(rng, shapes[i], dtype)
        want = reference.feed_forward(*args)
        same_on(every_tier, same_bytes, want, lambda a=args: fastblock.feed_forward(*a), f"operand {i}")
    # a hidden layer that is subnormal in places
    args = [ordinary(rng, s, dtype) for s in shapes]
    args[1][::7] *= np.finfo(dtype).tiny
    args[2][::7] *= np.finfo(dtype).tiny
    want = reference.feed_forward(*args)
    same_on(every_tier, same_bytes, want, lambda: fastblock.feed_forward(*args), "the hidden layer")


@pytest.mark.parametrize("kind", [few, one, nothing_else, largest_that_may_be_raised, not_numbers])
def test_attention_weights(kind, dtype, every_tier, same_bytes):
    shapes = [(70, 40), (20, 40), (20, 40), 20, 20]
    rng = generator("subnormal attention", kind.__name__)
    mask = rng.random(70) < 0.8
    for i in range(len(shapes)):
        args = [ordinary(rng, s, dtype) for s in shapes]
        args[i] = kind(rng, shapes[i], dtype)
        for options in {}, {"causal": True}, {"causal": True, "key_mask": mask}:
            want = reference.attention_weights(*args, **options)
            same_on(
                every_tier, same_bytes, want, lambda a=args, o=options: fastblock.attention_weights(*a, **o), f"{i}"
            )
    # queries and keys that are subnormal in places
    for i in (1, 2):
        args = [ordinary(rng, s, dtype) for s in shapes]
        args[i][3] *= np.finfo(dtype).tiny
        args[i + 2][3] *= np.finfo(dtype).tiny
        want = reference.attention_weights(*args)
        same_on(every_tier, same_bytes, want, lambda a=args: fastblock.attention_weights(*a), f"projection {i}")
    # ones that matter, for the other side is as large, and has small numbers that leave no room to scale it
    tiny = np.finfo(dtype).tiny
    for i, other in ((1, 2), (2, 1)):
        args = [ordinary(rng, s, dtype) for s in shapes]
        for scaled, row, by in ((i, 3, tiny / 8), (other, 3, 0.05 / tiny), (other, 4, tiny * 8)):
            args[scaled][row] *= by
            args[scaled + 2][row] *= by
        want = reference.attention_weights(*args)
        same_on(every_tier, same_bytes, want, lambda a=args: fastblock.attention_weights(*a), f"no room, {i}")


NAMES = ["w1", "b1", "w2", "b2", "w_q", "w_k", "b_q", "b_k"]


def parameters(rng, dtype, features, hidden, width):
    shapes = [
        (hidden, features), hidden, (features, hidden), features, (width, features), (width, features), width, width,
    ]  # fmt: skip
    return dict(zip(NAMES, (ordinary(rng, s, dtype) for s in shapes), strict=True))


def bytes_of(block):
    return {name: getattr(block, name).tobytes() for name in NAMES}


@pytest.mark.parametrize("features, hidden, width", [(20, 300, 5), (3, 5, 2), (16, 16, 16), (8, 8, 8), (17, 4, 1)])
def test_block(features, hidden, width, dtype, every_tier, same_bytes, tmp_path):
    """Packed on one tier and used on all; what is read back, pickled, copied or saved are the parameters."""
    rng = generator("subnormal block", features, hidden)
    x = ordinary(rng, (2, 50, features), dtype)
    mask = np.arange(50) < 44
    given = dict(zip(["few", "subnormal"], (f(rng, (50, 50), dtype) for f in (few, nothing_else)), strict=True))
    for name, kind in itertools.product(NAMES, [few, nothing_else]):
        args = parameters(rng, dtype, features, hidden, width)
        args[name] = kind(rng, args[name].shape, dtype)
        block = fastblock.Block(**args)
        assert bytes_of(block) == {n: a.tobytes() for n, a in args.items()}
        again = pickle.loads(pickle.dumps(block)), copy.deepcopy(block)
        block.save(tmp_path / "block.npz")
        for other in (*again, fastblock.Block.load(tmp_path / "block.npz")):
            assert bytes_of(other) == bytes_of(block)
            same_bytes(other(x), block(x), f"{name} {kind.__name__}, another one")
        want = reference.block(x, **args, causal=True, key_mask=mask)
        same_on(every_tier, same_bytes, want, lambda b=block: b(x, causal=True, key_mask=mask), f"{name} {kind}")
        weights, little = ordinary(rng, (2, 4, 4), dtype), x[:, :4]  # so few positions have a path of their own
        want = reference.block(little, *(args[n] for n in NAMES[:4]), weights)
        same_on(every_tier, same_bytes, want, lambda b=block: b(little, weights), f"{name} {kind}, little")
    for kind, weights in given.items():
        args = parameters(rng, dtype, features, hidden, width)
        block = fastblock.Block(**args)
        want = reference.block(x, *(args[n] for n in NAMES[:4]), weights)
        same_on(every_tier, same_bytes, want, lambda b=block, a=weights: b(x, a), f"weights {kind}")


def test_fortran_order_and_views(dtype, every_tier, same_bytes):
    rng = generator("subnormal views")
    x, w = few(rng, (90, 80), dtype), few(rng, (100, 80), dtype)
    args = x[::2, ::2], np.asfortranarray(w[::2, 1::2])
    want = reference.up_project(*map(np.ascontiguousarray, args))
    same_on(every_tier, same_bytes, want, lambda: fastblock.up_project(*args), "views")


# ---- the cost

COST = 4  # times that of ordinary numbers, at most; it was 5 to 47
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="they cost what other numbers cost")


def peaked(rng, rows, columns, dtype):
    """Attention weights of large scores: most are subnormal or close."""
    scores = rng.standard_normal((rows, columns)) * (30 if dtype == np.float32 else 250)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).astype(dtype)


def cases(dtype):
    """name: (a call that meets subnormal numbers, the same without)"""
    rng = generator("subnormal cost")
    x, weights = ordinary(rng, (128, 256), dtype), rng.random((128, 128)).astype(dtype)
    w1, w2, b1, b2 = (ordinary(rng, s, dtype) for s in [(1024, 256), (256, 1024), 1024, 256])
    w_q, w_k = (ordinary(rng, (64, 256), dtype) * dtype(0.02) for _ in range(2))
    relu = np.maximum(ordinary(rng, (128, 1024), dtype), 0)
    sprinkled = {id(a): replaced(rng, a.shape, dtype, 0.01, subnormals(rng, 99, dtype)) for a in (x, w1, w2, w_q)}

    def some(a):
        return sprinkled[id(a)]

    block, bad_block = fastblock.Block(w1, b1, w2, b2), fastblock.Block(some(w1), b1, some(w2), b2)
    own, bad_own = (fastblock.Block(w1, b1, w2, b2, w_q=a, w_k=w_k) for a in (w_q, some(w_q)))
    steep = peaked(rng, 128, 128, dtype)
    wide, late = ordinary(rng, (128, 512), dtype), ordinary(rng, (128, 512), dtype)
    late[:, 256:][:, ::100] *= np.finfo(dtype).tiny
    return {
        "mix_positions, weights": (
            lambda: fastblock.mix_positions(steep, x), lambda: fastblock.mix_positions(weights, x),
        ),
        "mix_positions, x": (
            lambda: fastblock.mix_positions(weights, some(x)), lambda: fastblock.mix_positions(weights, x),
        ),
        "up_project, x": (lambda: fastblock.up_project(some(x), w1), lambda: fastblock.up_project(x, w1)),
        "up_project, x, in its second block": (
            lambda: fastblock.up_project(late, w2[:, :512]), lambda: fastblock.up_project(wide, w2[:, :512]),
        ),
        "up_project, w1": (lambda: fastblock.up_project(x, some(w1)), lambda: fastblock.up_project(x, w1)),
        "down_project, w2": (lambda: fastblock.down_project(relu, some(w2)), lambda: fastblock.down_project(relu, w2)),
        "attention_weights, w_q": (
            lambda: fastblock.attention_weights(x, some(w_q), w_k), lambda: fastblock.attention_weights(x, w_q, w_k),
        ),
        "Block": (lambda: bad_block(x, weights), lambda: block(x, weights)),
        "Block, weights": (lambda: block(x, steep), lambda: block(x, weights)),
        "Block, few rows": (lambda: bad_block(x[:2], weights[:2, :2]), lambda: block(x[:2], weights[:2, :2])),
        "Block, its own weights": (lambda: bad_own(x), lambda: own(x)),
    }  # fmt: skip


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@x86
def test_cost(dtype, every_tier):
    for tier in every_tier():
        if tier == "portable":  # its fused multiply-add is integer arithmetic, or a function's
            continue
        for name, (call, ordinary_call) in cases(dtype).items():
            with fastblock.num_threads(1):
                best = [
                    min(times)
                    for times in zip(*((seconds(call), seconds(ordinary_call)) for _ in range(15)), strict=True)
                ]
            assert best[0] < COST * best[1], f"{name}, {tier}: {best[0] / best[1]:.1f} times the cost"
