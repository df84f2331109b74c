"""Signals: a call that takes long looks for them, in the main thread; what a handler raises ends the call."""

import os
import signal
import threading

import numpy as np
import pytest

import fastblock

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this platform")


@pytest.fixture(scope="module")
def long_call():
    """(block, x): seconds of work on any CPU, and an out that shows how far it has come."""
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal(s, dtype=np.float32) for s in [(16384, 256), (256, 16384)])
    return fastblock.Block(w1, None, w2, None), rng.standard_normal((20_000, 256), dtype=np.float32)


@pytest.fixture
def after():
    """after(seconds, handler): a signal that comes once."""
    before = signal.getsignal(signal.SIGALRM)

    def arm(seconds, handler):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Stop(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_what_a_handler_raises_ends_the_call(long_call, after, threads, error, same_bytes):
    block, x = long_call

    def handler(*_):
        raise error("from the handler")

    out = np.full_like(x, np.nan)
    with fastblock.num_threads(threads):
        after(0.05, handler)
        with pytest.raises(error, match="from the handler"):
            block.feed_forward(x, out=out)
        assert np.isnan(out).any()  # it has not come to its end
        few = block.feed_forward(x[:200])
    with fastblock.num_threads(1):
        same_bytes(block.feed_forward(x[:200]), few, "the next call")


def test_a_large_batch_of_small_blocks(after):
    """Tens of millions of items, each of which takes some nanoseconds."""

    def handler(*_):
        raise Stop

    one = np.ones((1, 1), np.float32)
    block, x = fastblock.Block(one, None, one, None), np.ones((30_000_000, 1, 1), np.float32)
    out = np.full_like(x, np.nan)
    with fastblock.num_threads(1):
        after(0.02, handler)
        with pytest.raises(Stop):
            block(x, one, out=out)
    assert np.isnan(out[-1]).all()


def test_a_handler_that_returns_changes_nothing(after, same_bytes):
    """It may even call us: that call takes no part in the one that it interrupts."""
    rng = np.random.default_rng(1)
    w1, w2, x = (rng.standard_normal(s, dtype=np.float32) for s in [(4096, 256), (256, 4096), (6000, 256)])
    block = fastblock.Block(w1, None, w2, None)
    inner, want = block.feed_forward(x[:300]), block.feed_forward(x)
    seen = []

    def handler(*_):
        seen.append(block.feed_forward(x[:300]))

    for threads in (1, 3):
        with fastblock.num_threads(threads):
            seen.clear()
            after(0.01, handler)
            while not seen:  # as many calls as it takes, on a machine however fast
                same_bytes(block.feed_forward(x), want, f"{threads} threads")
            same_bytes(seen[0], inner, f"the call of the handler, {threads} threads")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_handler_that_forks(long_call, after):
    """The child goes on with the call, without the threads that had a part of it."""
    block, x = long_call
    x = x[:6000]
    want, parent, children = block.feed_forward(x).tobytes(), os.getpid(), []

    def handler(*_):
        children.append(os.fork())

    with fastblock.num_threads(3):
        while not children:  # as many calls as it takes, on a machine however fast
            out = np.full_like(x, np.nan)
            after(0.03, handler)
            try:
                right = block.feed_forward(x, out=out).tobytes() == want
            finally:
                if os.getpid() != parent:
                    os._exit(0 if right else 1)
            assert right
    assert os.waitpid(children[0], 0)[1] == 0


def test_calls_of_other_threads_go_on(long_call, after, same_bytes):
    """Python runs handlers in the main thread: what they raise there does not end a call of another thread."""
    block, x = long_call
    x = x[:3000]
    want, results, done = block.feed_forward(x), [], threading.Event()

    def call():
        try:
            results.append(block.feed_forward(x))
        finally:
            done.set()

    def handler(*_):
        raise Stop

    threading.Thread(target=call).start()
    after(0.02, handler)
    with pytest.raises(Stop):
        done.wait()
        signal.pause()  # where the worker was faster than the signal
    done.wait()
    same_bytes(results[0], want)
