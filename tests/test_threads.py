"""Threads: any number of them gives the same bytes, and their pool keeps the manners that a library needs."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_invariance import (
    MACHINE,
    MODES,
    Operation,
    block_feed_forward,
    block_with_attention,
    block_with_weights,
    fp_mode,  # noqa: F401 (a fixture)
    mix,
)

import fastblock

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = fastblock.get_num_threads()
    yield
    fastblock.set_num_threads(before)


# ---- the same bytes
#
# A thread gets at least 10**6 multiply-adds, so 8 threads take 8 million of them. Where a thread would have fewer
# than 48 rows, it is made of columns instead; 384 rows are cut by rows at any number of threads up to 8. The
# feed-forward is cut by rows, too, from 193 rows on or if all hidden activations take more than 1 MiB a thread.


def layers(features, hidden):
    return [(hidden, features), (hidden,), (features, hidden), (features,)]


def query_key(features, width):
    return [(width, features), (width, features), (width,), (width,)]


def mix_causal(x, weights, *, out=None):
    return fastblock.mix_positions(np.tril(weights), x, out=out)


def mix_shared(x, weights, *, out=None):
    return fastblock.mix_positions(weights[0], x, out=out)


def attention(name, *shapes, **options):
    return Operation(f"attention_weights, {name}", fastblock.attention_weights, [*shapes], options=options)


SPLITS = [
    Operation("up_project, rows", fastblock.up_project, [(401, 130), (167, 130), (167,)]),
    Operation("up_project, columns", fastblock.up_project, [(4, 2000), (1037, 2000), (1037,)]),
    Operation("up_project, one position", fastblock.up_project, [(1, 2000), (2053, 2000), (2053,)]),
    Operation("up_project, fewer panels than threads", fastblock.up_project, [(200, 2100), (20, 2100), (20,)]),
    Operation("up_project, totals beside the result", fastblock.up_project, [(40, 700), (301, 700), (301,)]),
    Operation("up_project, rows at 7 threads, columns at 8", fastblock.up_project, [(383, 130), (167, 130), (167,)]),
    Operation("up_project, just above the threshold", fastblock.up_project, [(100, 100), (201, 100), (201,)]),
    Operation("up_project, just below the threshold", fastblock.up_project, [(100, 100), (199, 100), (199,)]),
    Operation("down_project, columns", fastblock.down_project, [(7, 2100), (600, 2100), (600,)]),
    Operation("down_project, rows", fastblock.down_project, [(390, 600), (40, 600), (40,)]),
    Operation("bias_relu", fastblock.bias_relu, [(500, 500), (500,)]),
    Operation("feed_forward, rows", fastblock.feed_forward, [(401, 33), *layers(33, 330)]),
    Operation("feed_forward, columns", fastblock.feed_forward, [(4, 300), *layers(300, 3500)]),
    Operation("Block.feed_forward, one position", block_feed_forward, [(1, 700), *layers(700, 3001)]),
    Operation("feed_forward, fewer panels than threads", fastblock.feed_forward, [(150, 20), *layers(20, 1400)]),
    Operation("feed_forward, the most rows for columns", fastblock.feed_forward, [(128, 49), *layers(49, 430)]),
    Operation("feed_forward, one row more", fastblock.feed_forward, [(129, 49), *layers(49, 430)]),
    Operation("feed_forward, few rows, many hidden units", fastblock.feed_forward, [(90, 8), *layers(8, 5700)]),
    Operation("feed_forward, no hidden unit", fastblock.feed_forward, [(400, 300), *layers(300, 0)]),
    Operation("mix_positions", mix, [(201, 210), (201, 201)]),
    Operation("mix_positions, wide", mix, [(90, 1100), (90, 90)]),
    Operation("mix_positions, cut inside batch items", mix, [(3, 151, 130), (3, 151, 151)]),
    Operation("mix_positions, small batch items", mix, [(13, 37, 500), (13, 37, 37)]),
    Operation("mix_positions, shared weights, causal", mix_causal, [(3, 300, 40), (300, 300)]),
    Operation("mix_positions, shared features", mix_shared, [(300, 40), (3, 300, 300)]),
    attention("one", (301, 20), *query_key(20, 60)),
    attention("causal", (301, 20), *query_key(20, 60), causal=True),
    attention("batch", (3, 201, 20), *query_key(20, 33)),
    attention("masked", (3, 201, 20), *query_key(20, 33), causal=True, key_mask=np.arange(201) % 5 != 2),
    attention("small batch items", (50, 30, 40), *query_key(40, 50)),
    Operation("Block with weights, rows", block_with_weights, [(401, 20), (401, 401), *layers(20, 310)]),
    Operation("Block with weights, columns", block_with_weights, [(7, 300), (7, 7), *layers(300, 2100)]),
    Operation("Block with weights, batch, rows", block_with_weights, [(3, 131, 30), (3, 131, 131), *layers(30, 300)]),
    Operation("Block with weights, batch, few rows", block_with_weights, [(2, 95, 48), (2, 95, 95), *layers(48, 420)]),
    Operation("Block with weights, batch, more rows", block_with_weights, [(2, 99, 48), (2, 99, 99), *layers(48, 400)]),
    Operation("Block, rows", block_with_attention, [(2, 201, 20), *layers(20, 310), *query_key(20, 40)]),
    Operation("Block, columns", block_with_attention, [(3, 5, 96), *layers(96, 3000), *query_key(96, 40)]),
    Operation("Block, batch, columns", block_with_attention, [(3, 110, 40), *layers(40, 301), *query_key(40, 40)]),
]  # fmt: skip


@pytest.mark.parametrize("operation", SPLITS, ids=lambda o: o.name)
def test_any_number_of_threads_gives_the_same_bytes(operation, dtype, same_bytes):
    arrays = operation.arrays(dtype)
    with fastblock.num_threads(1):
        want = operation(*arrays)
    for n in range(2, 9):
        with fastblock.num_threads(n):
            same_bytes(operation(*arrays), want, f"{n} threads")


@pytest.mark.parametrize("positions", [193, 200, 383])
def test_batch_of_few_rows_for_each_of_many_threads(positions, dtype, same_bytes):
    """More positions than a tile has rows, and yet fewer rows than 48 a thread."""
    shapes = [(2, positions, 40), (2, positions, positions), *layers(40, 400)]
    operation = Operation("many threads", block_with_weights, shapes)
    arrays = operation.arrays(dtype)
    with fastblock.num_threads(1):
        want = operation(*arrays)
    with fastblock.num_threads(17):
        same_bytes(operation(*arrays), want, "17 threads")


def test_many_calls_with_changing_numbers_of_threads(same_bytes):
    """A worker may still be on its way to sleep, or asleep, or left out of the call before."""
    operation = Operation("many calls", fastblock.feed_forward, [(400, 33), *layers(33, 330)])
    arrays = operation.arrays(np.float32)
    want = operation(*arrays)
    for call in range(150):
        fastblock.set_num_threads(1 + call * 5 % 8)
        same_bytes(operation(*arrays), want, f"call {call}")


@pytest.mark.parametrize("mode", MODES.get(MACHINE, {}))
def test_workers_do_not_inherit_the_floating_point_mode(mode, dtype, same_bytes, fp_mode):  # noqa: F811
    """A new thread starts in the mode of the one that made it, so each mode here meets workers that it has made."""
    first = Operation("modes", block_feed_forward, [(1100, 33), *layers(33, 330)])
    x, *others = first.arrays(dtype)
    others = [(a * np.finfo(dtype).tiny * 2.0**8).astype(dtype) for a in others]  # subnormal terms and results
    want = first(x, *others)
    default = fp_mode.get_mode()
    fastblock.set_num_threads(9 + 2 * list(MODES[MACHINE]).index(mode) + (dtype == np.float64))
    fp_mode.set_mode(MODES[MACHINE][mode])
    try:
        got = first(x, *others)
    finally:
        fp_mode.set_mode(default)
    same_bytes(got, want, mode)


# ---- in a process of its own: what is started, forked, limited

PRELUDE = """
import os, resource, signal, sys, threading, time
import numpy as np

def tasks():
    return len(os.listdir("/proc/self/task"))

before = tasks()  # NumPy's BLAS has some
import fastblock

def ours():
    return tasks() - before

rng = np.random.default_rng(0)
x, w1, w2, weights = (rng.standard_normal(s, np.float32) for s in [(400, 64), (512, 64), (64, 512), (400, 400)])
block = fastblock.Block(w1, None, w2, None)

def right():  # large enough for many parts
    return block.feed_forward(x).tobytes() == want

def in_child(work):
    pid = os.fork()
    if not pid:
        status = 1
        signal.alarm(20)  # a child that hangs fails
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

with fastblock.num_threads(1):
    want = block.feed_forward(x).tobytes()
fastblock.set_num_threads(4)
"""


def python(code, *arguments, **variables):
    """What a new interpreter prints that runs `code`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FASTBLOCK_NUM_THREADS", "OMP_NUM_THREADS")}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True, text=True, timeout=60, env=environment | variables,
    )  # fmt: skip
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout.strip()


@linux
def test_threads_start_with_the_first_large_call():
    python(
        PRELUDE
        + """
assert ours() == 0, "threads after the import, packing and a call with one thread"
for rows in (1, 5, 20):
    block.feed_forward(x[:rows])
    block(x[:rows], weights[:rows, :rows].copy())
assert ours() == 0, "threads after small calls"
for n in (2, 4, 3, 4):
    fastblock.set_num_threads(n)
    assert right()
    assert ours() == {2: 1, 3: 3, 4: 3}[n], (n, ours())
"""
    )


@linux
def test_threads_that_the_system_denies():
    python(
        PRELUDE
        + """
fastblock.set_num_threads(8)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
stack = 2 << 20 if stack == resource.RLIM_INFINITY else stack
resource.setrlimit(resource.RLIMIT_AS, (used + 4 * stack + (4 << 20), limit[1]))  # room for a few stacks only
for _ in range(20):
    assert right()
assert ours() < 7
resource.setrlimit(resource.RLIMIT_AS, limit)
for _ in range(20):
    assert right()
assert ours() == 7
""",
        MALLOC_MMAP_THRESHOLD_="65536",  # workspaces come and go as a whole, or a heap would take the room
    )


def test_more_threads_than_rows_of_a_tile():
    """A few rows for each of 32 threads, cut by columns, are many rows for each column. The zero units at the start
    make the down-projection look for the range of nonzeros of each of its tiles."""
    python(
        PRELUDE
        + """
x = np.tile(x, (4, 1))[:1535]
b1 = np.full(512, 1000, np.float32)
b1[:64] = b1[256:320] = -1000
block = fastblock.Block(w1, b1, w2, None)
with fastblock.num_threads(1):
    want = block.feed_forward(x).tobytes()
fastblock.set_num_threads(32)
assert right()
"""
    )


@forks
@linux
@pytest.mark.parametrize("when", ["before", "after"])
def test_fork(when):
    """The child has none of the threads of its parent; it starts its own. A child of the child does so, too."""
    python(
        PRELUDE
        + """
if sys.argv[1] == "after":
    assert right()

def child():
    assert tasks() == 1 and right() and tasks() == 4
    in_child(lambda: tasks() == 1 and right() and tasks() == 4)
    return right()

for _ in range(3):
    in_child(child)
    assert right()
""",
        when,
    )


@forks
@linux
def test_fork_during_a_call():
    """Another Python thread is inside the pool, or on its way in or out: its call exists in the parent only."""
    python(
        PRELUDE
        + """
stop = False

def call():
    while not stop:
        assert right()

callers = [threading.Thread(target=call) for _ in range(2)]
for caller in callers:
    caller.start()
try:
    for _ in range(15):
        in_child(lambda: right() and right() and tasks() == 4)
finally:
    stop = True
for caller in callers:
    caller.join()
assert right()
"""
    )


@forks
def test_fork_by_multiprocessing():
    python(
        """
import multiprocessing, signal, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
signal.alarm(50)
"""
        + PRELUDE
        + """
def work(n):
    signal.alarm(20)
    fastblock.set_num_threads(n)
    return right()

assert right()
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert all(pool.map(work, range(1, 9)))
assert right()
"""
    )


@linux
def test_several_callers():
    """Four Python threads share the workers of one call: whoever finds them busy does without."""
    python(
        PRELUDE
        + """
from concurrent.futures import ThreadPoolExecutor

w = rng.standard_normal((40, 64), np.float32)
full = fastblock.Block(w1, None, w2, None, w_q=w, w_k=w)
operations = [
    lambda: block.feed_forward(x),
    lambda: block(x, weights),
    lambda: full(x[:300], causal=True),
    lambda: full.up_project(x),
    lambda: fastblock.mix_positions(weights, x),
    lambda: fastblock.attention_weights(x, w, w),
    lambda: block.feed_forward(x[:4]),
    lambda: full.up_project(x[:40]),
]
with fastblock.num_threads(1):
    wanted = [operation().tobytes() for operation in operations]
most, stop = 0, False

def watch():
    global most
    while not stop:
        most = max(most, ours())
        time.sleep(0.0002)

watcher = threading.Thread(target=watch)
watcher.start()
try:
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda i: operations[i * 5 % 8](), range(400))):
            assert got.tobytes() == wanted[i * 5 % 8], i
finally:
    stop = True
watcher.join()
assert 3 < most <= 3 + 4 + 1, most  # workers, callers, watcher
"""
    )


def test_callers_of_small_calls():
    """Without the GIL, which a small call of a block gives away for a key_mask, two callers may want the one small
    buffer at the same time."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, 8, 16), np.float32)
    w_q, w_k = rng.standard_normal((2, 8, 16), np.float32)
    w1, w2 = rng.standard_normal((32, 16), np.float32), rng.standard_normal((16, 32), np.float32)
    block = fastblock.Block(w1, np.ones(32, np.float32), w2, np.ones(16, np.float32), w_q=w_q, w_k=w_k)
    mask = np.ones(8, bool)
    wanted = [block(item, key_mask=mask) for item in x]
    failed, stop = [], time.monotonic() + 1.5

    def call(first):
        while time.monotonic() < stop and not failed:
            for i in range(first, len(x), 2):
                if block(x[i], key_mask=mask).tobytes() != wanted[i].tobytes():
                    failed.append(i)

    threads = [threading.Thread(target=call, args=(first,)) for first in (0, 1)]
    with fastblock.num_threads(1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks on this platform")
def test_workers_take_no_signals():
    """A signal of the process that the caller holds back stays pending: no worker takes it in its stead. The threads of
    NumPy's BLAS start with it blocked, for they would."""
    python(
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])"
        + PRELUDE
        + """
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
block.feed_forward(x)
assert ours() > 1
taken = []
signal.signal(signal.SIGUSR1, lambda *_: taken.append(1))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
block.feed_forward(x)
time.sleep(0.1)
assert signal.SIGUSR1 in signal.sigpending() and not taken
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
assert taken == [1]
"""
    )


# ---- the GIL

rng = np.random.default_rng(0)
X, W, A = (rng.standard_normal(s, np.float32) for s in [(4096, 256), (1024, 256), (1500, 1500)])
LONG = {
    "feed_forward": lambda: fastblock.feed_forward(X, W, None, np.ascontiguousarray(W.T), None),
    "up_project": lambda: fastblock.up_project(np.tile(X, (3, 1)), W),
    "mix_positions": lambda: fastblock.mix_positions(np.stack([A] * 3), X[:1500]),
    "attention_weights": lambda: fastblock.attention_weights(X[:2500], W[:64], W[:64]),
}


@pytest.mark.parametrize("name", LONG)
def test_other_threads_run_during_a_call(name):
    """The second and third quarter of the time belong to the call proper: a tick in them took the GIL during it. A call
    may be short on a fast machine: as many as it takes."""
    calls, ticks, stop = [], [], False

    def call():
        with fastblock.num_threads(1):
            while not stop:
                start = time.perf_counter()
                LONG[name]()
                calls.append((start, time.perf_counter()))

    caller = threading.Thread(target=call)
    caller.start()
    try:
        seen = False
        while not seen and len(calls) < 300:
            ticks.append(time.perf_counter())
            time.sleep(0.0005)
            seen = any(3 * start + end < 4 * tick < start + 3 * end for start, end in calls for tick in ticks)
    finally:
        stop = True
        caller.join()
    assert seen, f"no other thread ran during any of {len(calls)} calls"


# ---- how many


def test_set_and_get():
    for n in (1, 7, np.int64(3), True):
        fastblock.set_num_threads(n)
        assert fastblock.get_num_threads() == n
    for n in (256, 257, 10**30):
        fastblock.set_num_threads(n)
        assert fastblock.get_num_threads() == 256


@pytest.mark.parametrize(
    ("n", "error"),
    [(0, ValueError), (-1, ValueError), (-(10**30), ValueError), (1.5, TypeError), ("2", TypeError), (None, TypeError)],
)
def test_numbers_that_are_none(n, error):
    fastblock.set_num_threads(5)
    with pytest.raises(error, match="^n: "):
        fastblock.set_num_threads(n)
    with pytest.raises(error, match="^n: "), fastblock.num_threads(n):
        pass
    assert fastblock.get_num_threads() == 5


def test_context_manager():
    fastblock.set_num_threads(5)
    with fastblock.num_threads(3):
        assert fastblock.get_num_threads() == 3
        with fastblock.num_threads(n=2):
            assert fastblock.get_num_threads() == 2
        assert fastblock.get_num_threads() == 3
    assert fastblock.get_num_threads() == 5
    with pytest.raises(ZeroDivisionError), fastblock.num_threads(3):
        _ = 1 / 0
    assert fastblock.get_num_threads() == 5


def test_one_context_manager_used_again_inside_itself():
    fastblock.set_num_threads(5)
    three = fastblock.num_threads(3)
    with three:
        fastblock.set_num_threads(4)
        with three:
            assert fastblock.get_num_threads() == 3
        assert fastblock.get_num_threads() == 3  # the number of the process waits outside
    assert fastblock.get_num_threads() == 4


def test_contexts_of_two_threads_that_overlap():
    """Each counts in its own thread, in whichever order they end, and leaves nothing behind."""
    fastblock.set_num_threads(5)
    shared, seen = fastblock.num_threads(3), []

    def in_a_thread(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    def look():
        seen.append(fastblock.get_num_threads())
        with shared:
            seen.append(fastblock.get_num_threads())
        seen.append(fastblock.get_num_threads())

    entered, leave = threading.Event(), threading.Event()

    def stay():
        with fastblock.num_threads(2):
            entered.set()
            leave.wait()

    other = threading.Thread(target=stay)
    with shared:
        other.start()
        entered.wait()
        in_a_thread(look)
        assert fastblock.get_num_threads() == 3
    assert fastblock.get_num_threads() == 5
    leave.set()
    other.join()
    assert fastblock.get_num_threads() == 5
    assert seen == [5, 3, 5]


def test_contexts_of_one_thread_that_overlap():
    """As those of two generators may."""
    fastblock.set_num_threads(5)
    first, second = fastblock.num_threads(3).__enter__(), fastblock.num_threads(2).__enter__()
    first.__exit__()
    assert fastblock.get_num_threads() == 2
    second.__exit__()
    assert fastblock.get_num_threads() == 5
    with pytest.raises(RuntimeError, match="^num_threads: this thread has not entered it, or has left it$"):
        second.__exit__()


def test_a_context_without_a_number():
    with pytest.raises(TypeError, match="^n: expected a number of threads, got nothing$"):
        fastblock.num_threads()


SHOW = "import fastblock; print(fastblock.get_num_threads())"


@pytest.fixture(scope="module")
def default():
    """The number where the environment says nothing."""
    return python(SHOW)


@pytest.mark.parametrize(
    ("fastblock_threads", "omp_threads", "expected"),
    [
        ("3", None, "3"),
        (None, "5", "5"),
        ("3", "5", "3"),
        ("", "5", "5"),
        ("1000", None, "256"),
        (None, "4,2,1", "4"),  # a number for each level of nesting
        (None, "99999999999999999999", "256"),
        (None, "many", None),
        ("", "-4", None),
    ],
)
def test_environment(fastblock_threads, omp_threads, expected, default):
    given = {"FASTBLOCK_NUM_THREADS": fastblock_threads, "OMP_NUM_THREADS": omp_threads}
    got = python(SHOW, **{name: value for name, value in given.items() if value is not None})
    assert got == (expected or default)


def test_environment_that_asks_for_nonsense():
    """Our own variable is no place for a silent fallback: an ImportError names it."""
    python(
        """
import os
for text in ("0", "-1", "two", "1.5", " 3", "2,4", "9" * 5000):
    os.environ["FASTBLOCK_NUM_THREADS"] = text
    try:
        import fastblock
    except ImportError as error:
        assert "FASTBLOCK_NUM_THREADS" in str(error), error
    else:
        assert len(text) == 5000 and fastblock.get_num_threads() == 256, text
"""
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_affinity(default):
    cpus = sorted(os.sched_getaffinity(0))
    assert int(default) <= len(cpus)
    assert python(f"import os; os.sched_setaffinity(0, {{{cpus[-1]}}}); {SHOW}") == "1"


def test_threadpoolctl():
    threadpoolctl = pytest.importorskip("threadpoolctl", "3.2")

    def seen():
        (info,) = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "fastblock"]
        return info["num_threads"]

    fastblock.set_num_threads(5)
    assert seen() == 5
    with threadpoolctl.threadpool_limits(3, user_api="fastblock"):
        assert fastblock.get_num_threads() == seen() == 3
        with threadpoolctl.threadpool_limits({"fastblock": 2}):
            assert fastblock.get_num_threads() == seen() == 2
        assert fastblock.get_num_threads() == 3
    with threadpoolctl.threadpool_limits(1):
        assert fastblock.get_num_threads() == 1
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        assert fastblock.get_num_threads() == 5
    assert fastblock.get_num_threads() == 5
    with fastblock.num_threads(2), threadpoolctl.threadpool_limits(3, user_api="fastblock"):
        assert fastblock.get_num_threads() == 2
        assert seen() == 3
    assert fastblock.get_num_threads() == 5


@pytest.mark.parametrize("rows", [257, 385])
def test_parts_of_unequal_rows(rows, dtype, same_bytes):
    """Cut in two, 257 rows are 128, one tile, and 129, two tiles of 65: the larger tile must have room."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 40)).astype(dtype)
    block = fastblock.Block(*(rng.standard_normal(shape).astype(dtype) for shape in ((300, 40), 300, (40, 300), 40)))
    for operation in (block.up_project, block.feed_forward):
        results = []
        for count in (1, 2, 3):
            with fastblock.num_threads(count):
                results.append(operation(x))
        for result in results[1:]:
            same_bytes(result, results[0], f"{operation.__name__} of {rows} rows")


@linux
def test_workers_may_run_where_the_program_may():
    """A worker that wakes on the caller's core moves away, and stays as free as it was."""
    x = np.ones((400, 400), np.float32)
    with fastblock.num_threads(2):
        for _ in range(20):
            fastblock.mix_positions(x, x)
            time.sleep(0.002)  # the worker falls asleep
    end = time.monotonic() + 10
    while len(affinities := set(map(affinity, os.listdir("/proc/self/task")))) > 1:  # one may be on its way
        assert time.monotonic() < end, affinities
        time.sleep(0.01)


def affinity(task):
    with open(f"/proc/self/task/{task}/status") as status:
        return next(line for line in status if line.startswith("Cpus_allowed:"))
