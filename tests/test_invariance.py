"""What must not change a byte: neighbours in a batch, memory layout, the place of `out`, the floating-point mode."""

import ctypes
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from adversarial import generator

import fastblock

P, D, F, E = 7, 19, 35, 5  # odd, and wider than one vector of any tier


@dataclass
class Operation:
    """A call of the package: function(*arrays, out=out), the shapes of the arrays, and which of them has positions."""

    name: str
    function: Callable
    shapes: list
    by_position: bool = True  # the first array is made of positions that do not see each other
    options: dict = field(default_factory=dict)

    def __call__(self, *arrays, out=None):
        return self.function(*arrays, out=out, **self.options)

    def arrays(self, dtype, first_shape=None):
        shapes = [first_shape or self.shapes[0], *self.shapes[1:]]
        return [generator(self.name, i).standard_normal(s).astype(dtype) for i, s in enumerate(shapes)]


def block_with_weights(x, weights, w1, b1, w2, b2, *, out=None):
    return fastblock.Block(w1, b1, w2, b2)(x, weights, out=out)


def block_with_attention(x, w1, b1, w2, b2, w_q, w_k, b_q, b_k, *, out=None, **options):
    return fastblock.Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k, b_q=b_q, b_k=b_k)(x, out=out, **options)


def block_feed_forward(x, w1, b1, w2, b2, *, out=None):
    return fastblock.Block(w1, b1, w2, b2).feed_forward(x, out=out)


def mix(x, weights, *, out=None):
    return fastblock.mix_positions(weights, x, out=out)


LAYERS = [(F, D), (F,), (D, F), (D,)]
QUERY_KEY = [(E, D), (E, D), (E,), (E,)]
OPERATIONS = [
    Operation("mix_positions", mix, [(P, D), (P, P)], by_position=False),
    Operation("bias_relu", fastblock.bias_relu, [(P, D), (D,)]),
    Operation("up_project", fastblock.up_project, [(P, D), (F, D), (F,)]),
    Operation("down_project", fastblock.down_project, [(P, F), (D, F), (D,)]),
    Operation("feed_forward", fastblock.feed_forward, [(P, D), *LAYERS]),
    Operation("Block.feed_forward", block_feed_forward, [(P, D), *LAYERS]),
    Operation("attention_weights", fastblock.attention_weights, [(P, D), *QUERY_KEY], by_position=False),
    Operation(
        "attention_weights, masked",
        fastblock.attention_weights,
        [(P, D), *QUERY_KEY],
        by_position=False,
        options={"causal": True, "key_mask": np.arange(P) != 2},
    ),
    Operation("Block with weights", block_with_weights, [(P, D), (P, P), *LAYERS], by_position=False),
    Operation("Block", block_with_attention, [(P, D), *LAYERS, *QUERY_KEY], by_position=False),
]
BY_POSITION = [o for o in OPERATIONS if o.by_position]


def named(operation):
    return operation.name


@pytest.fixture(params=OPERATIONS, ids=named)
def operation(request):
    return request.param


# ---- neighbours in the batch


@pytest.mark.parametrize("operation", BY_POSITION, ids=named)
def test_a_position_does_not_see_its_neighbours(operation, dtype, every_tier, same_bytes):
    x, *others = operation.arrays(dtype, (65, operation.shapes[0][-1]))
    for tier in every_tier():
        want = operation(x, *others)
        for n in range(1, 66):
            same_bytes(operation(x[:n], *others), want[:n], f"first {n} of 65, {tier}")
            same_bytes(operation(x[n - 1 : n], *others), want[n - 1 : n], f"position {n - 1} alone, {tier}")
        for cut in range(66):
            parts = [operation(x[:cut], *others), operation(x[cut:], *others)]
            same_bytes(np.concatenate(parts), want, f"split at {cut}, {tier}")
        same_bytes(operation(x[::-1], *others)[::-1], want, f"positions reversed, {tier}")
        # a batch is cut into positions somewhere else than its rows are
        same_bytes(operation(x.reshape(5, 13, -1), *others).reshape(want.shape), want, f"5 batches of 13, {tier}")


def test_a_batch_entry_does_not_see_its_neighbours(operation, dtype, every_tier, same_bytes):
    x, *others = operation.arrays(dtype, (65, *operation.shapes[0]))
    for tier in every_tier():
        want = operation(x, *others)
        for n in range(1, 66):
            same_bytes(operation(x[:n], *others), want[:n], f"batch of {n}, {tier}")
        for n in range(65):
            same_bytes(operation(x[n], *others), want[n], f"entry {n} alone, {tier}")
        same_bytes(operation(x.reshape(5, 13, *x.shape[1:]), *others).reshape(want.shape), want, f"5 x 13, {tier}")


def test_fused_is_the_composition(dtype, every_tier, same_bytes):
    """Sizes beyond one tile of rows and one block of hidden units."""
    rng = generator("composition")
    p, d, f, e = 203, 33, 600, 9
    x, w1, b1, w2, b2, w_q, w_k, b_q, b_k = (
        rng.standard_normal(s).astype(dtype) for s in [(2, p, d), (f, d), f, (d, f), d, (e, d), (e, d), e, e]
    )
    keep = rng.random((2, p)) < 0.7
    block = fastblock.Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k, b_q=b_q, b_k=b_k)
    for tier in every_tier():
        weights = fastblock.attention_weights(x, w_q, w_k, b_q, b_k, causal=True, key_mask=keep)
        z = fastblock.mix_positions(weights, x)
        h = fastblock.up_project(z, w1, b1)
        y = fastblock.down_project(h, w2, b2)
        same_bytes(fastblock.bias_relu(fastblock.down_project(z, w1), b1), h, f"up_project, {tier}")
        same_bytes(fastblock.feed_forward(z, w1, b1, w2, b2), y, f"feed_forward, {tier}")
        same_bytes(block.feed_forward(z), y, f"Block.feed_forward, {tier}")
        same_bytes(block(x, weights), y, f"Block with weights, {tier}")
        same_bytes(block(x, causal=True, key_mask=keep), y, f"Block, {tier}")
        same_bytes(fastblock.Stack([block, block])(x, [weights, weights]), block(y, weights), f"Stack, {tier}")


# ---- memory


def placed(array, offset, filler=0xFF):
    """A copy that starts `offset` bytes after a multiple of 64, amid bytes that are NaN in either dtype."""
    buffer = np.full(array.nbytes + 256, filler, np.uint8)
    start = -buffer.ctypes.data % 64 + 64 + offset
    copy = np.ndarray(array.shape, array.dtype, buffer, start)
    copy[...] = array
    return copy


def test_alignment(operation, dtype, every_tier, same_bytes):
    """Every byte offset, also those at which no float should be."""
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        want = operation(*arrays)
        for offset in range(64):
            what = f"{offset} bytes off, {tier}"
            inputs = [placed(a, offset) for a in arrays]
            same_bytes(operation(*inputs), want, f"inputs {what}")
            out = placed(want, offset)
            out[...] = np.nan
            assert operation(*arrays, out=out) is out
            same_bytes(out, want, f"out {what}")
            shifted = [placed(a, (offset + 13 * i) % 64) for i, a in enumerate(arrays)]
            same_bytes(operation(*shifted, out=placed(want, 63 - offset)), want, f"all {what}, each differently")


@pytest.mark.parametrize("positions", [512, 510, 333])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_weights_that_go_past_the_caches(positions, causal, dtype, every_tier, same_bytes):
    """From 8 MiB on they are stored in another way, where the alignment of a row allows it; one NaN row among them."""
    rng = np.random.default_rng(positions)
    x = rng.standard_normal((2**21 // positions**2 + 1, positions, 8)).astype(dtype)
    x[-1, 100] = np.nan
    w_q, w_k = rng.standard_normal((2, 8, 8)).astype(dtype)
    for tier in every_tier():
        want = np.stack([fastblock.attention_weights(item, w_q, w_k, causal=causal) for item in x])
        same_bytes(fastblock.attention_weights(x, w_q, w_k, causal=causal), want, tier)
        for offset in (4, 16, 24) if dtype == np.float32 else (8, 16):
            out = placed(np.zeros_like(want), offset)
            fastblock.attention_weights(x, w_q, w_k, causal=causal, out=out)
            same_bytes(out, want, f"out at {offset}, {tier}")


def layouts(array):
    """(name, the same values in another layout)"""
    yield "Fortran order", np.asfortranarray(array)
    yield "transposed twice", array.T.copy().T
    for name, step in [("reversed", -1), ("every second", 2), ("every third, reversed", -3)]:
        gaps = np.full([n * abs(step) for n in array.shape], np.nan, array.dtype)  # must not be read
        view = gaps[(slice(None, None, step),) * array.ndim]
        view[...] = array
        yield f"{name} in all dimensions", view
    if array.ndim > 1:
        wide = np.full((array.shape[0], array.shape[1] + 3), np.nan, array.dtype)
        wide[:, 1:-2] = array
        yield "columns of a wider array", wide[:, 1:-2]
    frozen = array.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen


def test_layouts_of_inputs(operation, dtype, every_tier, same_bytes):
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        want = operation(*arrays)
        for i, array in enumerate(arrays):
            for name, view in layouts(array):
                assert np.array_equal(view, array)
                changed = [*arrays[:i], view, *arrays[i + 1 :]]
                same_bytes(operation(*changed), want, f"array {i} {name}, {tier}")
        for names_and_views in zip(*map(layouts, arrays[:2]), strict=False):
            (name, first), (_, second) = names_and_views
            same_bytes(operation(first, second, *arrays[2:]), want, f"two arrays {name}, {tier}")


def test_repeated_inputs(operation, dtype, every_tier, same_bytes):
    """Stride 0: one value, one row or one batch entry that stands for many."""
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        for i, array in enumerate(arrays):
            for name, part in [("value", array[:1] if array.ndim == 1 else array[:1, :1]), ("row", array[:1])]:
                repeated = np.broadcast_to(part, array.shape)
                others = [arrays[:i], arrays[i + 1 :]]
                want = operation(*others[0], repeated.copy(), *others[1])
                same_bytes(operation(*others[0], repeated, *others[1]), want, f"array {i} repeats a {name}, {tier}")
        batch = np.broadcast_to(arrays[0], (3, *arrays[0].shape))
        same_bytes(operation(batch, *arrays[1:]), np.stack([operation(*arrays)] * 3), f"batch, {tier}")


def test_batches_in_any_layout(operation, dtype, every_tier, same_bytes):
    x, *others = operation.arrays(dtype, (3, 2, *operation.shapes[0]))
    for tier in every_tier():
        want = operation(x, *others)
        for axes in [(1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]:
            view = np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
            same_bytes(operation(view, *others), want, f"axes {axes}, {tier}")
            out = np.full(np.array(want.shape)[list(axes)], np.nan, dtype).transpose(np.argsort(axes))
            same_bytes(operation(view, *others, out=out), want, f"axes {axes}, out too, {tier}")
        same_bytes(operation(x[::-1, ::-1], *others)[::-1, ::-1], want, f"reversed, {tier}")
        same_bytes(operation(x[1:, :1], *others), want[1:, :1], f"part, {tier}")


def test_out_in_any_layout(operation, dtype, every_tier, same_bytes):
    """What lies beside and between the elements of out stays as it was."""
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        want = operation(*arrays)
        rows, columns = want.shape
        for name, part in {
            "whole rows": np.s_[4 : 4 + rows, :columns],
            "columns of a wider array": np.s_[4 : 4 + rows, 3 : 3 + columns],
            "every second": np.s_[1 : 1 + 2 * rows : 2, 1 : 1 + 2 * columns : 2],
            "reversed": np.s_[rows:0:-1, columns:0:-1],
        }.items():
            for order in "CF":
                width = columns if name == "whole rows" else 2 * columns + 4
                memory = np.full((2 * rows + 8, width), -123.456, dtype, order)
                expected = memory.copy(order)
                out = memory[part]
                assert operation(*arrays, out=out) is out
                expected[part] = want
                same_bytes(memory, expected, f"{name}, order {order}, {tier}")


def test_out_overlaps_an_input(operation, dtype, every_tier, same_bytes):
    """The same result as with an `out` of its own, however the two lie over each other."""
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        want = operation(*arrays)

        def check(i, array, out, what, want=want):
            array[...] = arrays[i]
            assert np.shares_memory(array, out)
            operation(*arrays[:i], array, *arrays[i + 1 :], out=out)
            same_bytes(out, want, f"array {i}, {what}")

        for i, array in enumerate(arrays):
            memory = np.zeros(array.size + want.size, dtype)
            first = memory[: array.size].reshape(array.shape)
            for shift in {0, 1, array.shape[-1] - 1, array.size // 2, array.size - 1}:
                out = memory[shift : shift + want.size].reshape(want.shape)
                check(i, first, out, f"out begins {shift} elements later, {tier}")
                check(i, first, out[::-1], f"out begins {shift} elements later, upside down, {tier}")
            last = memory[want.size :].reshape(array.shape)
            for shift in {1, array.shape[-1], array.size // 2, array.size}:
                out = memory[shift : shift + want.size].reshape(want.shape)
                check(i, last, out, f"out ends {array.size - shift} elements earlier, {tier}")
            check(i, first, memory[: want.size][::-1].reshape(want.shape), f"out runs backwards, {tier}")


LARGE_MASK = np.arange(300) % 7 != 3
LARGE_BLOCK = {
    "x": (300, 20), "w1": (40, 20), "b1": (40,), "w2": (20, 40), "b2": (20,),
    "w_q": (5, 20), "w_k": (5, 20), "b_q": (5,), "b_k": (5,),
}  # fmt: skip


def call_block(own, *, out=None, **arrays):
    given = {name: arrays.pop(name) for name in ("x", "weights", "key_mask") if name in arrays}
    if not own:
        arrays = {name: arrays[name] for name in ("w1", "b1", "w2", "b2")}
    return fastblock.Block(**arrays)(**given, out=out, **({"causal": True} if own else {}))


LARGE = {  # more rows than a tile, more k than a block: out is written while inputs are still to be read
    "mix_positions": (fastblock.mix_positions, {"weights": (300, 300), "x": (300, 20)}),
    "mix_positions, batch": (fastblock.mix_positions, {"weights": (3, 70, 70), "x": (3, 70, 20)}),
    "feed_forward": (fastblock.feed_forward, dict(list(LARGE_BLOCK.items())[:5])),
    "Block.feed_forward": (
        lambda x, out=None, **p: fastblock.Block(**p).feed_forward(x, out=out), dict(list(LARGE_BLOCK.items())[:5]),
    ),
    "attention_weights": (
        fastblock.attention_weights,
        {n: LARGE_BLOCK[n] for n in ("x", "w_q", "w_k", "b_q", "b_k")} | {"key_mask": (300,)},
    ),
    "attention_weights, batch": (
        fastblock.attention_weights, {"x": (9, 150, 4), "w_q": (3, 4), "w_k": (3, 4), "key_mask": (9, 150)},
    ),
    "Block, given weights": (lambda **a: call_block(False, **a), {"weights": (300, 300), **LARGE_BLOCK}),
    "Block, own weights": (lambda **a: call_block(True, **a), {"key_mask": (300,), **LARGE_BLOCK}),
    "Block, batch": (lambda **a: call_block(True, **a), {"key_mask": (4, 300), **LARGE_BLOCK, "x": (4, 300, 20)}),
    "Block, small": (
        lambda **a: call_block(False, **a),
        {"weights": (5, 5), "x": (5, 3), "w1": (4, 3), "b1": (4,), "w2": (3, 4), "b2": (3,)},
    ),
    "Block, small, of several tiles": (
        lambda **a: call_block(False, **a),
        {"weights": (150, 150), "x": (150, 1), "w1": (1, 1), "b1": (1,), "w2": (1, 1), "b2": (1,)},
    ),
    "Block, small, masked": (
        lambda **a: call_block(True, **a),
        {"key_mask": (3, 5), "x": (3, 5, 3), "w1": (4, 3), "b1": (4,), "w2": (3, 4), "b2": (3,)}
        | {"w_q": (2, 3), "w_k": (2, 3), "b_q": (2,), "b_k": (2,)},
    ),
}  # fmt: skip
PARAMETERS = {"Block": ["w1", "b1", "w2", "b2", "w_q", "w_k", "b_q", "b_k"]}  # copied before the call


@pytest.mark.parametrize("call", LARGE)
def test_large_out_overlaps_an_input(call, dtype, every_tier, same_bytes):
    function, shapes = LARGE[call]
    inputs = {name: generator(call, name).standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    if "key_mask" in inputs:
        inputs["key_mask"] = inputs["key_mask"] > -1
    for tier in every_tier():
        want = function(**inputs)
        for name, array in inputs.items():
            if name in PARAMETERS.get(call.partition(",")[0].partition(".")[0], []):
                continue
            memory = np.zeros(array.nbytes + 3 * want.nbytes, np.uint8)
            item, start = want.itemsize, want.nbytes
            row = max(1, array.shape[-1])
            for shift in {0, item, row * item, -row * item, array.nbytes - item, item - want.nbytes, want.nbytes // 2}:
                shift = shift // item * item
                if not -want.nbytes < shift < array.nbytes:
                    continue
                out = memory[start + shift : start + shift + want.nbytes].view(dtype).reshape(want.shape)
                given = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
                assert np.shares_memory(out, given)
                given[...] = array
                function(**{**inputs, name: given}, out=out)
                same_bytes(out, want, f"{name}, out {shift} bytes on, {tier}")


def test_out_is_the_input(operation, dtype, every_tier, same_bytes):
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        want = operation(*arrays)
        if want.shape == arrays[0].shape:
            x = arrays[0].copy()
            assert operation(x, *arrays[1:], out=x) is x
            same_bytes(x, want, f"x itself, {tier}")
            memory = np.concatenate([arrays[0], arrays[0][:1]])
            operation(memory[:-1], *arrays[1:], out=memory[1:])
            same_bytes(memory[1:], want, f"x, one position on, {tier}")
            memory = np.concatenate([arrays[0][:1], arrays[0]])
            operation(memory[1:], *arrays[1:], out=memory[:-1])
            same_bytes(memory[:-1], want, f"x, one position back, {tier}")
            memory = arrays[0].copy()
            operation(memory, *arrays[1:], out=memory[::-1])
            same_bytes(memory[::-1], want, f"x upside down, {tier}")


def test_out_overlaps_the_key_mask(dtype, every_tier, same_bytes):
    x, *others = OPERATIONS[6].arrays(dtype)
    keep = np.arange(P) % 3 != 1
    for tier in every_tier():
        want = fastblock.attention_weights(x, *others, key_mask=keep)
        memory = np.zeros(P * P * want.itemsize, np.uint8)
        memory[: P * 2 : 2] = keep
        out = memory.view(dtype).reshape(P, P)
        fastblock.attention_weights(x, *others, key_mask=memory[: P * 2 : 2].view(bool), out=out)
        same_bytes(out, want, tier)


def test_layouts_of_the_key_mask(dtype, every_tier, same_bytes):
    x, *others = OPERATIONS[6].arrays(dtype, (3, P, D))
    keep = generator("keep").random((3, P)) < 0.6
    for tier in every_tier():
        want = fastblock.attention_weights(x, *others, key_mask=keep.copy())
        for view in [np.asfortranarray(keep), np.repeat(keep, 2, axis=1)[:, ::2], keep[::-1].copy()[::-1]]:
            same_bytes(fastblock.attention_weights(x, *others, key_mask=view), want, tier)
        one = np.broadcast_to(keep[0], (3, P))
        want = fastblock.attention_weights(x, *others, key_mask=one.copy())
        same_bytes(fastblock.attention_weights(x, *others, key_mask=one), want, tier)
        same_bytes(fastblock.attention_weights(x, *others, key_mask=keep[0]), want, tier)
        same_bytes(fastblock.attention_weights(x, *others, key_mask=keep[:1]), want, tier)


def test_neighbours_in_memory_are_not_read(operation, dtype, every_tier, same_bytes):
    """NaN, infinity or huge values around the inputs change nothing."""
    arrays = operation.arrays(dtype)
    for tier in every_tier():
        want = operation(*arrays)
        for filler in (0x00, 0x7F, 0xFF):  # zero, near the largest value or NaN, NaN
            around = [placed(a, 0, filler) for a in arrays]
            same_bytes(operation(*around), want, f"amid {filler:#x}, {tier}")


# ---- the floating-point mode of the calling thread

MODE_SOURCE = """
#if defined(__x86_64__)
#include <xmmintrin.h>
unsigned long long get_mode(void) { return _mm_getcsr() & 0xffc0u; }      /* without the sticky exception flags */
unsigned long long get_flags(void) { return _mm_getcsr() & 0x3fu; }
void set_mode(unsigned long long mode) { _mm_setcsr((unsigned)mode); }
#elif defined(__aarch64__)
unsigned long long get_mode(void) { unsigned long long v; __asm__ volatile("mrs %0, fpcr" : "=r"(v)); return v; }
void set_mode(unsigned long long mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#endif
"""
MODES = {
    "x86_64": {
        "default": 0x1F80,
        "flush to zero": 0x1F80 | 0x8000,
        "subnormals are zero": 0x1F80 | 0x0040,
        "subnormals are zero, flush to zero": 0x1F80 | 0x8040,
        "round down": 0x1F80 | 0x2000,
        "round up": 0x1F80 | 0x4000,
        "round towards zero": 0x1F80 | 0x6000,
        "round up and flush": 0x1F80 | 0xC040,
    },
    "aarch64": {
        "default": 0,
        "flush to zero": 1 << 24,
        "round up": 1 << 22,
        "round down": 2 << 22,
        "round towards zero": 3 << 22,
        "default NaN": 1 << 25,
        "round up and flush": (1 << 24) | (1 << 22),
    },
}
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@pytest.fixture(scope="module")
def fp_mode(tmp_path_factory):
    """A library with get_mode() and set_mode() for the calling thread."""
    if MACHINE not in MODES:
        pytest.skip(f"the test does not know the floating-point modes of {MACHINE}")
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a helper with that changes the floating-point mode")
    folder = tmp_path_factory.mktemp("fp_mode")
    source, library = folder / "mode.c", folder / "mode.so"
    source.write_text(MODE_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    helper = ctypes.CDLL(library)
    helper.get_mode.restype = ctypes.c_ulonglong
    helper.set_mode.argtypes = [ctypes.c_ulonglong]
    before = helper.get_mode()
    yield helper
    helper.set_mode(before)


@pytest.mark.parametrize("mode", MODES.get(MACHINE, {}))
def test_floating_point_mode_of_the_caller(mode, operation, dtype, every_tier, same_bytes, fp_mode):
    """Neither do the caller's modes change a result, nor does a call change the caller's modes."""
    plain = operation.arrays(dtype)  # where a scale of 1 / sqrt(5), scores and exp are rounded
    tiny = [a * dtype(np.finfo(dtype).tiny * 2.0**8) for a in plain[1:]]  # terms and results are subnormal
    default = fp_mode.get_mode()
    mode_bits = MODES[MACHINE][mode]
    for tier in every_tier():
        for kind, arrays in [("plain", plain), ("tiny", [plain[0], *tiny])]:
            want = operation(*arrays)
            fp_mode.set_mode(mode_bits)
            try:
                got = operation(*arrays)
                mode_after = fp_mode.get_mode()
            finally:
                fp_mode.set_mode(default)
            assert mode_after == mode_bits, f"{mode_after:#x} after the call, {kind}, {tier}"
            same_bytes(got, want, f"{mode}, {kind}, {tier}")


TRAPS = """
import ctypes, ctypes.util, hashlib, sys
import numpy as np
import fastblock

libm = ctypes.CDLL(ctypes.util.find_library("m"))
rng = np.random.default_rng(0)
hashes = []
for dtype in (np.float32, np.float64):
    def make(*shape):
        return rng.standard_normal(shape).astype(dtype)

    P, D, F = 17, 19, 300
    x, a, w1, b1, w2, b2 = make(P, D), make(P, P), make(F, D), make(F), make(D, F), make(D)
    for width in (0, 3):  # E = 0: a scale of 1 / 0
        w_q, w_k = make(width, D), make(width, D)
        block = fastblock.Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k)
        calls = [
            lambda out: fastblock.mix_positions(a, x, out=out),
            lambda out: fastblock.bias_relu(x, b2, out=out),
            lambda out: fastblock.down_project(fastblock.up_project(x, w1, b1), w2, b2, out=out),
            lambda out: fastblock.feed_forward(x, w1, b1, w2, b2, out=out),
            lambda out: fastblock.attention_weights(x * big, w_q, w_k, out=out),
            lambda out: block(x, a, out=out),
            lambda out: block(x, causal=True, out=out),
            lambda out: fastblock.Block(w1 * big, b1, w2, b2).feed_forward(x, out=out),
        ]
        big = dtype(1)
        for call in calls:
            for tier in fastblock.isas():
                fastblock.use_isa(tier)
                for threads in (1, 2):
                    fastblock.set_num_threads(threads)
                    want = call(None)
                    out = np.empty_like(want)
                    if sys.argv[1] == "trap":
                        libm.feenableexcept(0x3d)  # invalid, divide by zero, overflow, underflow, inexact
                    call(out)
                    if sys.argv[1] == "trap":
                        libm.fedisableexcept(0x3d)
                    assert out.tobytes() == want.tobytes()
                    hashes.append(hashlib.sha256(out).hexdigest())
print(hashlib.sha256("".join(hashes).encode()).hexdigest())
"""


@pytest.mark.skipif(
    MACHINE != "x86_64" or not sys.platform.startswith("linux"), reason="feenableexcept of glibc on x86-64"
)
def test_exceptions_that_the_host_has_unmasked_do_not_kill():
    """A host may ask for a signal at every inexact operation: none of ours reaches it, in any function or thread."""
    outputs = []
    for mode in ("plain", "trap"):
        result = subprocess.run([sys.executable, "-P", "-c", TRAPS, mode], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{mode}: exit status {result.returncode}\n{result.stderr}"
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("mode", MODES.get(MACHINE, {}))
def test_the_helper_does_change_the_mode(mode, fp_mode):
    """Otherwise the test above would be worth nothing: NumPy, which takes modes as they are, must see them."""
    one, third, tiny = np.ones(1), np.full(1, 3.0), np.full(1, np.finfo(np.float64).tiny)
    half = np.full(1, 0.5)
    default = fp_mode.get_mode()
    fp_mode.set_mode(MODES[MACHINE][mode])
    try:
        up, down, flushed = one / third, -one / third, tiny * half
    finally:
        fp_mode.set_mode(default)
    assert (flushed[0] == 0) == ("flush" in mode)
    assert (up[0] > 1 / 3) == ("up" in mode)
    assert (down[0] < -1 / 3) == ("down" in mode)


def test_large_operations_in_a_changed_mode(dtype, every_tier, same_bytes, fp_mode):
    """Large enough for several threads: each of them has a mode of its own, which some inherit from the caller."""
    rng = generator("large, changed mode")
    p, d, f = 160, 96, 513
    x, w1, b1, w2, b2, weights = (
        (rng.standard_normal(s) * 1e-20).astype(dtype) for s in [(p, d), (f, d), f, (d, f), d, (p, p)]
    )
    block = fastblock.Block(w1, b1, w2, b2)
    default = fp_mode.get_mode()
    for tier in every_tier():
        want = block(x, weights)
        for mode, mode_bits in MODES[MACHINE].items():
            fp_mode.set_mode(mode_bits)
            try:
                got = fastblock.Block(w1, b1, w2, b2)(x, weights)
            finally:
                fp_mode.set_mode(default)
            same_bytes(got, want, f"{mode}, {tier}")


def test_subnormal_parameters_in_a_changed_mode(dtype, every_tier, same_bytes, fp_mode):
    """Packing scales them and reading scales them back: neither flushes them, nor rounds a zero to -0.0."""
    rng = generator("subnormal parameters, changed mode")
    x, w1, w2 = (rng.standard_normal(s).astype(dtype) for s in [(40, 96), (257, 96), (96, 257)])
    for w in w1, w2:
        w[::5] *= np.finfo(dtype).tiny
        w[1::5] = 0
    default = fp_mode.get_mode()
    for tier in every_tier():
        want = fastblock.Block(w1, None, w2, None).feed_forward(x)
        for mode, mode_bits in MODES[MACHINE].items():
            fp_mode.set_mode(mode_bits)
            try:
                block = fastblock.Block(w1, None, w2, None)
                got, parameters = block.feed_forward(x), (block.w1, block.w2)
            finally:
                fp_mode.set_mode(default)
            same_bytes(got, want, f"{mode}, {tier}")
            same_bytes(parameters[0], w1, f"w1, {mode}, {tier}")
            same_bytes(parameters[1], w2, f"w2, {mode}, {tier}")


@pytest.mark.skipif(MACHINE != "x86_64", reason="the flag of MXCSR that tells of subnormal operands")
@pytest.mark.parametrize("flag", [0, 2])
def test_the_flag_of_subnormal_operands_stays_set(flag, dtype, every_tier, fp_mode):
    """The flag is cleared to see whether packing meets any; what the caller's code has met is still to be read."""
    rng = generator("flag")
    x, w1, w2 = (rng.standard_normal(s).astype(dtype) for s in [(40, 96), (257, 96), (96, 257)])
    default = fp_mode.get_mode()
    for _ in every_tier():
        fp_mode.set_mode(default | flag)
        try:
            fastblock.Block(w1, None, w2, None).feed_forward(x)
            fastblock.mix_positions(w1[:96], x[:1].repeat(96, 0))
            flags = fp_mode.get_flags()
        finally:
            fp_mode.set_mode(default)
        assert flags & 2 == flag
