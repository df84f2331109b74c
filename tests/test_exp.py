"""exp of every tier, against the reference. In float32 all 2**32 inputs are tried (marked slow)."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from adversarial import exp_points

import fastblock
from fastblock import _core, reference

CHUNK = 2**22


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


def count_differences(start):
    """How many of the float32 whose bits are start .. start + CHUNK - 1 each tier gets wrong."""
    x = np.arange(start, start + CHUNK, dtype=np.int64).astype(np.uint32).view(np.float32)
    want = reference.exp(x).view(np.uint32)
    wrong = {}
    for tier in fastblock.isas():
        fastblock.use_isa(tier)
        wrong[tier] = np.count_nonzero(_core._exp(x).view(np.uint32) != want)
    return wrong


@pytest.mark.slow
def test_all_float32():
    # processes start afresh ("spawn"): forking one that has threads is deprecated
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        starts = range(0, 2**32, CHUNK)
        for start, wrong in zip(starts, pool.map(count_differences, starts), strict=True):
            assert wrong == dict.fromkeys(fastblock.isas(), 0), f"of the {CHUNK} inputs from {start:#x}"
