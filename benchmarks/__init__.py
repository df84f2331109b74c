"""fastblock side by side with NumPy and every peer that is installed.

::

    pip install ".[bench,peers]"        # the peers are optional: what is missing is named as missing
    python -m benchmarks                # everything: table, JSON and plots in build/benchmarks
    python -m benchmarks --quick        # tiny shapes, to see that it works
    pytest benchmarks/                  # each operation against NumPy

The floors of the house, each uses only those before it:

    machine       cores, environment, what the JSON says about them
    expressions   the operations, once for all libraries
    cases         an operation, its shape and its data
    calls         how one call is timed
    contestants   how each library is set up; onnx_graph for two of them
    verify        bits and errors
    measure       processes, taken in turn
    plan          what is measured
    results       medians of ratios
    requirements  where fastblock must stand
    report, plots

README.md says how to read the output.
"""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Started in a checkout, Python finds the sources of fastblock before the installed package. Unless they are built in
# place they have no compiled core, so they go to the end of the path. Processes started from here inherit the path.
if not any((ROOT / "fastblock" / f"_core{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT] + [str(ROOT)]

# These two choose a kernel and a blocking for some other OpenBLAS than the one inside NumPy, which they only slow down.
# NumPy has not been imported yet, neither here nor in the processes that inherit this environment.
for variable in "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE":
    os.environ.pop(variable, None)
