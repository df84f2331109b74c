"""A transformer block on the CPU: fast as the hardware, and the same bits everywhere.

::

    x (P, D) ───► attention_weights(w_q, w_k) ───► A (P, P)      or bring A yourself
       │                                              │
       └───────► mix_positions(A, x)  =  A x  ◄───────┘          (P, D)
                         │
                 up_project:    relu(z w1ᵀ + b1)                 (P, D) -> (P, F)
                         │
                 down_project:  h w2ᵀ + b2                       (P, F) -> (P, D)
                         │
                         ▼
                 y (P, D) ───► the next block, with parameters of its own

`Block` does all of it in one call with parameters packed once; `Stack` feeds one block to the next; every
step is also a function. All arrays of one call are float32, or all are float64. Any leading batch dimensions
go in front of the shapes above, and ``out=`` works everywhere.

Results are defined to the last bit by `fastblock.reference`, in plain NumPy, under the contract named by
`ARITHMETIC`. Batch size, threads, memory layout, instruction set, compiler: none of them changes a byte.

``python -m fastblock`` prints a worked example to follow with pencil and paper.
"""

from . import _process  # noqa: F401 (first: see there)

import os
import sys
from binascii import crc32
from typing import Any

import numpy as np

# Asked before the core is loaded, after NumPy: what others did is not the core's fault.
_flushed_before = sys.float_info.min / 2 == 0

try:
    from ._core import (
        attention_weights,
        bias_relu,
        down_project,
        feed_forward,
        mix_positions,
        num_threads,
        up_project,
    )
except ModuleNotFoundError as error:
    if error.name != "fastblock._core":
        raise
    raise ImportError(
        f"The compiled core of fastblock is not in {os.path.dirname(__file__)}. If this is the source tree, install "
        "the package (pip install .) and start Python in another directory, or install it in place (pip install -e .)."
    ) from error
from . import reference
from ._runtime import get_num_threads, isa, isas, set_num_threads, show_config, use_isa
from .layers import Block, Stack

__version__ = "0.1.0"

ARITHMETIC = "chain256-v1"
"""Name of the arithmetic contract. Results of two builds with the same name are equal byte for byte."""

__all__ = [
    "ARITHMETIC",
    "Block",
    "Stack",
    "__version__",
    "attention_weights",
    "bias_relu",
    "down_project",
    "feed_forward",
    "get_num_threads",
    "isa",
    "isas",
    "mix_positions",
    "num_threads",
    "reference",
    "set_num_threads",
    "show_config",
    "up_project",
    "use_isa",
]


def _results_for_check(library: Any, dtype: str) -> list[Any]:
    """Sums, products, divisions, exp and zeros that no value-changing optimization leaves as they are."""
    x = (np.arange(-9, 9) * 0.3125).reshape(3, 6).astype(dtype)
    weights = library.attention_weights(x, x[:2], x[1:])
    zeros = np.array([[-0.0, 0.0, -np.inf, 1.0, np.nan, -1.0]], dtype)
    return [weights, library.mix_positions(weights, x), library.bias_relu(zeros, zeros[0])]


# Of the reference's results, little-endian.
_CHECKSUMS = {"f4": 0xFCCB47D5, "f8": 0xED39F96D}


def _check_core() -> None:
    """Refuse a core whose compiler or linker was told to break the contract (microseconds)."""
    if sys.float_info.min / 2 == 0 and not _flushed_before:
        raise ImportError(
            "Loading the compiled core of fastblock made this process flush subnormal numbers to zero: it was linked "
            "with -Ofast, -ffast-math or the like. Build it again without them."
        )
    chosen = isa()
    try:
        for tier in isas():
            use_isa(tier)
            for dtype, expected in _CHECKSUMS.items():
                results = _results_for_check(sys.modules[__name__], dtype)
                if crc32(b"".join(result.astype("<" + dtype).tobytes() for result in results)) != expected:
                    raise ImportError(
                        f"The compiled core of fastblock does not compute the contract {ARITHMETIC} ({tier}, {dtype}): "
                        "its compiler was told to change values, or is wrong. Build it again without such options."
                    )
    finally:
        use_isa(chosen)


_check_core()
