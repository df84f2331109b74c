"""Right before fast: how a result is judged before the clock starts."""

from dataclasses import dataclass
from functools import cache

import numpy as np

ROUNDING = 1000  # units of the last place that rounding may explain in the root mean square: a lower precision shows


@dataclass(frozen=True)
class Verdict:
    """`verified`: bits were compared with the reference, and are equal. `wrong`: what is wrong, if anything. The errors
    are relative to the root mean square of the truth."""

    verified: bool = False
    wrong: str | None = None
    rms_error: float | None = None
    max_error: float | None = None


@cache
def _right(case):
    """(bits that fastblock must return, truth) of the sample of a case."""
    data = case.data_of_sample(case.data())
    return case.reference(data), case.truth(data)


def judge(contestant, case, result):
    """The verdict on the sample of a result: bits of fastblock, and everybody's error. None is not judged."""
    if result is None:
        return Verdict()
    bits, truth = _right(case)
    rms_error = max_error = wrong = None
    if truth is not None:
        error, scale = np.abs(result - truth), np.sqrt(np.mean(np.square(truth)))
        rms_error, max_error = float(np.sqrt(np.mean(np.square(error))) / scale), float(error.max() / scale)
        if not rms_error < ROUNDING * np.finfo(case.dtype).eps:
            wrong = f"WRONG RESULT, off by {rms_error:.1e}"
    verified = contestant == "fastblock" and (result.dtype, result.shape) == (bits.dtype, bits.shape)
    if verified and result.tobytes() != bits.tobytes():
        verified, wrong = False, "WRONG BITS"
    return Verdict(verified, wrong, rms_error, max_error)
