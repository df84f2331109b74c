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

import os
from typing import Any, Literal, overload

try:
    from ._core import (
        attention_weights,
        bias_relu,
        down_project,
        feed_forward,
        get_num_threads,
        isa,
        isas,
        mix_positions,
        num_threads,
        set_num_threads,
        up_project,
        use_isa,
    )
except ModuleNotFoundError as error:
    if error.name != "fastblock._core":
        raise
    raise ImportError(
        f"The compiled core of fastblock is not in {os.path.dirname(__file__)}. If this is the source tree, install "
        "the package (pip install .) and start Python in another directory, or install it in place (pip install -e .)."
    ) from error
from . import reference
from .block import Block, Stack
from . import _threadpool  # noqa: F401 (makes the threads visible to threadpoolctl)

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


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print what this build of fastblock is, and what it uses on this machine.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        "stdout" prints, "dicts" returns the same facts as a dictionary, as in `numpy.show_config`.

    Returns
    -------
    dict or None

    Examples
    --------
    >>> fastblock.show_config(mode="dicts")["arithmetic"]
    'chain256-v1'
    """
    from ._core import _config

    if mode not in ("stdout", "dicts"):
        raise ValueError(f'mode: expected "stdout" or "dicts", got {mode!r}')
    facts = {"version": __version__, "arithmetic": ARITHMETIC, **_config()}
    if mode == "dicts":
        return facts
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {' '.join(fact) if isinstance(fact, list) else fact}")
    return None
