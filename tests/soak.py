"""Random calls of everything that computes, against fastblock.reference, byte for byte, for as long as you like.

    python -P tests/soak.py --minutes 30 --seed 1            calls, comparisons, bytes and differences by operation
    python -P tests/soak.py --seed 1 --call 1234             one call again, each comparison named before it is made

A call is an operation, shapes at and around every edge, and values: magnitudes from subnormal to the largest, zeros in
patterns, softmax weights that underflow, NaN and infinities anywhere, at excluded positions, too. The reference defines
it once. Then every tier computes it several times, each time otherwise: the items (rows, or entries of a batch) chosen
and repeated until several threads have work, 1 to 4 threads, any memory layout, `out` of every kind, any floating-point
mode of the calling thread. Bytes outside of `out`, inputs and the mode must stay as they were.

Calls have numbers, and a number and a seed make the call: it can be made again alone, and with --jobs several processes
share the numbers. A process that dies is reported with its call, and the next one goes on behind it. The exit status is
1 if anything differs. Not part of the test suite: run it after a change of the arithmetic, or before a release.
"""

import argparse
import ctypes
import faulthandler
import json
import math
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent))  # which python -P leaves out
from adversarial import INPUT_CLASSES, random_bits

import fastblock
from fastblock import reference

LAYERS = ["w1", "b1", "w2", "b2"]
QUERY_KEY = ["w_q", "w_k", "b_q", "b_k"]
OPERATIONS = {
    # name: the arrays that it takes; of a block, those of the call stand first
    "mix_positions": ["weights", "x"],
    "bias_relu": ["x", "bias"],
    "up_project": ["x", "w1", "b1"],
    "down_project": ["h", "w2", "b2"],
    "feed_forward": ["x", *LAYERS],
    "attention_weights": ["x", "key_mask", *QUERY_KEY],
    "Block": ["x", "weights", *LAYERS],
    "Block, own weights": ["x", "key_mask", *LAYERS, *QUERY_KEY],
    "Block.feed_forward": ["x", *LAYERS],
    "Block.up_project": ["x", *LAYERS],
    "Block.down_project": ["h", *LAYERS],
    "Stack": ["x", "key_mask", *LAYERS, *QUERY_KEY],
}
SEES_ITS_NEIGHBOURS = {"mix_positions", "attention_weights", "Block", "Block, own weights", "Stack"}
OWN_WEIGHTS = {"attention_weights", "Block, own weights", "Stack"}
OPTIONAL = {"b1", "b2", "b_q", "b_k", "key_mask"}

# Sizes, by how often they are drawn: few, around the lanes, around the rows of a tile, around the blocks of sums, more.
SIZES = [
    (0.03, [0]),
    (0.15, [1, 2, 3, 4, 5]),
    (0.24, [7, 8, 9, 15, 16, 17, 31, 32, 33]),
    (0.2, [6, 11, 12, 13, 14, 27, 28, 29, 47, 48, 49]),
    (0.2, [63, 64, 65, 95, 96, 97, 127, 128, 129]),
    (0.15, [255, 256, 257, 511, 512, 513]),
    (0.03, [700, 769, 1025]),
]
MANY = [1, 1, 2, 3, 7, 16, 33, 47, 48, 95, 97, 128, 129, 191, 300, 500]  # items of a comparison
SECONDS = 0.25  # that the reference may take, about
WORK = {"portable": 3e6, "others": 6e7}  # multiply-adds of a comparison, at most
BYTES = 1e8  # of the items of a comparison, at most


# ---- values


def draw_size(rng):
    _, sizes = SIZES[rng.choice(len(SIZES), p=[p for p, _ in SIZES])]
    return int(rng.choice(sizes))


def exponents(dtype):
    info = np.finfo(dtype)
    return info.minexp - info.nmant, info.maxexp


def any_magnitude(rng, shape, dtype):
    """All of about one magnitude, any."""
    low, high = exponents(dtype)
    return np.ldexp(rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape), rng.integers(low, high)).astype(dtype)


def any_finite(rng, shape, dtype):
    bits = random_bits(rng, shape, dtype)
    return np.where(np.isfinite(bits), bits, dtype(1))


def subnormal(rng, shape, dtype):
    info = np.finfo(dtype)
    return rng.integers(-(2**info.nmant), 2**info.nmant, shape) * info.smallest_subnormal


def largest(rng, shape, dtype):
    info = np.finfo(dtype)
    return rng.choice([info.max, -info.max, info.max * dtype(0.75), 1 / info.max, 0], shape).astype(dtype)


def few_outliers(rng, shape, dtype):
    """Tame, but for a few of any magnitude."""
    array = rng.standard_normal(shape).astype(dtype)
    where = rng.random(shape) < min(0.2, 2 / max(array.size, 1))
    return np.where(where, any_magnitude(rng, shape, dtype), array)


WILD = [*[any_magnitude, few_outliers] * 2, any_finite, subnormal, largest, *INPUT_CLASSES.values()]


def tame(rng, shape, dtype):
    """Sums of products of these are about 1."""
    scale = 2.0 ** rng.integers(-2, 2) / math.sqrt(max(shape[-1], 1))
    return (rng.standard_normal(shape) * scale).astype(dtype)


def with_zeros(rng, array):
    """Zeros of either sign in some pattern."""
    rows, columns = array.shape[-2:] if array.ndim > 1 else (1, array.shape[-1])
    row, column = np.ogrid[:rows, :columns]
    pattern = [
        lambda: rng.random((rows, columns)) < rng.choice([0.01, 0.1, 0.3, 0.5, 0.8, 0.9, 0.97]),
        lambda: column <= row,
        lambda: column >= row,
        lambda: abs(row - column) <= rng.integers(0, max(columns // 2, 1) + 1),
        lambda: (column < rng.integers(0, columns + 1)) & (row >= 0),
        lambda: (column % 256 >= rng.integers(0, 256)) & (row >= 0),
        lambda: (column // 64 % 2 == rng.integers(2)) & (row >= 0),
        lambda: (row % rng.integers(1, 30) == 0) & (column >= 0),
        lambda: column == rng.integers(0, columns + 1, (rows, 1)),
        lambda: np.zeros((rows, columns), bool),
    ][rng.integers(10)]()
    zeros = rng.choice(np.array([0.0, -0.0], array.dtype), array.shape, p=[0.7, 0.3])
    return np.where(pattern.reshape(array.shape[-2:]), array, zeros)


def key_masks(rng, shape):
    *items, positions = shape
    column = np.arange(positions)
    cut = rng.integers(0, positions + 1, (*items, 1))
    return [
        lambda: column < cut,
        lambda: column >= cut,
        lambda: rng.random(shape) < rng.choice([0.1, 0.5, 0.9, 0.99]),
        lambda: column != cut,
        lambda: np.zeros(shape, bool),
        lambda: np.ones(shape, bool),
    ][rng.choice(6, p=[0.3, 0.2, 0.25, 0.1, 0.05, 0.1])]()


# ---- calls


@dataclass
class Call:
    operation: str
    dtype: type
    arrays: dict  # by name; of a stack, those of block i are called "i.name"
    items: int  # entries of axis 0 of the arrays that have items, and of the result
    itemized: set  # the names of these arrays
    options: dict
    work: float  # multiply-adds of one item
    block: object = None  # made of the parameters once
    want: np.ndarray = None
    notes: list = field(default_factory=list)

    def __str__(self):
        shapes = ", ".join(f"{name} {a.shape}" for name, a in self.arrays.items())
        return f"{self.operation}, {np.dtype(self.dtype)}: {shapes} {self.options or ''} {' '.join(self.notes)}"


def cost(sizes, operation, hard, dtype):
    """Seconds of the reference, and multiply-adds of one item."""
    m, p, d, f, e, blocks = (sizes[n] for n in ("items", "P", "D", "F", "E", "blocks"))
    own = operation in OWN_WEIGHTS
    mixes = operation in SEES_ITS_NEIGHBOURS - {"attention_weights"}
    feeds = operation == "feed_forward" or operation in SEES_ITS_NEIGHBOURS - {"attention_weights", "mix_positions"}
    feeds |= operation == "Block.feed_forward"
    products = [(d, p * e), (d, p * e), (e, p * p), (p, p)] * own + [(p, p * d)] * mixes
    products += [(d, p * f), (f, p * d)] * feeds
    if not products:
        products = [(1, f)] if operation == "bias_relu" else [(d, f)] if "up" in operation else [(f, d)]
    step, element = (1e-5, 2.5e-8) if dtype == np.float32 else (3e-5, 7e-6 if hard else 7e-8)
    seconds = sum(depth * (step + m * elements * element) for depth, elements in products) * blocks
    if own:
        seconds += m * p * p * (4e-8 if dtype == np.float32 else 1e-6) * blocks
    return seconds, sum(depth * elements for depth, elements in products) * blocks


def draw_sizes(rng, operation, hard, dtype):
    sizes = {name: draw_size(rng) for name in ("P", "D", "F", "E")}
    sizes["blocks"] = int(rng.integers(1, 4)) if operation == "Stack" else 1
    sizes["items"] = int(rng.choice([1, 2, 3])) if operation in SEES_ITS_NEIGHBOURS else draw_size(rng)
    if operation not in SEES_ITS_NEIGHBOURS:
        sizes["P"] = 1
    if operation == "Block.feed_forward" and not hard and rng.random() < 0.1:  # w2 of 2 MiB: it is kept in rows, too
        large = {"D": (760, 1040), "F": (700, 800), "items": (1, 6)}
        return sizes | {name: int(rng.integers(*between)) for name, between in large.items()}
    while cost(sizes, operation, hard, dtype)[0] > SECONDS:
        name = max(("P", "D", "F", "E", "items"), key=lambda n: sizes[n])
        smaller = [n for _, some in SIZES for n in some if sizes[name] // 4 <= n < sizes[name]]
        sizes[name] = int(rng.choice(smaller))
    return sizes


def make_call(seed, number):
    rng = np.random.default_rng([seed, number])
    operation = str(rng.choice(list(OPERATIONS)))
    dtype = [np.float32, np.float64][rng.integers(2)]
    kind = rng.choice(["tame", "one wild", "all wild"], p=[0.6, 0.3, 0.1])
    scores = rng.choice(["tame", "any magnitude", "outliers"], p=[0.4, 0.3, 0.3])  # of a softmax
    hard = dtype == np.float64 and (kind != "tame" or (scores != "tame" and operation in OWN_WEIGHTS))
    sizes = draw_sizes(rng, operation, hard, dtype)
    m, p, d, f, e = (sizes[n] for n in ("items", "P", "D", "F", "E"))
    own = operation in OWN_WEIGHTS
    item = (p,) if operation in SEES_ITS_NEIGHBOURS else ()
    shapes = {
        "x": (m, *item, f if operation == "bias_relu" else d), "h": (m, *item, f), "weights": (m, p, p),
        "key_mask": (m, p), "bias": (f,), "w1": (f, d), "b1": (f,), "w2": (d, f), "b2": (d,),
        "w_q": (e, d), "w_k": (e, d), "b_q": (e,), "b_k": (e,),
    }  # fmt: skip
    arrays, options, notes = {}, {}, []
    names = [n for n in OPERATIONS[operation] if n not in OPTIONAL or rng.random() < 0.7]
    wild = rng.choice([n for n in names if n != "key_mask"])
    for name in names:
        if name == "key_mask":
            arrays[name] = key_masks(rng, shapes[name])
            continue
        each = operation == "Stack" and name in LAYERS + QUERY_KEY
        for prefix in [f"{i}." for i in range(sizes["blocks"])] if each else [""]:
            is_wild = kind == "all wild" or (kind == "one wild" and name == wild)
            make = WILD[rng.integers(len(WILD))] if is_wild else tame
            with np.errstate(all="ignore"):
                array = np.asarray(make(rng, shapes[name], dtype), dtype)
                if own and (name, scores) in [("w_q", "any magnitude"), ("x", "outliers")]:
                    array = for_scores(rng, name, array)
            arrays[prefix + name] = with_zeros(rng, array) if rng.random() < 0.35 and array.ndim > 1 else array
            if is_wild:
                notes.append(f"{prefix}{name}: {make.__name__.strip('_').replace('_', ' ')},")
    if own and rng.random() < 0.5:
        options["causal"] = True
    if operation == "Stack":
        given_weights(rng, arrays, sizes, dtype)
        if any(n.endswith("weights") for n in arrays):  # causal and key_mask go with a block's own weights only
            arrays.pop("key_mask", None)
            options = {}
    if own and rng.random() < 0.5:
        garbage_at_excluded(rng, arrays, options, notes)
    itemized = {n for n in arrays if n in ("x", "h", "key_mask") or n.endswith("weights")}
    for name in ("weights", "key_mask"):
        if name in arrays and rng.random() < 0.3:  # one for all items
            arrays[name] = arrays[name][0]
            itemized.remove(name)
    return Call(operation, dtype, arrays, m, itemized, options, cost(sizes, operation, hard, dtype)[1], notes=notes)


def for_scores(rng, name, array):
    """All scores of a softmax of another magnitude, or those of a few keys; mostly where exp changes its ways."""
    most = rng.choice([70, exponents(array.dtype)[1]], p=[0.8, 0.2])
    magnitude = array.dtype.type(2.0 ** int(rng.integers(-10, most)))
    if name == "w_q":
        return array * magnitude
    return np.where(rng.random((*array.shape[:-1], 1)) < 2 / max(array.shape[-2], 1), array * magnitude, array)


def given_weights(rng, arrays, sizes, dtype):
    """For some or all blocks of a stack; None elsewhere, where the block's own weights are meant."""
    kind = rng.choice(["own", "given", "mixed"])
    for i in range(sizes["blocks"]):
        if kind == "given" or (kind == "mixed" and rng.random() < 0.5):
            arrays[f"{i}.weights"] = with_zeros(rng, tame(rng, (sizes["items"], sizes["P"], sizes["P"]), dtype))


def garbage_at_excluded(rng, arrays, options, notes):
    """NaN or infinities at positions that others must not see."""
    x = arrays["x"]
    bad = rng.choice(np.array([np.nan, np.inf, -np.inf], x.dtype), x.shape)
    where = np.zeros(x.shape[:-1], bool)
    if "key_mask" in arrays:
        where |= ~arrays["key_mask"]
    if "causal" in options:
        where[:, rng.integers(0, x.shape[1] + 1) :] = True
    where = where[..., None] & (rng.random(x.shape) < rng.choice([0.02, 0.5, 1]))
    arrays["x"] = np.where(where, bad, x)
    if where.any():
        notes.append("garbage at excluded positions,")


def of_block(arrays, i):
    """The parameters of block i, by name; without the optional ones that it has not."""
    prefix = f"{i}."
    found = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix) and not n.endswith("weights")}
    return {name: found.get(name) for name in LAYERS + QUERY_KEY}


def blocks_of(arrays):
    """The numbers of the blocks of a stack."""
    return sorted({int(n.partition(".")[0]) for n in arrays if "." in n})


def split(arrays):
    """(parameters of a block, arguments of its call)"""
    parameters = {n: a for n, a in arrays.items() if n in LAYERS + QUERY_KEY}
    return {n: parameters.get(n) for n in LAYERS} | parameters, {n: a for n, a in arrays.items() if n not in parameters}


def expected(call):
    """What the reference says, item by item."""
    arrays, options = call.arrays, call.options
    name = call.operation
    if name == "Stack":
        y = arrays["x"]
        for i in blocks_of(arrays):
            block, given = of_block(arrays, i), arrays.get(f"{i}.weights")
            own = {"key_mask": arrays.get("key_mask"), **options} if given is None else {}
            y = reference.block(y, **block, weights=given, **own)
        return y
    if name in ("Block", "Block, own weights"):
        return reference.block(**dict.fromkeys(LAYERS) | arrays, **options)
    if name == "Block.feed_forward":
        return reference.feed_forward(arrays["x"], *(arrays.get(n) for n in LAYERS))
    if name in ("Block.up_project", "Block.down_project"):
        x, w, b = ("x", "w1", "b1") if name == "Block.up_project" else ("h", "w2", "b2")
        return getattr(reference, name[6:])(arrays[x], arrays[w], arrays.get(b))
    if name == "feed_forward":
        return reference.feed_forward(arrays["x"], *(arrays.get(n) for n in LAYERS))
    return getattr(reference, name)(**arrays, **options)


def prepared(call, arrays, out, fresh):
    """A function without arguments that makes the call; fresh: it packs these parameters, too."""
    name = call.operation
    options = call.options if out is None else {**call.options, "out": out}
    if name == "Stack":
        indices, parameters = blocks_of(arrays), [of_block(arrays, i) for i in blocks_of(arrays)]
        rest = {"x": arrays["x"], "key_mask": arrays.get("key_mask")}
        if any(n.endswith("weights") for n in arrays):
            rest["weights"] = [arrays.get(f"{i}.weights") for i in indices]
        make = partial(lambda parameters: fastblock.Stack([fastblock.Block(**p) for p in parameters]), parameters)
    elif name.startswith("Block"):
        parameters, rest = split(arrays)
        make = partial(fastblock.Block, **parameters)
    else:
        none = dict.fromkeys(LAYERS) if name == "feed_forward" else {}
        return partial(getattr(fastblock, name), **{**none, **arrays}, **options)
    method = name.partition(".")[2] or "__call__"
    if fresh:
        return partial(lambda make, keywords: getattr(make(), method)(**keywords), make, {**rest, **options})
    call.block = call.block or make()
    return partial(getattr(call.block, method), **rest, **options)


# ---- what must not change a byte


def placed(rng, array, filler):
    """(a copy of array somewhere in larger memory, that memory): any offset, order of the axes, gaps, direction."""
    style = rng.choice(["plain", "offset", "rows apart", "Fortran", "anything"], p=[0.4, 0.15, 0.15, 0.1, 0.2])
    n = array.ndim
    order, steps, margins = np.arange(n), np.ones(n, int), np.zeros(n, int)
    if style in ("Fortran", "anything"):
        order = np.arange(n)[::-1] if style == "Fortran" else rng.permutation(n)
    if style == "anything" and array.nbytes < 2**20:
        steps = rng.choice([-3, -2, -1, 1, 2, 3], n)
    if style in ("rows apart", "anything") and n > 1:
        margins[rng.integers(n)] = rng.integers(1, 20)
    offset = {"plain": 64, "offset": int(rng.integers(64, 128))}.get(style, 64 + array.itemsize * int(rng.integers(16)))
    shape = np.array(array.shape, int) * abs(steps) + margins
    memory = np.full(int(np.prod(shape)) * array.itemsize + 256, filler, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    whole = np.ndarray(shape[order], array.dtype, memory, start).transpose(np.argsort(order))
    view = whole[tuple(slice(None, size * abs(step)) for size, step in zip(array.shape, steps, strict=True))]
    view = view[tuple(slice(None, None, int(step)) for step in steps)]
    view[...] = array
    return view, memory


def overlapping(rng, arrays, want):
    """`out` over one of the arrays, which is moved there; None where none has the dtype and is contiguous."""
    names = [n for n, a in arrays.items() if a.size and a.dtype == want.dtype and want.size]
    if not names:
        return None
    name = str(rng.choice(names))
    array = arrays[name]
    shift = int(rng.integers(-want.nbytes // want.itemsize + 1, array.size)) * want.itemsize  # of out against the array
    if rng.random() < 0.5:
        shift = int(rng.choice([-1, 0, 1])) * want.itemsize * int(rng.choice([1, want.shape[-1]]))
    shift = min(max(shift, want.itemsize - want.nbytes), array.nbytes - want.itemsize)
    start = max(0, -shift)
    memory = np.full(max(start + array.nbytes, start + shift + want.nbytes), 0xFF, np.uint8)
    arrays[name] = np.ndarray(array.shape, array.dtype, memory, start)
    arrays[name][...] = array
    return np.ndarray(want.shape, want.dtype, memory, start + shift)


class Mode:
    """The floating-point mode of the calling thread, through fegetenv and fesetenv of the C library."""

    # control register: its bytes in a fenv_t, the bits of the mode (without sticky flags), and modes
    KNOWN = {
        "x86_64": (
            28,
            0xFFC0,
            {
                "flush to zero": 0x9F80, "subnormals are zero": 0x1FC0, "both": 0x9FC0, "round down": 0x3F80,
                "round up": 0x5F80, "round towards zero": 0x7F80, "round up and flush": 0xDFC0, "all exceptions": 0,
                "all exceptions, round up": 0x4000, "all exceptions but inexact": 0x1000,
            },
        ),
        "aarch64": (
            0,
            0xFFFFFFFF,
            {
                "flush to zero": 1 << 24, "round up": 1 << 22, "round down": 2 << 22, "round towards zero": 3 << 22,
                "default NaN": 1 << 25, "round up and flush": 5 << 22,
            },
        ),
    }  # fmt: skip

    def __init__(self):
        machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
        self.at, self.bits, self.modes = self.KNOWN.get(machine, (0, 0, {}))
        self.library = ctypes.CDLL(None)
        self.default = self._environment()
        self.known = {name: self._with(bits) for name, bits in self.modes.items()}

    def _environment(self):
        environment = ctypes.create_string_buffer(128)
        self.library.fegetenv(environment)
        return environment

    def _with(self, bits):
        environment = ctypes.create_string_buffer(self.default.raw, 128)
        environment[self.at : self.at + 4] = bits.to_bytes(4, sys.byteorder)
        return environment

    def bits_of(self, environment):
        return int.from_bytes(environment[self.at : self.at + 4], sys.byteorder) & self.bits


def compare(rng, call, tier, mode, describe):
    """One comparison: (bytes compared, elements that differ, what went wrong)."""
    size = sum(a.nbytes for n, a in call.arrays.items() if n in call.itemized) + call.want.nbytes
    most = min(WORK.get(tier, WORK["others"]) / max(call.work, 1), BYTES * max(call.items, 1) / max(size, 1))
    leading = (min(int(rng.choice(MANY)), max(int(most), 1)),)
    if call.items == 0:
        leading = (0,)
    elif rng.random() < 0.2:
        leading = ()
    elif rng.random() < 0.15:
        leading = (max(leading[0] // 2, 1), 2)
    if call.operation.startswith(("Block, own", "Stack")) and tier != "portable" and call.items and rng.random() < 0.1:
        # several steps of a batch, if the weights of all do not fit at once
        positions = call.want.shape[1]
        leading = (min(2 + 2**24 // max(positions**2 * call.want.itemsize, 2**16), max(int(4 * most), 1)),)
    chosen = rng.integers(max(call.items, 1), size=leading)
    if call.items and leading and rng.random() < 0.3:
        chosen[...] = chosen.flat[0]
    arrays = {n: a[chosen] if n in call.itemized else a for n, a in call.arrays.items()}
    want = call.want[chosen]
    fresh = rng.random() < 0.3
    threads = int(rng.integers(1, 5))
    fp = str(rng.choice(list(mode.known))) if mode.known and rng.random() < 0.4 else None
    out_kind = str(rng.choice(["none", "placed", "overlapping"], p=[0.35, 0.35, 0.3]))
    what = f"{tier}, {threads} threads, items {chosen.shape}, out {out_kind}, mode {fp or 'default'}"
    describe(what)

    before = {}
    repeated = leading and chosen.size > 1 and (chosen == chosen.flat[0]).all()
    for name, array in arrays.items():
        if repeated and name in call.itemized and rng.random() < 0.5:
            arrays[name] = np.broadcast_to(array[(0,) * len(leading)], array.shape)
        elif rng.random() < 0.5:
            arrays[name], memory = placed(rng, array, 0xFF)
            if memory.nbytes < 2**20:
                before[name] = memory, memory.copy()
        if rng.random() < 0.1:
            arrays[name] = arrays[name].view()
            arrays[name].flags.writeable = False
    out = memory = None
    if out_kind == "placed":
        out, memory = placed(rng, np.full(want.shape, 7, want.dtype), 0xAB)
        around = memory.copy()
    elif out_kind == "overlapping":
        usable = {n: a for n, a in arrays.items() if fresh or not packed(call, n)}
        out = overlapping(rng, usable, want)
        before = {n: pair for n, pair in before.items() if usable.get(n) is arrays[n]}
        arrays |= usable

    fastblock.use_isa(tier)
    fastblock.set_num_threads(threads)
    setting = mode.known[fp] if fp else mode.default
    function, error, got = prepared(call, arrays, out, fresh), None, None
    set_mode, fegetenv, after = mode.library.fesetenv, mode.library.fegetenv, ctypes.create_string_buffer(128)
    # While the mode is set nothing else happens: Python itself must not divide in it.
    set_mode(setting)
    try:
        got = function()
    except Exception as failure:  # noqa: BLE001 (whatever it is, it is a finding)
        error = failure
    fegetenv(after)
    set_mode(mode.default)
    if error is not None:
        return 0, want.size or 1, f"{what}: {type(error).__name__}: {error}"
    if mode.bits_of(after) != mode.bits_of(setting):
        return 0, 1, f"{what}: the mode was {mode.bits_of(after):#x} after the call"
    if out is not None and got is not out:
        return 0, 1, f"{what}: the result is not out"
    wrong = differences(got, want)
    if wrong:
        return want.nbytes, *wrong(what)
    if memory is not None:
        if tuple(out.strides) and out.size:
            out[...] = 7
        if memory.tobytes() != around.tobytes():
            return want.nbytes, 1, f"{what}: bytes around out (strides {out.strides}) were changed"
    for name, (memory, copy) in before.items():
        if memory.tobytes() != copy.tobytes():
            return want.nbytes, 1, f"{what}: {name} was changed"
    return want.nbytes, 0, None


def packed(call, name):
    """Whether the call does not read the array itself, but what a block has packed of it."""
    return call.operation.startswith(("Block", "Stack")) and name.rpartition(".")[2] in LAYERS + QUERY_KEY


def differences(got, want):
    """None, or a function that tells (how many elements differ, what was found)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return lambda what: (want.size or 1, f"{what}: got {got.dtype}{got.shape}, expected {want.dtype}{want.shape}")
    bits, expected_bits = (np.ascontiguousarray(a).view(f"u{want.itemsize}") for a in (got, want))
    where = np.argwhere(bits != expected_bits)
    if not len(where):
        return None
    first = tuple(where[0].tolist())
    found = f"{len(where)} of {want.size} differ, at {list(first)} {got[first]!r}, not {want[first]!r}"
    return lambda what: (len(where), f"{what}: {found}")


def soak(seed, number, mode, verbose=False):
    """One call, all comparisons: what to report of it."""
    call = make_call(seed, number)
    if verbose:
        print(call, flush=True)
    start = time.perf_counter()
    call.want = expected(call)
    seconds = time.perf_counter() - start
    interesting = np.count_nonzero(np.isfinite(call.want) & (call.want != 0))
    report = {"call": number, "operation": call.operation, "elements": call.want.size, "interesting": interesting}
    report |= {"comparisons": 0, "bytes": 0, "differing": 0, "seconds": seconds, "messages": []}
    for tier in fastblock.isas():
        for turn in range(2 if tier == "portable" else 4):
            rng = np.random.default_rng([seed, number, turn, *tier.encode()])
            describe = (lambda what: print("  ", what, flush=True)) if verbose else (lambda what: None)
            size, differing, message = compare(rng, call, tier, mode, describe)
            report["comparisons"] += 1
            report["bytes"] += size
            report["differing"] += differing
            if message:
                report["messages"].append(message)
    if report["messages"]:
        report["messages"].insert(0, str(call))
    return report


# ---- processes


def work(seed, first, step, seconds):
    """A process's share of the calls; a line of JSON before and after each."""
    mode = Mode()
    end = time.monotonic() + seconds
    number = first
    while time.monotonic() < end:
        faulthandler.dump_traceback_later(120, exit=True)  # a call that hangs
        print(json.dumps({"begin": number}), flush=True)
        print(json.dumps(soak(seed, number, mode), default=int), flush=True)
        number += step


COUNTED = ["calls", "comparisons", "bytes", "differing"]


class Report:
    """Of all processes: sums by operation, printed at the end; what differs, as soon as it is known."""

    def __init__(self, seed):
        self.seed, self.sums, self.lock, self.failed = seed, {}, threading.Lock(), 0

    def of(self, operation):
        return self.sums.setdefault(operation, dict.fromkeys(COUNTED, 0))

    def add(self, line):
        with self.lock:
            sums = self.of(line["operation"])
            sums["calls"] += 1
            for name in COUNTED[1:]:
                sums[name] += line[name]
            if line["messages"]:
                self.failed += 1
                self.tell(line["call"], line["messages"][:4])

    def died(self, number, status):
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        with self.lock:
            self.failed += 1
            call = make_call(self.seed, number)
            self.of(call.operation)["differing"] += 1
            self.tell(number, [str(call), f"the process died: {name}"])

    def tell(self, number, messages):
        print("\n  ".join(messages))
        print(f"  again: python -P tests/soak.py --seed {self.seed} --call {number}", flush=True)

    def print(self):
        total = {}
        print(f"{'operation':20}{COUNTED[0]:>9}{COUNTED[1]:>13}{COUNTED[2]:>18}{COUNTED[3]:>13}")
        for operation in OPERATIONS:
            sums = self.sums.get(operation, {})
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value
            self._print(operation, sums)
        self._print("all", total)

    @staticmethod
    def _print(operation, sums):
        n = [sums.get(name, 0) for name in COUNTED]
        print(f"{operation:20}{n[0]:9,}{n[1]:13,}{n[2]:18,}{n[3]:13,}")


def supervise(report, seed, first, step, end):
    """Run a worker process, and another one behind the call at which it dies."""
    number = first
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, "-P", __file__, "--seed", seed, "--worker", number, step, left]
        with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True) as process:
            for line in map(json.loads, process.stdout):
                if "begin" in line:
                    number = line["begin"]
                else:
                    report.add(line)
        if process.returncode == 0:
            return
        report.died(number, process.returncode)
        number += step


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (each uses up to 4 threads)")
    parser.add_argument("--call", type=int, help="only this one, in this process")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, step, seconds = options.worker
        work(options.seed, int(first), int(step), float(seconds))
        return 0
    if options.call is not None:
        faulthandler.enable()
        report = soak(options.seed, options.call, Mode(), verbose=True)
        print("\n  ".join(report.pop("messages") or ["nothing differs"]))
        print(report)
        return 1 if report["differing"] else 0
    report = Report(options.seed)
    end = time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: supervise(report, options.seed, job, options.jobs, end), range(options.jobs)))
    report.print()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
