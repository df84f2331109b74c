"""Memory: small stacks are enough, and a call that gets no memory has written nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

CALLS = """
import os, sys, threading
import numpy as np
import fastblock
from fastblock import Block, Stack

rng = np.random.default_rng(0)

def make(*shape):
    return rng.standard_normal(shape).astype(dtype)

def calls(positions, features, hidden, width, batch):
    x, a = make(batch, positions, features), make(positions, positions)
    w1, b1, w2, b2 = make(hidden, features), make(hidden), make(features, hidden), make(features)
    w_q, w_k = make(width, features), make(width, features)
    block = Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k)
    keep = rng.random((batch, positions)) < 0.7
    h = fastblock.up_project(x, w1, b1)
    return {
        "mix_positions": lambda out=None: fastblock.mix_positions(a, x, out=out),
        "bias_relu": lambda out=None: fastblock.bias_relu(x, b2, out=out),
        "up_project": lambda out=None: fastblock.up_project(x, w1, b1, out=out),
        "down_project": lambda out=None: fastblock.down_project(h, w2, b2, out=out),
        "feed_forward": lambda out=None: fastblock.feed_forward(x, w1, b1, w2, b2, out=out),
        "attention_weights": lambda out=None: fastblock.attention_weights(
            x, w_q, w_k, causal=True, key_mask=keep, out=out
        ),
        "Block, weights": lambda out=None: block(x, a, out=out),
        "Block": lambda out=None: block(x, causal=True, key_mask=keep, out=out),
        "Block.feed_forward": lambda out=None: block.feed_forward(x, out=out),
        "Stack": lambda out=None: Stack([block, block])(x, out=out),
    }
"""

SMALL_STACK = (
    CALLS
    + """
failures = []

def run():
    try:
        for name, call in todo.items():
            if call().tobytes() != want[name]:
                failures.append(name)
    except BaseException as error:
        failures.append(error)

for dtype in (np.float32, np.float64):
    for sizes in [
        (5, 3, 4, 2, 1), (3, 300, 5000, 40, 1), (100, 40, 300, 9, 2), (300, 17, 40, 3, 2), (7, 600, 300, 300, 1),
    ]:
        todo = calls(*sizes)
        fastblock.set_num_threads(1)
        want = {name: call().tobytes() for name, call in todo.items()}
        for tier in fastblock.isas():
            fastblock.use_isa(tier)
            for threads in (1, 4):
                fastblock.set_num_threads(threads)
                threading.stack_size(32 * 1024)  # the least that Python allows
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
                threading.stack_size(0)
assert not failures, failures
"""
)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


def test_small_stacks():
    """A thread of a server may have 32 KiB of stack, from which NumPy and Python take theirs."""
    result = run(SMALL_STACK)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"


# Fails the nth allocation of posix_memalign from when it is told to; fastblock asks for no memory in another way.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
static int left = -1, calls;
void shim_fail_after(int n) { left = n; calls = 0; }
int shim_calls(void) { return calls; }
int posix_memalign(void **p, size_t alignment, size_t bytes)
{
    static int (*next)(void **, size_t, size_t);
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "posix_memalign");
    calls++;
    if (left >= 0 && left-- == 0)
        return ENOMEM;
    return next(p, alignment, bytes);
}
"""

FAILING = (
    CALLS
    + """
import ctypes
shim = ctypes.CDLL(os.environ["SHIM"])
failed = 0
for dtype in (np.float32, np.float64):
    for sizes in [(3, 300, 5000, 40, 1), (100, 40, 300, 9, 2), (700, 17, 40, 3, 12)]:
        todo = calls(*sizes)
        for threads in (1, 3):
            fastblock.set_num_threads(threads)
            for name, call in todo.items():
                want = call()
                shim.shim_fail_after(-1)
                call()
                count = shim.shim_calls()
                for n in range(count):
                    out = np.full_like(want, 7)
                    shim.shim_fail_after(n)
                    try:
                        call(out)
                    except MemoryError:
                        failed += 1
                        if name != "Stack":  # whose first block may have got through
                            assert (out == 7).all(), (name, sizes, threads, n, "out was written")
                    else:
                        raise AssertionError((name, sizes, threads, n, "no MemoryError"))
                    finally:
                        shim.shim_fail_after(-1)
                assert call().tobytes() == want.tobytes(), (name, sizes)
print(failed)
"""
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD")
def test_a_call_without_memory_writes_nothing(tmp_path):
    """Each allocation of each operation fails once, also the ones of a batch whose weights are computed in steps."""
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a library with that denies memory")
    source, library = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
    result = run(FAILING, LD_PRELOAD=str(library), SHIM=str(library))
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    assert int(result.stdout) > 50


MANY_POSITIONS = """
import resource
import numpy as np
from fastblock import Block, set_num_threads

make = np.random.default_rng(0).standard_normal
positions, features, hidden = 20000, 64, 256
arrays = [make(shape, np.float32) for shape in [(hidden, features), hidden, (features, hidden), features]]
block = Block(*arrays, w_q=make((64, features), np.float32), w_k=make((64, features), np.float32))
x, out = make((positions, features), np.float32), np.ones((positions, features), np.float32)
block(x[:300], out=out[:300])
set_num_threads(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
block(x, causal=True, out=out)
block(x, out=out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_attention_of_many_positions_needs_no_weights_of_all(tmp_path):
    """All weights would be 1.6 GB."""
    result = subprocess.run(
        [sys.executable, "-c", MANY_POSITIONS], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 64 * 1024
