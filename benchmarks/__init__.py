"""fastblock side by side with NumPy and every peer that is installed: README.md says how to run and read this.

cases.py has the one table of what is measured, expressions.py the formulas, contestants.py how each library is set up;
timing.py times one call, measure.py many of them fairly; report.py and plot.py show what came out.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Started in a checkout, Python finds the sources of fastblock before the installed package. Unless they are built in
# place they have no compiled core, so they go to the end of the path. Processes started from here inherit the path.
if not any((ROOT / "fastblock" / f"_core{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT] + [str(ROOT)]
