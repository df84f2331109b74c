"""What is measured: the list that tables, plots and JSON derive from."""

from itertools import product

from .cases import AttentionWeights, Block, DownProject, FeedForward, MixPositions, ReadMemory, UpProject
from .measure import Entry, Race

# ---- cases

WORKED_EXAMPLE = Block(positions=5, features=3, hidden=4)
WORKED_EXAMPLE_MIXING = MixPositions(positions=5, features=3)

ZEROS = None, 0.0, 0.5, 0.9, 0.97
FEED_FORWARD_SHAPES = (
    (1, 384, 1536),
    (1, 768, 3072),
    (8, 768, 3072),
    (16, 64, 256),
    (128, 384, 1536),
    (128, 768, 3072),
    (512, 768, 3072),
    (2048, 768, 3072),
)
LAYER_ROWS = 6, 8, 12, 16, 128, 512
DTYPES = "float32", "float64"
ATTENTION_POSITIONS = 128, 512, 2048
SWEEP_POSITIONS = 512, 1024, 4096, 16384, 65536
SWEEP_HIDDEN = 64, 256, 1024, 4096, 16384


def feed_forward(shape, zeros=None, dtype="float32"):
    positions, features, hidden = shape
    return FeedForward(positions=positions, features=features, hidden=hidden, zeros=zeros, dtype=dtype)


def layer(kind, rows, dtype="float32"):
    return kind(positions=rows, features=768, hidden=3072, dtype=dtype)


def mixing(positions, features, batch=None, causal=False):
    return MixPositions(positions=positions, features=features, batch=batch, causal=causal)


def attention(positions, causal=False, batch=12, width=64):
    return AttentionWeights(positions=positions, features=width, head_width=width, batch=batch, causal=causal)


MIXING_SHAPES = (128, 64, 12), (512, 768, None)

CASES = (
    *(feed_forward(shape, zeros) for shape, zeros in product(FEED_FORWARD_SHAPES, ZEROS)),
    *(feed_forward(shape, 0.0, "float64") for shape in FEED_FORWARD_SHAPES),
    *(layer(kind, rows, dtype) for kind, dtype, rows in product((UpProject, DownProject), DTYPES, LAYER_ROWS)),
    *(mixing(*shape, causal) for shape, causal in product(MIXING_SHAPES, (False, True))),
    *(attention(positions, causal) for positions, causal in product(ATTENTION_POSITIONS, (False, True))),
)

# Shapes for which the machinery, not the machine, is what one waits for.
QUICK_CASES = (
    *(feed_forward(shape, zeros) for shape, zeros in product(((1, 24, 96), (16, 24, 96)), (None, 0.97))),
    *(UpProject(positions=6, features=24, hidden=96, dtype=dtype) for dtype in DTYPES),
    *(mixing(16, 8, 2, causal) for causal in (False, True)),
    *(attention(16, causal, batch=2, width=8) for causal in (False, True)),
)


# ---- races


def comparison(case, threads, peers):
    """All contestants on one case."""
    names = "fastblock", *peers, "FMA peak"
    return Race("comparison", case.label, tuple(Entry(name, threads, case) for name in names))


def worked_example(peers):
    """With the expression that the block replaces, and one matrix product of it, as NumPy users write them."""
    race = comparison(WORKED_EXAMPLE, 1, peers)
    expressions = (Entry("numpy expression", 1, case) for case in (WORKED_EXAMPLE, WORKED_EXAMPLE_MIXING))
    return Race(race.kind, race.label, (*race.entries, *expressions))


def sweep(kind, cases):
    """fastblock and NumPy over a range of shapes."""
    return Race(kind, kind, tuple(Entry(name, 1, case) for case, name in product(cases, ("fastblock", "numpy"))))


def positions_sweep(positions=SWEEP_POSITIONS, features=768, hidden=3072):
    return sweep("cost against positions", [feed_forward((count, features, hidden)) for count in positions])


def hidden_sweep(hidden=SWEEP_HIDDEN, positions=128, features=256):
    return sweep("cost against hidden units", [feed_forward((positions, features, count)) for count in hidden])


def scaling(case, threads):
    """fastblock with one thread, with two, with four, ... and with `threads`."""
    counts = sorted({2**power for power in range(threads.bit_length())} | {threads})
    return Race("scaling", case.label, tuple(Entry("fastblock", count, case) for count in counts))


def memory(mebibytes=(8, 256)):
    """One vector that fits in a last-level cache, and one that does not."""
    cases = [ReadMemory(features=size * 2**18) for size in mebibytes]
    return Race("memory", "reading memory", tuple(Entry("numpy", 1, case) for case in cases))


# With more than one thread there is less to learn from single layers, float64 and each share of zeros.
CASES_FOR_THREADS = tuple(
    case
    for case in CASES
    if case.dtype == "float32"
    and not isinstance(case, (UpProject, DownProject))
    and getattr(case, "zeros", None) in (None, 0.97)
)
SCALING_CASES = tuple(feed_forward(shape) for shape in FEED_FORWARD_SHAPES if shape[0] >= 128)


def full_plan(threads, peers):
    """All races for some numbers of threads."""
    if 1 in threads:
        yield memory()
        yield worked_example(peers)
        yield from (comparison(case, 1, peers) for case in CASES)
        yield positions_sweep()
        yield hidden_sweep()
    for count in threads:
        if count > 1:
            yield from (comparison(case, count, peers) for case in CASES_FOR_THREADS)
            yield from (scaling(case, count) for case in SCALING_CASES)


def quick_plan(threads, peers):
    """The same kinds of races over tiny shapes."""
    if 1 in threads:
        yield memory((1, 2))
        yield worked_example(peers)
        yield from (comparison(case, 1, peers) for case in QUICK_CASES)
        yield positions_sweep((8, 16, 32), 24, 96)
        yield hidden_sweep((16, 32, 64), 8, 24)
    for count in threads:
        if count > 1:
            yield comparison(QUICK_CASES[2], count, peers)
            yield scaling(QUICK_CASES[2], count)
