"""exp of every tier, against the reference. In float32 all 2**32 inputs are tried (marked slow).

Two vectors side by side share the decision whether the quick way is sure, so in a sweep in order an input may be right
because of its neighbours. Hence each input is also tried alone: in all lanes of two vectors, and amid easy neighbours.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from adversarial import exp_points

import fastblock
from fastblock import _core, reference

CHUNK = 2**22
LOST = [-float.fromhex(x) for x in ("0x1.1E3Ap51", "0x1.1E3Dp51")]  # whose error was once lost in rounding
TWO_VECTORS = {"avx512": 32, "avx2": 16, "neon": 8, "portable": 8}  # lanes in float32


def test_hard_and_special_arguments(dtype, every_tier, same_bytes):
    x = exp_points(dtype, 40_000)
    want = reference.exp(x)
    for tier in every_tier():
        same_bytes(_core._exp(x), want, tier)


def test_a_sample_of_all_float32(every_tier, same_bytes):
    # 4099 is prime, so the sample meets every exponent with ever different low bits
    x = np.arange(0, 2**32, 4099, dtype=np.uint32).view(np.float32)
    want = reference.exp(x)
    for tier in every_tier():
        same_bytes(_core._exp(x), want, tier)


def test_every_length(dtype, every_tier, same_bytes):
    """Tails are computed like the rest, whatever the vector width."""
    x = exp_points(dtype, 400)[:71]
    want = reference.exp(x)
    for tier in every_tier():
        for n in range(72):
            same_bytes(_core._exp(x[:n].copy()), want[:n], f"{tier}, {n} elements")
            same_bytes(_core._exp(x[71 - n :].copy()), want[71 - n :], f"{tier}, last {n} elements")


def alone(x, tier):
    """exp of each x in all lanes of two vectors: the bits of one of them, and how many of the others differ from it."""
    lanes = TWO_VECTORS[tier]
    bits = np.concatenate([_core._exp(np.repeat(part, lanes)) for part in np.array_split(x, -(-x.size // 2**11))])
    bits = bits.view(np.uint32).reshape(-1, lanes)
    return bits[:, 0], np.count_nonzero(bits != bits[:, :1])


def test_the_way_of_an_input_is_its_own(every_tier):
    """Wherever the quick way might take garbage for sure: everywhere beyond its range, for every exponent."""
    exponents = np.arange(256, dtype=np.uint32)[:, None] << 23
    mantissas = np.concatenate([np.arange(0, 2**23, 65_537), np.arange(16), 2**23 - 1 - np.arange(16)]).astype(
        np.uint32
    )
    bits = (exponents | mantissas).ravel()
    x = np.concatenate(
        [(bits | sign).view(np.float32) for sign in np.array([0, 2**31], np.uint32)] + [np.array(LOST, np.float32)]
    )
    want = reference.exp(x).view(np.uint32)
    for tier in every_tier():
        got, differing = alone(x if tier != "portable" else x[::7], tier)
        wrong = got != (want if tier != "portable" else want[::7])
        assert not wrong.any() and not differing, (tier, np.count_nonzero(wrong), differing)


def test_every_lane_amid_easy_neighbours(every_tier, same_bytes):
    """One hard input among zeros, in each place of a step of several vectors and of what is left behind it."""
    hard = np.array([*LOST, 87.0, -87.0, 87.00001, -1e30, 3e38, -104.0, np.nan, -np.inf, 1e-45], np.float32)
    for tier in every_tier():
        for length in (3 * TWO_VECTORS[tier], TWO_VECTORS[tier] // 2 + 3):
            for place in range(length):
                x = np.zeros(length, np.float32)
                for value in hard:
                    x[place] = value
                    same_bytes(_core._exp(x), reference.exp(x), f"{value} at {place} of {length}, {tier}")


def test_attention_weights_of_scores_beyond_the_range_of_exp(dtype, every_tier, same_bytes):
    """One score far below the largest, with few neighbours: its weight is 0."""
    for score in (*LOST, 2**10 * LOST[0], -1000.0, -(2.0**60), -(2.0**100)):
        x, w_q = np.array([[1], [0]], dtype), np.array([[score]], dtype)
        want = np.array([[0, 1], [0.5, 0.5]], dtype)
        same_bytes(reference.attention_weights(x, w_q, np.ones((1, 1), dtype)), want, "reference")
        for tier in every_tier():
            same_bytes(fastblock.attention_weights(x, w_q, np.ones((1, 1), dtype)), want, f"{score}, {tier}")


def count_differences(start):
    """How many of the float32 with the bits start .. start + CHUNK - 1 each tier gets wrong, side by side and alone."""
    x = np.arange(start, start + CHUNK, dtype=np.int64).astype(np.uint32).view(np.float32)
    want = reference.exp(x).view(np.uint32)
    wrong = {}
    for tier in fastblock.isas():
        fastblock.use_isa(tier)
        wrong[tier] = np.count_nonzero(_core._exp(x).view(np.uint32) != want)
        if tier != "portable":  # whose arithmetic is the same, and which would take an hour
            got, differing = alone(x, tier)
            wrong[tier] += np.count_nonzero(got != want) + differing
    return wrong


@pytest.mark.slow
def test_all_float32():
    # processes start afresh ("spawn"): forking one that has threads is deprecated
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        starts = range(0, 2**32, CHUNK)
        for start, wrong in zip(starts, pool.map(count_differences, starts), strict=True):
            assert wrong == dict.fromkeys(fastblock.isas(), 0), f"of the {CHUNK} inputs from {start:#x}"
