"""Inputs that find wrong arithmetic. Random data does not: it never shows double rounding, for one.

`fma_sets` are operands for fused multiply-add, `exp_points` arguments for exp, `INPUT_CLASSES` whole arrays for the
operations. Everything is deterministic: each set has a generator of its own, so adding one changes no other.
"""

import zlib

import numpy as np


def generator(*names):
    """A random generator that depends on the names only."""
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


def random_bits(rng, shape, dtype):
    """Any value at all, NaNs with payloads included."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return rng.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True).view(dtype)


def _signs(rng, n):
    return rng.choice([-1.0, 1.0], n)


# ---- fused multiply-add


def fma_sets(dtype, n):
    """Yield (name, a, b, c), about n of each."""
    sets = _FMA_SETS_32 if dtype == np.float32 else _FMA_SETS_64
    for make in [*_FMA_SETS_BOTH, *sets]:
        name = make.__name__.strip("_").replace("_", " ")
        with np.errstate(all="ignore"):  # the point of some sets is to overflow or underflow when they are cast
            operands = make(generator("fma", name), n, np.dtype(dtype))
            yield name, *(np.ascontiguousarray(v, dtype) for v in operands)
    yield "specials, all triples", *np.array(np.meshgrid(*[specials(dtype)] * 3)).reshape(3, -1).astype(dtype)


def specials(dtype):
    info = np.finfo(dtype)
    half, product = (2.0**-75, 2.0**64) if dtype == np.float32 else (2.0**-538, 2.0**512)
    values = [0.0, 1.0, 1 + info.eps, half, product, info.max, np.inf]
    values += [info.tiny, info.tiny * 0.75, info.smallest_subnormal]
    return np.array([*values, *(-v for v in values), np.nan], dtype)


def _random_bits(rng, n, dtype):
    return [random_bits(rng, n, dtype) for _ in range(3)]


def _normal(rng, n, dtype):
    return rng.standard_normal((3, n))


def _exact_cancellation(rng, n, dtype):
    a, b = rng.standard_normal((2, n)).astype(dtype)
    return a, b, -(a * b)  # what is left is the rounding error of the product


def _cancellation_but_for_3_ulp(rng, n, dtype):
    a, b = rng.standard_normal((2, n)).astype(dtype)
    signed = np.dtype(f"i{dtype.itemsize}")
    return a, b, ((-(a * b)).view(signed) + rng.integers(-3, 4, n, dtype=signed)).view(dtype)


def _product_near_half_an_ulp_of_c(rng, n, dtype):
    eps = np.finfo(dtype).eps
    c = rng.standard_normal(n).astype(dtype)
    half_ulp = np.spacing(np.abs(c)).astype(np.float64) / 2
    a = 1 + rng.integers(-4, 5, n) * eps
    return a, half_ulp * (1 + rng.integers(-4, 5, n) * eps) * _signs(rng, n), c


def _tiny_product_beside_a_power_of_two(rng, n, dtype):
    gap = rng.integers(-140, -20, n) if dtype == np.float32 else rng.integers(-600, -54, n)
    eps = np.finfo(dtype).eps
    return np.ldexp(1.0, gap), _signs(rng, n), _signs(rng, n) * (1 + rng.integers(0, 3, n) * eps)


_FMA_SETS_BOTH = [
    _random_bits,
    _normal,
    _exact_cancellation,
    _cancellation_but_for_3_ulp,
    _product_near_half_an_ulp_of_c,
    _tiny_product_beside_a_power_of_two,
]


def _midpoint_product_plus_tiny_c_32(rng, n, dtype):
    """Odd products of 25 bits lie half way between two floats; c decides. Double rounding goes wrong in 1 of 3."""
    a = rng.choice([3, 5, 7, 9, 11, 13], n)
    b = (rng.integers(2**24, 2**25, n) // a) | 1
    b = np.where(a * b < 2**25, b, b - 2)
    return a, b, np.ldexp(rng.choice([-1.0, 0.0, 1.0], n), rng.integers(-149, -30, n))


def _subnormal_result_32(rng, n, dtype):
    a, b = rng.standard_normal((2, n)) * 2.0**-70
    return a, b, rng.integers(-(2**23), 2**23, n) * 2.0**-149


def _deep_underflow_32(rng, n, dtype):
    return rng.standard_normal(n) * 2.0**-82, rng.standard_normal(n) * 2.0**-70, 0.0 * _signs(rng, n)


def _near_overflow_32(rng, n, dtype):
    a = np.ldexp(rng.uniform(1, 2, n), rng.integers(60, 67, n)) * _signs(rng, n)
    b = np.ldexp(rng.uniform(1, 2, n), rng.integers(60, 64, n))
    return a, b, np.ldexp(rng.standard_normal(n), rng.integers(100, 127, n))


def _overflow_boundary_32(rng, n, dtype):
    factor = np.full(n, 2.0**64)
    return factor, factor, -(rng.integers(0, 8, n) * 2.0**103 + rng.integers(-3, 4, n) * 2.0**80)


_FMA_SETS_32 = [
    _midpoint_product_plus_tiny_c_32,
    _subnormal_result_32,
    _deep_underflow_32,
    _near_overflow_32,
    _overflow_boundary_32,
]


def _midpoint_product_plus_tiny_c_64(rng, n, dtype):
    """Odd products of 53 or 54 bits: the latter lie half way between two doubles."""
    a, b = rng.integers(2**26, 2**27, (2, n)) | 1
    return a, b, np.ldexp(rng.choice([-1.0, 0.0, 1.0], n), rng.integers(-1074, -30, n))


def _subnormal_result_64(rng, n, dtype):
    e = rng.integers(-540, -500, n)
    a = np.ldexp(rng.uniform(1, 2, n), e) * _signs(rng, n)
    b = np.ldexp(rng.uniform(1, 2, n), -1074 - e + rng.integers(-8, 60, n))
    c = np.where(rng.random(n) < 0.3, rng.integers(-8, 9, n), rng.integers(-(2**52), 2**52, n))
    return a, b, c * 2.0**-1074


def _subnormal_tie_64(rng, n, dtype):
    a, b = rng.integers(2**26, 2**27, (2, n)) | 1
    return np.ldexp(a, -540), np.ldexp(b, -586 + rng.integers(-4, 4, n)), rng.integers(-3, 4, n) * 2.0**-1074


def _around_the_smallest_normal_64(rng, n, dtype):
    a, b = np.ldexp(rng.uniform(0.9, 1.1, (2, n)), -511)
    return a, b, rng.integers(-(2**53), 2**53, n) * 2.0**-1074


def _deep_underflow_64(rng, n, dtype):
    a, b = rng.standard_normal((2, n)) * 2.0**-560
    return a, b, 0.0 * _signs(rng, n)


def _subnormal_times_subnormal_64(rng, n, dtype):
    a, b = rng.integers(-(2**52), 2**52, (2, n)) * 2.0**-1074
    return a, b, rng.integers(-3, 4, n) * 2.0**-1074


def _subnormal_times_big_64(rng, n, dtype):
    a = rng.integers(-(2**52), 2**52, n) * 2.0**-1074
    return (
        a,
        np.ldexp(rng.uniform(1, 2, n), rng.integers(-1, 1023, n)),
        np.ldexp(rng.standard_normal(n), rng.integers(-1060, 900, n)),
    )


def _product_where_its_tail_underflows_64(rng, n, dtype):
    """Around 2**-960 error-free products stop being free of error."""
    e = rng.integers(-500, -460, n)
    a = np.ldexp(rng.uniform(1, 2, n), e)
    b = np.ldexp(rng.uniform(1, 2, n), rng.integers(-980, -940, n) - e)
    return a, b, -(a * b) * rng.choice([0.0, 1.0, 1 + 2.0**-52], n)


def _near_overflow_64(rng, n, dtype):
    a = np.ldexp(rng.uniform(1, 2, n), rng.integers(500, 514, n)) * _signs(rng, n)
    b = np.ldexp(rng.uniform(1, 2, n), rng.integers(480, 512, n))
    return a, b, np.ldexp(rng.standard_normal(n), rng.integers(960, 1021, n))


def _overflow_boundary_64(rng, n, dtype):
    factor = np.full(n, 2.0**512)
    return factor, factor, -(rng.integers(0, 8, n) * 2.0**970 + rng.integers(-3, 4, n) * 2.0**900)


_FMA_SETS_64 = [
    _midpoint_product_plus_tiny_c_64,
    _subnormal_result_64,
    _subnormal_tie_64,
    _around_the_smallest_normal_64,
    _deep_underflow_64,
    _subnormal_times_subnormal_64,
    _subnormal_times_big_64,
    _product_where_its_tail_underflows_64,
    _near_overflow_64,
    _overflow_boundary_64,
]


# ---- exp

# All float32 x for which e**x is within 2**-48 (relative) of the middle between two floats, as bits, hardest first.
# Found by trying every float32 from 2**-26 to 104 and its negative; nearer to zero e**x rounds to 1 or a neighbour.
EXP_HARD_32 = np.array(
    [
        0xC16912CD, 0xBBF0EDF1, 0xBAE0E25C, 0x377EFF81, 0x40315B33, 0x4001B249, 0x39C6BE5B, 0x38E69CC1, 0x3D1A274E,
        0x383A3EF1, 0xBC2A461A, 0x4288942B, 0xBBB70EE8, 0x3FE67199, 0xC13D6631, 0x41CBF87B, 0x39E5BB1D, 0x36FDFFC1,
        0x367BFFE1, 0x35F7FFF1, 0x356FFFF9, 0x34DFFFFD, 0x343FFFFF, 0x33800000, 0x337FFFFF, 0xBCB8F40F, 0xC0781533,
        0xB7F4C0EA, 0x40DD70CB, 0xB7C9C09F, 0xBFBFA14B, 0xBA7242A6, 0x38AD9E29, 0xBDB393EB, 0x4034D02B, 0xBF76FD92,
        0xBF81EADF, 0xC0382E72, 0xB3000001, 0xB3C00001, 0xB4200001, 0xB4B00002, 0xB5D4000B, 0xB616000B, 0xB6B50020,
        0x3C971AAA, 0x3A7BCD08, 0x3F5BC24C, 0x4283070F, 0x3CAFFE2E, 0x4178966E, 0x3C608A0E, 0xBCE017BB, 0xB3000000,
        0xB2FFFFFF,
    ],
    np.uint32,
).view(np.float32)  # fmt: skip


def exp_points(dtype, n):
    """About n arguments: hard to round, at and around every threshold, tiny, special, and spread out."""
    rng = generator("exp", np.dtype(dtype).name)
    ln2 = np.log(2.0)
    if dtype == np.float32:
        thresholds, lowest, highest = [-150, -104, -103.97208, -103.2789, -87.33655, 88.72284, 89, 128, 130], -104, 89
        hard = [EXP_HARD_32]
    else:
        thresholds = [-746, -745.1332191019412, -744.4400719213812, -708.3964185322641, 709.782712893384, 710]
        lowest, highest = -746, 710
        hard = []
    steps = np.arange(-40, 41)
    around = [np.dtype(dtype).type(t) + steps * np.spacing(np.dtype(dtype).type(t)) for t in thresholds]
    return np.concatenate(
        [
            *hard,
            specials(dtype),
            *around,
            np.arange(int(lowest / ln2), int(highest / ln2) + 1) * ln2,  # e**x near a power of two
            (np.arange(int(lowest / ln2), int(highest / ln2)) + 0.5) * ln2,  # the argument reduction changes side
            np.ldexp(_signs(rng, n // 4), rng.integers(-80, 0, n // 4)) * rng.uniform(1, 2, n // 4),
            rng.uniform(lowest, highest, n // 4),
            -rng.exponential(5.0, n // 4),  # what a softmax meets
            random_bits(rng, n // 4, dtype),
        ],
        dtype=dtype,
        casting="same_kind",
    )


# ---- whole arrays


def _gaussian(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def _small_integers(rng, shape, dtype):
    return rng.integers(-8, 9, shape).astype(dtype)


def _wide_exponents(rng, shape, dtype):
    limit = 60 if dtype == np.float32 else 470
    return np.ldexp(rng.standard_normal(shape), rng.integers(-limit, limit, shape)).astype(dtype)


def _subnormal_results(rng, shape, dtype):
    """Products are around the smallest subnormal and far below the smallest normal."""
    return (rng.standard_normal(shape) * (2.0**-70 if dtype == np.float32 else 2.0**-530)).astype(dtype)


def _signed_zeros(rng, shape, dtype):
    tiny = float(np.finfo(dtype).tiny)
    return rng.choice([0.0, -0.0, 1.0, -1.0, tiny, -tiny], shape, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1]).astype(dtype)


def _overflows(rng, shape, dtype):
    """Finite, but products and sums go to infinity, of either sign, and sometimes to inf - inf."""
    return (rng.standard_normal(shape) * (2.0**62 if dtype == np.float32 else 2.0**510)).astype(dtype)


def _infinities(rng, shape, dtype):
    return _sprinkled(rng, shape, dtype, np.array([np.inf, -np.inf], dtype))


def _nans(rng, shape, dtype):
    """Quiet and signalling NaNs of both signs, with payloads, and infinities that can meet to make new ones."""
    if dtype == np.float32:
        quiet, signalling = [0x7FC00000, 0xFFC00000, 2**32 - 1], [0x7F800001, 0xFFA00000]
        bits = np.array([*quiet, quiet[0] + 0x12345, *signalling, 0x7F800000], np.uint32)
    else:
        quiet, signalling = [0x7FF8 << 48, 0xFFF8 << 48, 2**64 - 1], [(0x7FF << 52) + 1, 0xFFF4 << 48]
        bits = np.array([*quiet, quiet[0] + 0x12345, *signalling, 0x7FF << 52], np.uint64)
    return _sprinkled(rng, shape, dtype, bits.view(dtype))


def _sprinkled(rng, shape, dtype, values):
    """Gaussian, with a few of `values`: few, so that most rows of a result stay free of them."""
    array = _gaussian(rng, shape, dtype)
    where = rng.random(shape) < min(0.2, 3 / max(array.size, 1))
    unsigned = np.dtype(f"u{array.itemsize}")
    array.view(unsigned)[where] = rng.choice(values.view(unsigned), int(where.sum()))  # as bits: copying may quieten
    return array


INPUT_CLASSES = {
    "gaussian": _gaussian,
    "small integers": _small_integers,
    "wide exponents": _wide_exponents,
    "subnormal results": _subnormal_results,
    "signed zeros": _signed_zeros,
    "overflows": _overflows,
    "infinities": _infinities,
    "nans": _nans,
}
