"""Helpers for all tests: the comparison (bytes, nothing else) and the loop over the tiers this CPU has."""

import importlib.util
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

# The tests are for the package as installed: with `python -m pytest` the sources beside them would come first.
# Where nothing is found without them, they are what is installed (in place).
_path, _root = sys.path[:], Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in _path if Path(entry).resolve() != _root]
if importlib.util.find_spec("fastblock") is None:
    sys.path[:] = _path

# What a shell's background job, nohup or a service ignores or holds back, the programs that the tests start would, too.
for _name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGALRM"):
    if (_signal := getattr(signal, _name, None)) is not None and signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_SETMASK, [])

DTYPES = [np.float32, np.float64]


@pytest.fixture(params=DTYPES, ids=["f32", "f64"])
def dtype(request):
    return request.param


@pytest.fixture
def same_bytes():
    """same_bytes(got, want, what): fail unless dtype, shape and every byte agree."""
    return _assert_same_bytes


def _assert_same_bytes(got, want, what=""):
    __tracebackhide__ = True
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype != want.dtype or got.shape != want.shape:
        pytest.fail(f"{what}: got {got.dtype}{got.shape}, expected {want.dtype}{want.shape}")
    if got.tobytes() == want.tobytes():
        return
    unsigned = np.dtype(f"u{got.itemsize}")
    got_bits, want_bits = (np.ascontiguousarray(v).view(unsigned).reshape(v.shape) for v in (got, want))
    differing = np.argwhere(got_bits != want_bits)
    first = "".join(
        f"\n  {list(i)}: got {got_bits[i]:#x} ({got[i]!r}), expected {want_bits[i]:#x} ({want[i]!r})"
        for i in map(tuple, differing[:5].tolist())
    )
    pytest.fail(f"{what}: {len(differing)} of {got.size} elements differ{first}")


@pytest.fixture
def every_tier():
    """every_tier() runs a loop body once on each tier, fastest first; afterwards the first tier is back."""
    import fastblock

    before = fastblock.isa()

    def tiers():
        for name in fastblock.isas():
            fastblock.use_isa(name)
            yield name

    yield tiers
    fastblock.use_isa(before)
