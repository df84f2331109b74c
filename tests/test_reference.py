"""The definition itself, against rational numbers, decimals and sums done with pencil and paper."""

import ast
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from adversarial import EXP_HARD_32, exp_points, fma_sets

from fastblock import _core, reference

NAN, INF = math.nan, math.inf


def nearest(exact, dtype):
    """The value of dtype nearest to a Fraction, ties to even; the sign of zero is lost."""
    info = np.finfo(dtype)
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()  # or one less
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    ulp = Fraction(2) ** max(exponent - info.nmant, info.minexp - info.nmant)
    rounded = round(exact / ulp) * ulp  # round() of a Fraction takes ties to even
    if abs(rounded) > Fraction(float(info.max)):
        return INF if exact > 0 else -INF
    return float(rounded)


def fma_by_fractions(a, b, c, dtype):
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact != 0:
        return math.copysign(nearest(exact, dtype), 1 if exact > 0 else -1)
    product_is_negative = math.copysign(1.0, a) * math.copysign(1.0, b) < 0
    zeros_are_negative = (a == 0 or b == 0) and product_is_negative and math.copysign(1.0, c) < 0
    return -0.0 if zeros_are_negative else 0.0


def test_fma_is_rounded_once(dtype):
    for name, a, b, c in fma_sets(dtype, 1000):
        got = reference.fma(a, b, c)
        assert got.dtype == dtype
        want = [fma_by_fractions(*v, dtype) for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
        unequal = [
            (float(a[i]).hex(), float(b[i]).hex(), float(c[i]).hex(), g, w)
            for i, (g, w) in enumerate(zip(got.tolist(), want, strict=True))
            if not (g == w and math.copysign(1, g) == math.copysign(1, w)) and not (math.isnan(g) and math.isnan(w))
        ]
        assert not unequal, (name, len(unequal), unequal[:3])


def test_fma_of_a_tie_that_a_tiny_addend_breaks(dtype, same_bytes):
    """The product lies half way between two numbers; any addend however small decides, on either side, for any sign."""
    info = np.finfo(dtype)
    bits, least = info.nmant + 1, int(np.log2(info.smallest_subnormal))
    one = dtype(1)
    for exponent in range(least + 2 * bits + 4, info.maxexp - 4, 37):
        a, b = (
            one + dtype(2.0 ** (1 - bits)),
            dtype(1.5) * dtype(2.0**exponent),
        )  # 1.5 and half a unit in the last place
        for c_exponent in {least, least + 1, (least + exponent) // 2, exponent - 2 * bits}:
            for sign_a in (1, -1):
                for sign_c in (1, -1):
                    args = [np.array([v], dtype) for v in (sign_a * a, b, dtype(sign_c) * dtype(2.0**c_exponent))]
                    want = np.array([fma_by_fractions(*(float(v[0]) for v in args), dtype)], dtype)
                    same_bytes(reference.fma(*args), want, f"2**{exponent}, 2**{c_exponent}, {sign_a}, {sign_c}")
                    same_bytes(_core._fma(*args), want, f"the core, 2**{exponent}, 2**{c_exponent}, {sign_a}, {sign_c}")


def test_fma_sets_would_find_two_roundings():
    """The operands are worth something: rounding the binary64 result to float32 is wrong on some of them."""
    with np.errstate(all="ignore"):
        wrong = {
            name: np.count_nonzero(
                reference.canonical((a.astype(np.float64) * b + c).astype(np.float32))
                != reference.canonical(reference.fma(a, b, c))
            )
            for name, a, b, c in fma_sets(np.float32, 1500)
            if name in ("normal", "midpoint product plus tiny c 32")
        }
    assert wrong["normal"] == 0
    assert wrong["midpoint product plus tiny c 32"] > 100


def test_fma_broadcasts(dtype, same_bytes):
    a, b, c = (np.arange(n, dtype=dtype).reshape(s) for n, s in [(3, (3, 1)), (4, (4,)), (12, (3, 4))])
    same_bytes(reference.fma(a, b, c), a * b + c)


def exp_by_decimals(x):
    with localcontext(prec=60):
        return Fraction(Decimal(x).exp())


def test_exp_float32_is_the_nearest(same_bytes):
    x = np.concatenate([EXP_HARD_32, exp_points(np.float32, 800)])
    x = x[(x > -200) & (x < 200)]
    want = np.array([nearest(exp_by_decimals(float(v)), np.float32) for v in x], np.float32)
    same_bytes(reference.exp(x), want)


def test_exp_float64_is_less_than_one_ulp_off():
    x = exp_points(np.float64, 3000)
    x = x[(x > -745) & (x < 709.7)]
    for v, got in zip(x.tolist(), reference.exp(x).tolist(), strict=True):
        exact = exp_by_decimals(v)
        assert abs(Fraction(got) - exact) < Fraction(math.ulp(nearest(exact, np.float64))), v.hex()


@pytest.mark.parametrize(
    ("x", "want"),
    [(0.0, 1.0), (-0.0, 1.0), (INF, INF), (-INF, 0.0), (1e30, INF), (-1e30, 0.0), (1e-30, 1.0), (-1e-30, 1.0)],
)
def test_exp_at_its_ends(x, want, dtype, same_bytes):
    same_bytes(reference.exp(np.array([x], dtype)), np.array([want], dtype))


def test_exp_of_nan_is_canonical(dtype, same_bytes):
    same_bytes(reference.exp(-np.array([NAN], dtype)), canonical_nan(dtype))


def test_exp_overflows_and_underflows_where_it_should():
    got = reference.exp(np.array([709.782712893384, 709.7827128933841, -745.1332191019411, -745.1332191019412]))
    assert got.tolist() == [float.fromhex("0x1.fffffffffff2ap+1023"), INF, 5e-324, 0.0]


def canonical_nan(dtype):
    bits = np.uint32(0x7FC00000) if dtype == np.float32 else np.uint64(0x7FF8000000000000)
    return np.array([bits]).view(dtype)


@pytest.mark.parametrize(
    ("v", "canonical", "relu"),
    [(0.0, 0.0, 0.0), (-0.0, 0.0, 0.0), (1.5, 1.5, 1.5), (-1.5, -1.5, 0.0), (INF, INF, INF), (-INF, -INF, 0.0),
     (1e-40, 1e-40, 1e-40), (-1e-40, -1e-40, 0.0)],
)  # fmt: skip
def test_canonical_and_relu(v, canonical, relu, dtype, same_bytes):
    v, canonical, relu = (np.array([value], dtype) for value in (v, canonical, relu))
    same_bytes(reference.canonical(v), canonical)
    same_bytes(reference.relu(v), relu)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_nan_becomes_the_same(sign, dtype, same_bytes):
    signalling = np.array([0x7F800001], np.uint32) if dtype == np.float32 else np.array([(0x7FF << 52) + 1], np.uint64)
    for v in (np.array([NAN], dtype), signalling.view(dtype)):
        v = np.copysign(v, dtype(sign))
        same_bytes(reference.canonical(v), canonical_nan(dtype))
        same_bytes(reference.finish(v, np.ones(1, dtype)), canonical_nan(dtype))
        same_bytes(reference.relu(reference.canonical(v)), canonical_nan(dtype))


@pytest.mark.parametrize(
    ("total", "bias", "want"),
    [(1, 2, 3), (-0.0, None, 0.0), (-0.0, -0.0, 0.0), (1, -1, 0.0), (INF, -INF, NAN), (2.0**24, 1, None)],
)
def test_finish(total, bias, want, dtype, same_bytes):
    if want is None:  # a tie in float32, exact in float64
        want = 2.0**24 if dtype == np.float32 else 2.0**24 + 1
    bias = None if bias is None else np.array([bias], dtype)
    same_bytes(reference.finish(np.array([total], dtype), bias), np.array([want], dtype))


# A sum that starts with `stuck`, the first integer after which odd ones are missing, and goes on with ones. Within a
# block each one is lost (a tie to even). The ones of the later blocks are summed apart from it and count when added.
@pytest.mark.parametrize(
    ("terms", "gained"),
    [(0, None), (1, 0), (2, 0), (255, 0), (256, 0), (257, 0), (258, 2), (259, 4), (511, 256), (512, 256), (513, 256),
     (514, 258), (768, 512), (770, 514)],
)  # fmt: skip
def test_chain256_with_pencil_and_paper(terms, gained, dtype, same_bytes):
    stuck = 2.0 ** (np.finfo(dtype).nmant + 1)
    a = np.ones(terms, dtype)
    a[:1] = stuck
    want = 0.0 if gained is None else stuck + gained
    same_bytes(reference.chain256(a, np.ones(terms, dtype)), np.array(want, dtype))
    same_bytes(reference.chain256(np.ones(terms, dtype), a), np.array(want, dtype))


def test_chain256_multiplies_and_adds_with_one_rounding(dtype, same_bytes):
    # (1 + u)**2 = 1 + 2u + u**2 rounds to 1 + 2u, so only a fused operation finds the u**2
    u = 2.0**-12 if dtype == np.float32 else 2.0**-27
    a = np.array([1 + 2 * u, 1 + u], dtype)
    b = np.array([-1, 1 + u], dtype)
    same_bytes(reference.chain256(a, b), np.array(u * u, dtype))


def test_chain256_goes_up_and_adds_blocks_from_the_left(dtype, same_bytes):
    big = 2.0 ** (np.finfo(dtype).nmant + 1)
    a = np.zeros(3 * 256, dtype)
    a[[0, 256, 512]] = [1, big, -big]
    same_bytes(reference.chain256(a, np.ones_like(a)), np.zeros((), dtype))  # (1 + big) - big, not 1 + (big - big)
    a[[0, 1, 2, 256, 512]] = [-big, big, 1, 0, 0]
    same_bytes(reference.chain256(a, np.ones_like(a)), np.ones((), dtype))


@pytest.mark.parametrize("terms", [255, 256, 257, 512, 513])
def test_chain256_against_a_scalar_loop(terms, dtype, same_bytes):
    rng = np.random.default_rng(terms)
    a, b = rng.standard_normal((2, terms)).astype(dtype)
    total = 0.0
    for start in range(0, terms, 256):
        s = 0.0
        for k in range(start, min(start + 256, terms)):
            s = nearest(Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(s), dtype)
        total = s if start == 0 else nearest(Fraction(total) + Fraction(s), dtype)
    same_bytes(reference.chain256(a, b), np.array(total, dtype))
    unblocked = 0.0
    for k in range(terms):
        unblocked = nearest(Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(unblocked), dtype)
    if terms != 257:  # there it may go either way
        assert (unblocked == total) == (terms < 257), "the blocks should show in the bits of this example"


def test_worked_example(dtype, same_bytes):
    """5 positions of 3 features, 4 hidden units, every number small enough to check by hand."""
    x = np.array([[1, 2, 0], [0, -1, 3], [2, 0, 1], [-1, 1, 1], [3, 0, -2]], dtype)
    weights = np.eye(5, dtype=dtype) + np.eye(5, k=1, dtype=dtype)  # x1 := x1 + x2, x2 := x2 + x3, ...
    w1 = np.array([[1, 0, 0], [0, 1, -1], [1, 1, 1], [-1, 0, 2]], dtype)
    b1 = np.array([0, 1, -4, 2], dtype)
    w2 = np.array([[1, 2, 0, -1], [0, 1, 1, 0], [1, 0, 0, 1]], dtype)
    b2 = np.array([0, -1, 2], dtype)

    z = np.array([[1, 1, 3], [2, -1, 4], [1, 1, 2], [2, 1, -1], [3, 0, -2]], dtype)
    before_relu = np.array([[1, -1, 1, 7], [2, -4, 1, 8], [1, 0, 0, 5], [2, 3, -2, -2], [3, 3, -3, -5]], dtype)
    h = np.array([[1, 0, 1, 7], [2, 0, 1, 8], [1, 0, 0, 5], [2, 3, 0, 0], [3, 3, 0, 0]], dtype)
    y = np.array([[-6, 0, 10], [-6, 0, 12], [-4, -1, 8], [8, 2, 4], [9, 2, 5]], dtype)
    same_bytes(reference.mix_positions(weights, x), z)
    same_bytes(reference.finish(reference.chain256(z[:, None, :], w1), b1), before_relu)
    same_bytes(reference.up_project(z, w1, b1), h)
    same_bytes(reference.bias_relu(before_relu, np.zeros(4, dtype)), h)
    same_bytes(reference.down_project(h, w2, b2), y)
    same_bytes(reference.feed_forward(z, w1, b1, w2, b2), y)
    same_bytes(reference.block(x, w1, b1, w2, b2, weights), y)


def test_attention_weights_with_pencil_and_paper(dtype, same_bytes):
    """E = 4, so scale = 1/2. Equal scores share evenly; a score lower by 2000 gets nothing."""
    x = np.array([[1, 0], [0, 1], [1, 1]], dtype)
    w_q, w_k = np.zeros((2, 4, 2), dtype)
    same_bytes(
        reference.attention_weights(x, w_q, w_k, causal=True),
        np.array([[1, 0, 0], [0.5, 0.5, 0], [1 / dtype(3)] * 3], dtype),
    )
    w_q[0, 0], w_k[0, 0] = 1, 4000  # S[i,j] = 2000 x[i,0] x[j,0]
    same_bytes(
        reference.attention_weights(x, w_q, w_k), np.array([[0.5, 0, 0.5], [1 / dtype(3)] * 3, [0.5, 0, 0.5]], dtype)
    )
    keep = np.array([False, True, True])
    same_bytes(
        reference.attention_weights(x, w_q, w_k, key_mask=keep), np.array([[0, 0, 1], [0, 0.5, 0.5], [0, 0, 1]], dtype)
    )


def test_attention_weights_where_the_formula_is_easily_overlooked(dtype, same_bytes):
    nan = NAN
    x = np.array([[1], [2], [3]], dtype)
    one, none = np.ones((1, 1), dtype), np.ones((0, 1), dtype)
    attention_weights = reference.attention_weights

    # E = 0: scores 0 * inf are NaN at allowed keys; masked keys are +0.0 also in such a row
    same_bytes(
        attention_weights(x, none, none, causal=True), np.array([[nan, 0, 0], [nan, nan, 0], [nan, nan, nan]], dtype)
    )
    # no allowed key
    same_bytes(attention_weights(x, one, one, key_mask=np.zeros(3, bool)), np.zeros((3, 3), dtype))
    keep = np.array([False, True, True])
    thirds = attention_weights(x * 0, one, one, causal=True, key_mask=keep)
    same_bytes(thirds, np.array([[0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]], dtype))
    # the key of position 0 is infinite or NaN; so is its feature, hence the query of row 0 is 0 * inf = NaN
    zero = np.zeros_like(one)
    for value, others in [(-INF, [0, 0.5, 0.5]), (INF, [nan, nan, nan]), (nan, [nan, nan, nan])]:
        x = np.array([[value], [0], [0]], dtype)
        got = attention_weights(x, zero, one, np.ones(1, dtype))
        same_bytes(got, np.array([[nan] * 3, others, others], dtype))
        # alone it makes -inf - -inf, inf - inf or NaN; masked out it does no harm to the other rows
        got = attention_weights(x, zero, one, np.ones(1, dtype), key_mask=~keep)
        same_bytes(got, np.array([[nan, 0, 0]] * 3, dtype))
        got = attention_weights(x, zero, one, np.ones(1, dtype), key_mask=keep)
        same_bytes(got, np.array([[0, nan, nan], [0, 0.5, 0.5], [0, 0.5, 0.5]], dtype))


def test_zero_weights_do_not_hide_infinities(dtype, same_bytes):
    x = np.array([[INF, 1], [2, NAN]], dtype)
    got = reference.mix_positions(np.array([[0, 0], [1, 0]], dtype), x)
    same_bytes(got, np.array([[NAN, NAN], [INF, NAN]], dtype))


def test_batches_broadcast(dtype, same_bytes):
    rng = np.random.default_rng(1)
    weights, x = (rng.standard_normal(s).astype(dtype) for s in [(2, 1, 5, 5), (3, 5, 4)])
    got = reference.mix_positions(weights, x)
    assert got.shape == (2, 3, 5, 4)
    for i in range(2):
        for j in range(3):
            same_bytes(got[i, j], reference.mix_positions(weights[i, 0], x[j]))


def test_out_is_written_and_returned(dtype, same_bytes):
    x = np.arange(6, dtype=dtype).reshape(2, 3)
    want = reference.bias_relu(x, x[0])
    assert reference.bias_relu(x, x[0], out=x) is x
    same_bytes(x, want)


def test_block_says_what_it_needs(dtype):
    x, w = np.ones((2, 3), dtype), np.ones((3, 3), dtype)
    weights = np.ones((2, 2), dtype)
    with pytest.raises(ValueError, match="either weights or both"):
        reference.block(x, w, None, w, None)
    with pytest.raises(ValueError, match="either weights or both"):
        reference.block(x, w, None, w, None, w_q=w)
    for option in ({"causal": True}, {"key_mask": np.ones(2, bool)}):
        with pytest.raises(ValueError, match="causal and key_mask"):
            reference.block(x, w, None, w, None, weights, **option)


def test_dtypes_do_not_mix():
    x, w = np.ones((2, 3), np.float32), np.ones((3, 3))
    for call in (
        lambda: reference.up_project(x, w),
        lambda: reference.up_project(x, x, np.ones(2)),
        lambda: reference.mix_positions(np.ones((2, 2)), x),
        lambda: reference.bias_relu(x.astype(np.float16), x[0].astype(np.float16)),
    ):
        with pytest.raises(TypeError, match="float32"):
            call()


def test_the_source_keeps_to_its_own_arithmetic():
    """No operation whose rounding or order NumPy chooses, and exp only in binary64, inside `_exp32`."""
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.MatMult)]
    named = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    named += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    forbidden = {
        "add", "average", "convolve", "correlate", "cumsum", "dot", "einsum", "exp2", "expm1", "inner", "matmul",
        "matvec", "mean", "nansum", "prod", "reduce", "sum", "tensordot", "trace", "vdot", "vecdot", "vecmat",
    }  # fmt: skip
    assert not forbidden & set(named)
    numpy_exps = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.exp"
    ]
    assert numpy_exps == ["np.exp(x.astype(np.float64))"]
