"""The definition of every result of fastblock, in plain NumPy. The arithmetic is called chain256-v1.

Every fast kernel returns the bits of this file. All arrays of a call have one dtype, float32 or float64
(IEEE 754, round to nearest even, subnormals kept). With pencil and paper:

Primitives.  fma(a, b, c) is a*b + c rounded once. + - * / and sqrt are rounded once each. exp of a float32 is
    the float32 nearest to e**x; exp of a float64 is the sequence of steps written out in `_exp64`.
Sums.  There is one rule, `chain256`: cut the terms into blocks of 256, in order, counted from index 0. In each
    block start at s = +0.0 and do s = fma(a[k], b[k], s), k ascending. Add the block sums from left to right.
    No terms give +0.0.
Finishing.  `canonical` makes every NaN the same quiet NaN and -0.0 into +0.0; `finish` adds a bias (+0.0 where
    there is none) and then does that. `relu(v)` is v if v > 0 or v is NaN, else +0.0. So no result is ever -0.0,
    there is one NaN, and two results are equal if and only if their bytes are.
Operations.  X has P positions of D features, W1 is (F, D), W2 is (D, F), Wq and Wk are (E, D).
    mix_positions      Z[i,c] = finish(chain256_j(A[i,j], X[j,c]))
    bias_relu          relu(finish(Y[i,f], b[f]))
    up_project         H[i,f] = relu(finish(chain256_k(X[i,k], W1[f,k]), b1[f]))
    down_project       Y[i,c] = finish(chain256_f(H[i,f], W2[c,f]), b2[c])
    feed_forward       down_project(up_project(X))
    attention_weights  Q[i,e] = finish(chain256_k(X[i,k], Wq[e,k]), bq[e]), K likewise;
                       S[i,j] = canonical(finish(chain256_e(Q[i,e], K[j,e])) * scale), scale = 1/sqrt(E) computed
                       in binary64 and rounded to the dtype; over the allowed keys j of position i:
                       m = max S[i,j] (NaN if any is NaN), e[j] = exp(S[i,j] - m),
                       A[i,j] = canonical(e[j] * (1 / chain256_j(e[j], 1)))
    block              feed_forward(mix_positions(A, X)) with A given; with A from attention_weights the same, but the
                       term of a key that is not allowed is fma(+0.0, +0.0, s) whatever X holds there

What follows from the formulas and is easily overlooked:
    A key is allowed if key_mask says True and, with causal, j <= i. Other keys take no part in max or sum and get
    +0.0, even in a row that is NaN otherwise. A row without an allowed key is all +0.0.
    Leaving a key out renumbers nothing: its term is fma(+0.0, 1, s), which is s.
    So NaN or infinity at a position that may not be seen reaches no other position of a block. Its own row of scores
    still has it: the block's result there is what its query makes of it.
    A row whose allowed scores are all -inf, or where one is +inf or NaN, is NaN at its allowed keys.
    0 * inf is NaN wherever a key is allowed or A is given: a zero weight does not hide an infinite feature.
    E = 0 makes scale infinite and every score 0 * inf = NaN.
    Results are computed in full before `out` is written, so `out` may overlap any input.

The functions need the default floating-point mode (round to nearest, no flush to zero) in the calling thread.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _T = TypeVar("_T", np.float32, np.float64)

__all__ = [
    "attention_weights", "bias_relu", "block", "canonical", "chain256", "down_project", "exp", "feed_forward",
    "finish", "fma", "mix_positions", "relu", "up_project",
]  # fmt: skip


# ---- fused multiply-add: one rounding, built from operations that NumPy rounds correctly everywhere


def fma(a: NDArray[_T], b: NDArray[_T], c: NDArray[_T]) -> NDArray[_T]:
    """a*b + c rounded once, elementwise; a, b and c are float32 or float64, all the same."""
    with np.errstate(all="ignore"):
        return (_fma32 if c.dtype == np.float32 else _fma64)(a, b, c)


def _two_sum(a, b):
    """s = a + b rounded and its error e: s + e == a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _round_to_odd(s, e):
    """s + e, cut towards zero, last bit set if anything was cut: rounding it again later is as good as once.

    Nothing happens where e is NaN, which is where s is infinite or NaN.
    """
    towards_zero = ((e < 0) & (s > 0)) | ((e > 0) & (s < 0))  # not e * s < 0, which may underflow
    away = ((e > 0) & (s > 0)) | ((e < 0) & (s < 0))
    return ((s.view(np.int64) - towards_zero) | (towards_zero | away)).view(np.float64)


def _fma32(a, b, c):
    product = a.astype(np.float64) * b  # exact: 24 + 24 bits fit in 53
    return _round_to_odd(*_two_sum(product, c.astype(np.float64))).astype(np.float32)


def _halves(a):
    """a = high + low, 26 bits each, so that products of halves are exact (Veltkamp)."""
    t = 134217729.0 * a  # 2**27 + 1
    high = t - (t - a)
    return high, a - high


def _fma64(a, b, c):
    """The product as a pair (Dekker), then three numbers added with one rounding (Boldo and Melquiond).

    That holds while nothing overflows and the tail of the product is above the smallest subnormal; rational
    arithmetic does the rest.
    """
    product = a * b
    (ah, al), (bh, bl) = _halves(a), _halves(b)
    tail = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    t_high, t_low = _two_sum(c, tail)
    r_high, r_low = _two_sum(product, t_high)
    result = r_high + _round_to_odd(*_two_sum(t_low, r_low))

    simple = product + c  # right where a factor is zero, where the exact result is zero, and for inf and NaN
    big, small = 2.0**990, 2.0**-960
    size = np.abs(product)
    safe = (size > small) & (size < big) & (np.abs(a) < big) & (np.abs(b) < big) & (np.abs(c) < big)
    result = np.where(safe & (result != 0), result, simple)

    hard = ~safe & (a != 0) & (b != 0) & np.isfinite(a) & np.isfinite(b)
    if hard.any():
        a, b, c = np.broadcast_arrays(a, b, c)
        for i in map(tuple, np.argwhere(hard & np.isfinite(c))):
            result[i] = _fma64_rational(float(a[i]), float(b[i]), float(c[i]))
        result = np.where(hard & np.isinf(c), c, result)  # a*b may overflow, but is finite
    return result


def _fma64_rational(a, b, c):
    (an, ad), (bn, bd), (cn, cd) = a.as_integer_ratio(), b.as_integer_ratio(), c.as_integer_ratio()
    numerator, denominator = an * bn * cd + cn * ad * bd, ad * bd * cd
    if numerator == 0:
        return a * b + c  # exact, and the sign of the zero is the one IEEE 754 asks for
    try:
        return numerator / denominator  # Python rounds the quotient of integers once, -0.0 included
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


# ---- exp


def exp(x: NDArray[_T]) -> NDArray[_T]:
    """e**x, elementwise: correctly rounded in float32, less than 1 ulp off in float64; one NaN."""
    with np.errstate(all="ignore"):
        return canonical((_exp32 if x.dtype == np.float32 else _exp64)(x))


def _exp32(x):
    """The float32 nearest to e**x, whatever the platform's exp, if that is within 16 ulp of binary64."""
    y = np.exp(x.astype(np.float64))
    low, high = (y * (1 - 2.0**-48)).astype(np.float32), (y * (1 + 2.0**-48)).astype(np.float32)
    result = np.array(low)
    for i in map(tuple, np.argwhere((low != high) & (x != 0) & ~np.isnan(x))):
        above = min(float(high[i]), 2.0**128)  # infinity rounds like 2**128
        middle = (float(low[i]) + above) / 2  # exact: 25 bits
        with localcontext(prec=60):
            # e**x is irrational for rational x != 0, so this is never a tie
            result[i] = high[i] if Decimal(float(x[i])).exp() > Decimal(middle) else low[i]
    return result


_INV_LN2 = float.fromhex("0x1.71547652b82fep+0")
_LN2_HIGH = float.fromhex("0x1.62e42fefa3800p-1")  # 42 bits: n * _LN2_HIGH is exact for |n| <= 2047
_LN2_LOW = float.fromhex("0x1.ef35793c76730p-45")  # ln 2 - _LN2_HIGH, rounded
_ROUND = 1.5 * 2.0**52  # adding it rounds |x| < 2**51 to an integer, which subtracting it uncovers
# (e**r - 1 - r) / r**2 on |r| <= ln(2)/2: interpolation at Chebyshev nodes, highest power first. It is off by at
# most 2**-59 of e**r; the Taylor polynomial of this degree by 2**-52, one degree less by 2**-54.
_EXP_COEFFICIENTS = [float.fromhex(c) for c in (
    "0x1.1f66e5b718f3ep-29", "0x1.af38b4925be09p-26", "0x1.27e4e1f1e809dp-22", "0x1.71de0da9d06acp-19",
    "0x1.a01a01a47bb19p-16", "0x1.a01a01a7c54aep-13", "0x1.6c16c16c167e0p-10", "0x1.11111111109b2p-7",
    "0x1.5555555555555p-5", "0x1.5555555555556p-3", "0x1p-1",
)]  # fmt: skip


def _exp64(x):
    """e**x = 2**n * e**r with r = x - n ln 2: this sequence of steps, in this order.

    p = 1 + r + r**2 q is summed as head + fma(r**2, q, rest), head = 1 + r rounded and rest what that cut off, so
    that almost all of the error is the last rounding. The largest error found is 0.66 ulp.
    """
    constant = x.dtype.type
    z = np.where(x < -746.0, -746.0, np.where(x > 710.0, 710.0, x))  # beyond, the result is 0 or inf anyway
    n = fma(z, constant(_INV_LN2), constant(_ROUND)) - _ROUND
    r_high = fma(n, constant(-_LN2_HIGH), z)
    r = fma(n, constant(-_LN2_LOW), r_high)
    head = 1.0 + r_high
    rest = fma(n, constant(-_LN2_LOW), r_high - (head - 1.0))
    q = constant(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        q = fma(q, r, constant(coefficient))
    p = head + fma(r * r, q, rest)
    # 2**n may be no float64, so scale twice: the first step is exact, the second rounds if it is subnormal
    n_first = fma(n, constant(0.5), constant(_ROUND)) - _ROUND
    return (p * _power_of_two(n_first)) * _power_of_two(n - n_first)


def _power_of_two(n):
    return np.ldexp(1.0, np.where(np.isnan(n), 0, n).astype(np.int32))


# ---- the rule for sums, and finishing


def chain256(a: NDArray[_T], b: NDArray[_T]) -> NDArray[_T]:
    """The sum of a[..., k] * b[..., k] over the last axis, by the one rule for sums; a and b broadcast."""
    shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    terms = a.shape[-1]
    total = np.zeros(shape, a.dtype)
    with np.errstate(all="ignore"):
        for start in range(0, terms, 256):
            s = np.zeros(shape, a.dtype)
            for k in range(start, min(start + 256, terms)):
                s = fma(a[..., k], b[..., k], s)
            total = s if start == 0 else total + s
    return total


def canonical(v: NDArray[_T]) -> NDArray[_T]:
    with np.errstate(all="ignore"):
        return np.where(np.isnan(v), v.dtype.type(np.nan), v + 0.0)  # -0.0 + 0.0 is +0.0


def finish(total: NDArray[_T], bias: NDArray[_T] | None = None) -> NDArray[_T]:
    with np.errstate(all="ignore"):
        return canonical(total + (0.0 if bias is None else bias))


def relu(v: NDArray[_T]) -> NDArray[_T]:
    return np.where((v > 0) | np.isnan(v), v, v.dtype.type(0.0))


# ---- operations: any leading batch dimensions


def mix_positions(weights: NDArray[_T], x: NDArray[_T], *, out: NDArray[_T] | None = None) -> NDArray[_T]:
    """Z = A X: every position becomes a weighted sum of all positions. Leading dimensions broadcast."""
    weights, x = _one_dtype(weights, x)
    features_first = np.swapaxes(x, -1, -2)
    return _put(finish(chain256(weights[..., :, None, :], features_first[..., None, :, :])), out)


def bias_relu(x: NDArray[_T], bias: NDArray[_T], *, out: NDArray[_T] | None = None) -> NDArray[_T]:
    x, bias = _one_dtype(x, bias)
    return _put(relu(finish(x, bias)), out)


def up_project(
    x: NDArray[_T], w1: NDArray[_T], b1: NDArray[_T] | None = None, *, out: NDArray[_T] | None = None
) -> NDArray[_T]:
    """H = relu(X W1^T + b1)"""
    return _put(relu(_project(x, w1, b1)), out)


def down_project(
    h: NDArray[_T], w2: NDArray[_T], b2: NDArray[_T] | None = None, *, out: NDArray[_T] | None = None
) -> NDArray[_T]:
    """Y = H W2^T + b2"""
    return _put(_project(h, w2, b2), out)


def feed_forward(
    x: NDArray[_T],
    w1: NDArray[_T],
    b1: NDArray[_T] | None,
    w2: NDArray[_T],
    b2: NDArray[_T] | None,
    *,
    out: NDArray[_T] | None = None,
) -> NDArray[_T]:
    return down_project(up_project(x, w1, b1), w2, b2, out=out)


def attention_weights(
    x: NDArray[_T],
    w_q: NDArray[_T],
    w_k: NDArray[_T],
    b_q: NDArray[_T] | None = None,
    b_k: NDArray[_T] | None = None,
    *,
    causal: bool | np.bool_ = False,
    key_mask: NDArray[np.bool_] | None = None,
    out: NDArray[_T] | None = None,
) -> NDArray[_T]:
    """A: row i says how much of every position j goes into position i. key_mask (..., P): True = keep."""
    x, w_q, w_k = _one_dtype(x, w_q, w_k)
    head_width = w_q.shape[0]
    queries, keys = _project(x, w_q, b_q), _project(x, w_k, b_k)

    allowed = _allowed_keys(x, causal, key_mask)
    with np.errstate(all="ignore"):
        scale = (1.0 / np.sqrt(np.float64(head_width))).astype(x.dtype)
        scores = canonical(finish(chain256(queries[..., :, None, :], keys[..., None, :, :])) * scale)
        largest = np.max(np.where(allowed, scores, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        e = np.where(allowed, exp(scores - largest), x.dtype.type(0.0))
        inverse = x.dtype.type(1.0) / chain256(e, np.ones_like(e))[..., None]
        return _put(np.where(allowed, canonical(e * inverse), x.dtype.type(0.0)), out)


def block(
    x: NDArray[_T],
    w1: NDArray[_T],
    b1: NDArray[_T] | None,
    w2: NDArray[_T],
    b2: NDArray[_T] | None,
    weights: NDArray[_T] | None = None,
    *,
    w_q: NDArray[_T] | None = None,
    w_k: NDArray[_T] | None = None,
    b_q: NDArray[_T] | None = None,
    b_k: NDArray[_T] | None = None,
    causal: bool | np.bool_ = False,
    key_mask: NDArray[np.bool_] | None = None,
    out: NDArray[_T] | None = None,
) -> NDArray[_T]:
    """The whole block: mix the positions, then the same two layers for each. Shape of x in, shape of x out."""
    if weights is None:
        if w_q is None or w_k is None:
            raise ValueError("block needs either weights or both w_q and w_k")
        weights = attention_weights(x, w_q, w_k, b_q, b_k, causal=causal, key_mask=key_mask)
        mixed = _mix_allowed(weights, x, _allowed_keys(x, causal, key_mask))
    elif causal or key_mask is not None:
        raise ValueError("causal and key_mask go with w_q and w_k; given weights are used as they are")
    else:
        mixed = mix_positions(weights, x)
    return feed_forward(mixed, w1, b1, w2, b2, out=out)


def _allowed_keys(x, causal, key_mask):
    """(..., P, P): whether position i may see key j."""
    positions = x.shape[-2]
    allowed = np.ones((*x.shape[:-1], positions), bool)
    if causal:
        allowed &= np.tri(positions, dtype=bool)
    if key_mask is not None:
        allowed &= np.broadcast_to(key_mask, x.shape[:-1])[..., None, :]
    return allowed


def _mix_allowed(weights, x, allowed):
    """Z = A X over the allowed keys: both factors of the other terms are +0.0."""
    zero = x.dtype.type(0.0)
    features_first = np.where(allowed[..., :, None, :], np.swapaxes(x, -1, -2)[..., None, :, :], zero)
    return finish(chain256(np.where(allowed, weights, zero)[..., :, None, :], features_first))


def _project(x, w, bias):
    """X W^T + bias, the same for each position; w is (out, in)."""
    x, w, *bias = _one_dtype(x, w, *([] if bias is None else [bias]))
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} features, but the weights take {w.shape[-1]}")
    return finish(chain256(x[..., None, :], w), *bias)


def _one_dtype(*arrays):
    arrays = [np.asarray(a) for a in arrays]
    if {a.dtype for a in arrays} not in ({np.dtype(np.float32)}, {np.dtype(np.float64)}):
        raise TypeError(f"all arrays must be float32 or all float64, not {[str(a.dtype) for a in arrays]}")
    return arrays


def _put(result, out):
    if out is None:
        return result
    out[...] = result
    return out
