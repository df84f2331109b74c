"""Set before NumPy and fastblock are imported: one thread for both, and the fastblock that `benchmarks` has chosen."""

import importlib
import os

from .machine import thread_variables

os.environ.update(thread_variables(1))
importlib.import_module("fastblock")  # now, as pytest puts the checkout first on the path once more for the tests
