"""Bad input is answered with one sentence that names the argument, before anything is written, and leaks nothing.

`CALLS` lists everything that takes arrays, with the shapes that fit together; the tests derive the bad ones.
"""

import gc
import itertools
import os
import re
import sys

import numpy as np
import pytest

import fastblock
from fastblock import reference

P, D, F, E = 5, 3, 4, 2
PARAMETERS = {"w1": (F, D), "b1": (F,), "w2": (D, F), "b2": (D,)}
QUERY_KEY = {"w_q": (E, D), "w_k": (E, D), "b_q": (E,), "b_k": (E,)}


def arrays(shapes, dtype=np.float32):
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def make_block(dtype=np.float32, shapes=PARAMETERS | QUERY_KEY):
    return fastblock.Block(**arrays(shapes, dtype))


BLOCK = make_block()
STACK = fastblock.Stack([BLOCK, BLOCK, BLOCK])
CALLS = {
    "mix_positions": (fastblock.mix_positions, {"weights": (P, P), "x": (P, D)}, (P, D)),
    "bias_relu": (fastblock.bias_relu, {"x": (P, F), "bias": (F,)}, (P, F)),
    "up_project": (fastblock.up_project, {"x": (P, D), "w1": (F, D), "b1": (F,)}, (P, F)),
    "down_project": (fastblock.down_project, {"h": (P, F), "w2": (D, F), "b2": (D,)}, (P, D)),
    "feed_forward": (fastblock.feed_forward, {"x": (P, D), **PARAMETERS}, (P, D)),
    "attention_weights": (fastblock.attention_weights, {"x": (P, D), **QUERY_KEY}, (P, P)),
    "Block": (fastblock.Block, PARAMETERS | QUERY_KEY, None),
    "Block.__call__": (BLOCK, {"x": (P, D), "weights": (P, P)}, (P, D)),
    "Block.__call__, own weights": (BLOCK, {"x": (P, D)}, (P, D)),
    "Block.feed_forward": (BLOCK.feed_forward, {"x": (P, D)}, (P, D)),
    "Block.up_project": (BLOCK.up_project, {"x": (P, D)}, (P, F)),
    "Block.down_project": (BLOCK.down_project, {"h": (P, F)}, (P, D)),
    "Stack.__call__": (STACK, {"x": (P, D), "weights": (P, P)}, (P, D)),
    "Stack.__call__, own weights": (STACK, {"x": (P, D)}, (P, D)),
}
BATCHED = {"x", "h", "weights"}
OPTIONAL = {"b1", "b2", "b_q", "b_k", "weights"}
ARGUMENTS = [(call, name) for call, (_, shapes, _) in CALLS.items() for name in shapes]
WITH_MASK = ["attention_weights", "Block.__call__, own weights", "Stack.__call__, own weights"]
WITH_OUT = [call for call, (_, _, result) in CALLS.items() if result is not None]


def refuse(error, call, bad, out=None):
    """Make the call with some arguments replaced; return the message of the error. Checks that `out` is whole."""
    function, shapes, result = CALLS[call]
    good = arrays(shapes)
    if out is None and result is not None:
        out = np.full(result, 7, np.float32)
    before = out.tobytes() if hasattr(out, "tobytes") else None
    keywords = good | bad
    if result is not None:
        keywords.setdefault("out", out)
    with pytest.raises(error) as caught:
        function(**keywords)
    if before is not None:
        assert out.tobytes() == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def bad_shapes(name, shape):
    """Shapes of a wrong rank, or wrong in one dimension."""
    yield shape[1:]
    if name not in BATCHED:
        yield (1, *shape)
    for axis in range(len(shape)):
        for size in (0, 1, shape[axis] - 1, shape[axis] + 1):
            if not (name in ("x", "h") and axis == 0):  # any number of positions will do
                yield (*shape[:axis], size, *shape[axis + 1 :])


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_shape(call, name):
    shapes = CALLS[call][1]
    for shape in dict.fromkeys(bad_shapes(name, shapes[name])):
        if shape == shapes[name]:
            continue
        message = refuse(ValueError, call, {name: np.ones(shape, np.float32)})
        # Where two arguments do not fit, either may be blamed, with the shape that it came in.
        found = re.fullmatch(r"(\w+): expected shape (\(.*\).*), got (\(.*\))", message)
        assert found, message
        came = shapes | {"out": CALLS[call][2], name: shape}
        assert found[1] in came and found[3] == str(came[found[1]]), message
        assert found[2] != found[3], message


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_unsupported_dtype(call, name):
    for dtype in ["f2", "g", "i4", "i8", "u1", "c8", "?", "O", "S4", "M8[s]", ">f4", ">f8", "f4,f4"]:
        message = refuse(TypeError, call, {name: np.zeros(CALLS[call][1][name], dtype)})
        assert re.fullmatch(rf"{name}: expected .+, got .+", message), message


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_mixed_dtypes(call, name):
    shapes = CALLS[call][1]
    if call == "Block" or len(shapes) > 1 or "Block" in call or "Stack" in call:
        message = refuse(TypeError, call, {name: np.zeros(shapes[name], np.float64)})
        found = re.fullmatch(r"(\w+): expected dtype (float32|float64) \(as .+\), got (float32|float64)", message)
        assert found and found[1] in shapes and found[2] != found[3], message


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_not_an_array(call, name):
    one = np.ones(3, np.float32)
    for value in [[[1.0]], (1.0,), 1.0, "x", b"1234", memoryview(one), one[0], np.ma.masked_array(one), ...]:
        if call.startswith("Stack") and name == "weights" and isinstance(value, (list, tuple)):
            continue  # one for each block: see test_block.py
        message = refuse(TypeError, call, {name: value})
        remedy = f" (np.asarray({name}, np.float32) gives one)" if isinstance(value, (list, tuple, memoryview)) else ""
        assert message == f"{name}: expected a numpy.ndarray of float32 or float64, got {type(value).__name__}{remedy}"


class Tensor:
    """What torch.Tensor has of what matters here."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def numpy(self):
        return self.array

    __array__ = __dlpack__ = None


class Frame:
    """An array of another library."""

    __array__ = __dlpack__ = None


class Exchange:
    """An array of another library that does not know NumPy."""

    __dlpack__ = None


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_an_array_of_another_library_is_told_how(call, name):
    expected = f"{name}: expected a numpy.ndarray of float32 or float64, got"
    for value, way in {
        Tensor(None): f"{name}.detach().numpy()",
        Frame(): f"np.asarray({name}, np.float32)",
        Exchange(): f"np.from_dlpack({name})",
    }.items():
        assert refuse(TypeError, call, {name: value}) == f"{expected} {type(value).__name__} ({way} gives one)"


def test_the_way_that_is_told_leads_there(same_bytes):
    x = arrays({"x": (P, D)})["x"]
    same_bytes(BLOCK(Tensor(x).detach().numpy()), BLOCK(x))
    same_bytes(BLOCK(np.asarray(x.tolist(), np.float32)), BLOCK(x))
    mask = refuse(TypeError, "attention_weights", {"key_mask": [True] * P})
    assert mask == "key_mask: expected a numpy.ndarray of bool, got list (np.asarray(key_mask, bool) gives one)"
    # Into a new array no result can be written; the memory of a tensor takes it.
    assert refuse(TypeError, "mix_positions", {}, out=[[0.0]]).endswith(", got list")
    assert refuse(TypeError, "mix_positions", {}, out=Tensor(x)).endswith(" (out.detach().numpy() gives one)")


class Impostor:
    """Says that it is an ndarray."""

    __class__ = np.ndarray
    shape = (P, D)
    ndim = 2
    dtype = np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        return np.ones((P, D), np.float32)


def test_an_object_whose_class_lies_is_no_array():
    assert isinstance(Impostor(), np.ndarray)
    for call, name in ARGUMENTS:
        assert "got Impostor" in refuse(TypeError, call, {name: Impostor()})
    for call in WITH_OUT:
        assert refuse(TypeError, call, {}, out=Impostor()).endswith("got Impostor")
    for call in WITH_MASK:
        assert "got Impostor" in refuse(TypeError, call, {"key_mask": Impostor()})


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, name in ARGUMENTS if name not in OPTIONAL])
def test_none_where_an_array_is_required(call, name):
    message = refuse(ValueError if name in QUERY_KEY and call == "Block" else TypeError, call, {name: None})
    assert name in message, message


@pytest.mark.parametrize("call", WITH_OUT)
def test_out(call):
    result = CALLS[call][2]
    for shape in [(), result[1:], (1, *result), (result[0] + 1, result[1]), (result[0], result[1] - 1), (0, result[1])]:
        message = refuse(ValueError, call, {}, out=np.full(shape, 7, np.float32))
        assert message == f"out: expected shape {result}, got {shape}"
    for dtype in ["f8", "f2", "i4", ">f4", "O", "c8"]:
        message = refuse(TypeError, call, {}, out=np.full(result, 7, dtype))
        assert re.fullmatch(r"out: expected .+, got .+", message), message
    for value in [[[1.0]], 1.0, bytearray(60), memoryview(np.ones(result, "f4")), np.ma.ones(result, "f4")]:
        message = refuse(TypeError, call, {}, out=value)
        assert re.fullmatch(rf"out: expected a numpy\.ndarray.*, got {type(value).__name__}", message), message
    read_only = np.full(result, 7, np.float32)
    read_only.flags.writeable = False
    message = refuse(ValueError, call, {}, out=read_only)
    assert re.match(r"out: .*read-only", message), message


@pytest.mark.parametrize("call", WITH_MASK)
def test_key_mask(call):
    for mask in [np.ones(P, np.int64), np.ones(P, np.float32), np.ones(P, object), [True] * P, True]:
        message = refuse(TypeError, call, {"key_mask": mask})
        assert re.fullmatch(r"key_mask: expected .*bool.*, got .+", message), message
    for shape in [(), (0,), (1,), (P - 1,), (P + 1,), (2, P), (P, P + 1), (P, 1)]:
        message = refuse(ValueError, call, {"key_mask": np.ones(shape, bool)})
        found = re.fullmatch(r"key_mask: expected .*shape .+, got (\(.*\))", message)
        assert found and found[1] == str(shape), message


@pytest.mark.parametrize("call", WITH_MASK)
def test_causal(call, same_bytes):
    """A bool of Python or NumPy: 'no' is true, and 2 is no answer to a question of yes or no."""
    for value in ["no", "", 0, 1, 2, 1.0, None, np.int64(1), np.array(True), [True], np.ones(2, bool)]:
        message = refuse(TypeError, call, {"causal": value})
        assert message == f"causal: expected a bool, got {type(value).__name__}"
    function, shapes, _ = CALLS[call]
    good = arrays(shapes)
    for value in (True, False):
        same_bytes(function(**good, causal=np.bool_(value)), function(**good, causal=value), f"causal={value}")
    assert function(**good, causal=True).tobytes() != function(**good).tobytes()


@pytest.mark.parametrize("call", ["Block.__call__", "Stack.__call__"])
def test_causal_with_weights(call):
    assert refuse(TypeError, call, {"causal": "no"}) == "causal: expected a bool, got str"


def test_leading_dimensions_that_do_not_fit():
    x = np.ones((2, P, D), np.float32)
    weights = np.ones((3, P, P), np.float32)
    for call in (fastblock.mix_positions, lambda weights, x: BLOCK(x, weights), lambda weights, x: STACK(x, weights)):
        with pytest.raises(ValueError, match=r"^(weights|x): expected .*, got .*\((3, 5, 5|2, 5, 3)\)(\n|$)"):
            call(weights, x)
    with pytest.raises(ValueError, match=r"^key_mask: expected .*shape .*, got \(3, 5\)$"):
        BLOCK(x, key_mask=np.ones((3, P), bool))


def test_weights_missing_or_at_odds():
    x, weights = arrays({"x": (P, D), "weights": (P, P)}).values()
    without = make_block(shapes=PARAMETERS)
    for call in (without, fastblock.Stack([without])):
        with pytest.raises(ValueError, match=r"weights.*(w_q|query)|(w_q|query).*weights"):
            call(x)
        with pytest.raises(ValueError):
            call(x, causal=True)
    for call in (BLOCK, without, STACK):
        for rule in ({"causal": True}, {"key_mask": np.ones(P, bool)}):
            with pytest.raises(ValueError, match=f"{[*rule][0]}.*weights|weights.*{[*rule][0]}"):
                call(x, weights, **rule)


def test_half_a_query_key_module():
    parameters = arrays(PARAMETERS | QUERY_KEY)
    for missing in [("w_q",), ("w_k",), ("w_q", "w_k"), ("w_q", "b_q"), ("w_k", "b_k")]:
        with pytest.raises(ValueError, match="w_q.*w_k"):
            fastblock.Block(**{name: array for name, array in parameters.items() if name not in missing})


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_is_missing_is_named(call):
    function, shapes, _ = CALLS[call]
    optional = {"weights"} if "__call__" in call else {"w_q", "w_k", "b_q", "b_k"} if call == "Block" else set()
    if call in ("up_project", "down_project", "attention_weights"):
        optional = {"b1", "b2", "b_q", "b_k"}
    good = arrays(shapes)
    for name in set(shapes) - optional:
        with pytest.raises(TypeError, match=rf"^{name}: expected .*, got nothing$|missing 1 .* argument: '{name}'$"):
            function(**{other: array for other, array in good.items() if other != name})
    any_of_them = "|".join(shapes)
    with pytest.raises(TypeError, match=rf"^({any_of_them}): expected .*, got nothing$|missing 1 .* argument: 'x'$"):
        function()


def test_other_arguments_that_are_missing_are_named():
    for function, name in [
        (fastblock.use_isa, "name"), (fastblock.set_num_threads, "n"),
        (fastblock.Stack, "blocks"), (BLOCK.save, "path"), (STACK.save, "path"), (fastblock.Block.load, "path"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            function()


@pytest.mark.parametrize("call", CALLS)
def test_calling_convention(call):
    function, shapes, _ = CALLS[call]
    good = arrays(shapes)
    with pytest.raises(TypeError):
        function(**good, no_such_argument=1)
    with pytest.raises(TypeError):
        function()
    with pytest.raises(TypeError):  # out, causal and the query-key module of Block are keyword-only
        function(*good.values(), *[None] * 9)


def test_array_subclasses(tmp_path, same_bytes):
    """A subclass that only adds to ndarray is an ndarray; results are plain."""

    class Plain(np.ndarray):
        pass

    for call, (function, shapes, result) in CALLS.items():
        if result is None:
            continue
        good = arrays(shapes)
        expected = function(**good)
        mapped = {}
        for name, array in good.items():
            np.save(tmp_path / f"{name}.npy", array)
            mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        for variant in (mapped, {name: array.view(Plain) for name, array in good.items()}):
            got = function(**variant)
            assert type(got) is np.ndarray
            same_bytes(got, expected, call)
        out = np.empty(result, np.float32).view(Plain)
        assert function(**good, out=out) is out
        same_bytes(out, expected, call)


class Liar(np.ndarray):
    """Says something else of itself than what its memory holds."""

    shape = property(lambda self: (1, 2**20))
    ndim = property(lambda self: 7)
    dtype = property(lambda self: np.dtype(np.float64))
    flags = property(lambda self: None)


@pytest.mark.parametrize("call", CALLS)
def test_array_that_lies(call, same_bytes):
    """What counts is the memory that an array has, not what its class says."""
    function, shapes, result = CALLS[call]
    good = arrays(shapes)
    lying = {name: array.view(Liar) for name, array in good.items()}
    if result is None:
        x = arrays({"x": (P, D)})["x"]
        same_bytes(function(**lying)(x), function(**good)(x), call)
        return
    plain = np.empty(result, np.float32)
    out = plain.view(Liar)
    assert function(**lying, out=out) is out
    same_bytes(plain, function(**good), call)
    if "own weights" in call:
        mask = np.arange(P) % 2 == 0
        same_bytes(function(**good, key_mask=mask.view(Liar)), function(**good, key_mask=mask), call)


# ---- Python code that runs during a call


class Resizing:
    """Its truth takes away the memory of an array."""

    def __init__(self, array):
        self.array = array

    def __bool__(self):
        self.array.resize(1, refcheck=False)
        return True


@pytest.mark.parametrize("call", WITH_MASK)
def test_causal_does_not_run_code(call):
    function, shapes, result = CALLS[call]
    good = arrays(shapes)
    out = np.full(result, 7, np.float32)
    for victim in (good["x"], out):
        with pytest.raises(TypeError, match=r"^causal: expected a bool, got Resizing($|\n)"):
            function(**good, causal=Resizing(victim), out=out)
        assert victim.size > 1


@pytest.mark.parametrize("call", WITH_OUT)
def test_array_that_is_resized_by_the_garbage_collector(call, same_bytes):
    """A finaliser can run wherever an object is made. Before the checks or after them, it must not matter."""
    function, shapes, _ = CALLS[call]
    given = {name: (3, *shape) if name == "x" else shape for name, shape in shapes.items()}
    if call in WITH_MASK:
        given["key_mask"] = (3, P)
    threshold = gc.get_threshold()
    for name, moment in itertools.product(given, range(8)):
        good = arrays(given)
        if call in WITH_MASK:
            good["key_mask"] = good["key_mask"] > 0
        expected, left = function(**good), [None] * moment + [good[name]]

        def resize(phase, info):
            if phase == "start" and left and (victim := left.pop(0)) is not None:  # noqa: B023 (called in this round)
                victim.resize([4 * n for n in victim.shape], refcheck=False)

        gc.callbacks.append(resize)
        gc.set_threshold(1)
        try:
            result = function(**good)
        except (RuntimeError, ValueError) as error:
            assert re.match(r"\w+: (the array was changed|expected)", str(error))
        else:
            same_bytes(result, expected, name)
        finally:
            gc.set_threshold(*threshold)
            gc.callbacks.remove(resize)


@pytest.mark.parametrize("call", CALLS)
def test_array_that_is_resized_while_another_is_checked(call, monkeypatch):
    """The core looks up numpy.ma for an ndarray of a subclass: here this takes away an array that may be checked."""
    function, shapes, result = CALLS[call]

    class Plain(np.ndarray):
        pass

    class Resizing:
        @property
        def MaskedArray(self):
            victim.resize(1, refcheck=False)
            return masked_array

    masked_array = np.ma.MaskedArray
    names = [*shapes, *(["out"] if result else [])]
    for name, other in itertools.permutations(names, 2):
        if call.startswith("Stack") and (name, other) == ("x", "out"):
            continue  # the first block has long read x when the last one looks at out
        good = arrays(shapes)
        if result:
            good["out"] = np.full(result, 7, np.float32)
        victim = good[name]
        good[other] = good[other].view(Plain)
        with monkeypatch.context() as patch:
            patch.setattr(np, "ma", Resizing())
            with pytest.raises((RuntimeError, ValueError), match=r"^\w+: (the array was changed|expected shape)"):
                function(**good)
        assert victim.size == 1


@pytest.mark.parametrize("call", WITH_OUT)
def test_out_that_becomes_read_only_while_another_is_checked(call, monkeypatch):
    function, shapes, result = CALLS[call]

    class Plain(np.ndarray):
        pass

    class Locking:
        @property
        def MaskedArray(self):
            out.flags.writeable = False
            return masked_array

    masked_array = np.ma.MaskedArray
    for other in shapes:
        good = arrays(shapes)
        good[other] = good[other].view(Plain)
        out = np.full(result, 7, np.float32)
        with monkeypatch.context() as patch:
            patch.setattr(np, "ma", Locking())
            with pytest.raises((RuntimeError, ValueError), match=r"^out: (the array was changed|.*read-only)"):
                function(**good, out=out)
        assert (out == 7).all()


# ---- nothing to do, and too much to do


EMPTY = [
    {"P": 0}, {"D": 0}, {"F": 0}, {"E": 0}, {"P": 0, "D": 0}, {"D": 0, "F": 0}, {"P": 0, "D": 0, "F": 0, "E": 0},
    {"batch": (0,)}, {"batch": (2, 0)}, {"batch": (0,), "P": 0}, {"batch": (3,), "F": 0}, {"batch": (3,), "D": 0},
]  # fmt: skip


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes, dtype, same_bytes, every_tier):
    sizes = {"P": 5, "D": 3, "F": 4, "E": 2, "batch": ()} | sizes
    P, D, F, E, batch = sizes.values()
    x, h, weights, w1, b1, w2, b2, w_q, w_k, b_q, b_k = arrays(
        {
            "x": (*batch, P, D), "h": (*batch, P, F), "weights": (*batch, P, P), "w1": (F, D), "b1": (F,), "w2": (D, F),
            "b2": (D,), "w_q": (E, D), "w_k": (E, D), "b_q": (E,), "b_k": (E,),
        },
        dtype,
    ).values()  # fmt: skip
    mask = np.arange(P) % 2 == 0
    for _ in every_tier():
        for name, *args in [
            ("mix_positions", weights, x),
            ("bias_relu", h, b1),
            ("up_project", x, w1, b1),
            ("up_project", x, w1),
            ("down_project", h, w2, b2),
            ("down_project", h, w2),
            ("feed_forward", x, w1, b1, w2, b2),
            ("feed_forward", x, w1, None, w2, None),
            ("attention_weights", x, w_q, w_k, b_q, b_k),
            ("attention_weights", x, w_q, w_k),
        ]:
            expected = getattr(reference, name)(*args)
            same_bytes(getattr(fastblock, name)(*args), expected, name)
            out = np.full_like(expected, 7)
            same_bytes(getattr(fastblock, name)(*args, out=out), expected, f"{name} with out")
        block = fastblock.Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k, b_q=b_q, b_k=b_k)
        query_key = {"w_q": w_q, "w_k": w_k, "b_q": b_q, "b_k": b_k}
        same_bytes(block(x, weights), reference.block(x, w1, b1, w2, b2, weights), "block")
        for rule in ({}, {"causal": True}, {"key_mask": mask}):
            expected = reference.block(x, w1, b1, w2, b2, **query_key, **rule)
            same_bytes(block(x, **rule), expected, f"block, {rule}")
        same_bytes(block.feed_forward(x), reference.feed_forward(x, w1, b1, w2, b2), "Block.feed_forward")


def test_many_positions_without_features(dtype):
    """Nothing is written, so nothing takes time: 2**40 positions of no features."""
    many = 2**40
    x, weights, w1, w2, bias = (np.zeros(shape, dtype) for shape in ((many, 1, 0), (1, 1), (3, 0), (0, 3), 0))
    block = fastblock.Block(w1, None, w2, None, w_q=w1, w_k=w1)
    for result in (
        fastblock.mix_positions(weights, x),
        fastblock.bias_relu(x, bias),
        fastblock.up_project(x, w1[:0]),
        fastblock.feed_forward(x, w1, None, w2, None),
        block.feed_forward(x),
        block(x, weights),
        block(x),
    ):
        assert result.shape == x.shape


def huge(*shape):
    """An array of any shape in 4 bytes of memory."""
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, [0] * len(shape))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        # a result of more bytes than there are addresses, and one of more elements than fit in 64 bits
        (fastblock.mix_positions, [(2**20, 2**20), (2**20, 2**40)]),
        (fastblock.mix_positions, [(2**40, 1, 1), (2**40, 1, 1, 2**20)]),
        (fastblock.bias_relu, [(2**50, 2**4), (2**4,)]),
        (fastblock.up_project, [(2**50, 3), (4, 3), (4,)]),
        (fastblock.up_project, [(2**40, 3), (2**40, 3)]),
        (fastblock.up_project, [(2**60, 0), (2**60, 0)]),
        (fastblock.down_project, [(2**50, 4), (3, 4), (3,)]),
        (fastblock.down_project, [(2**32, 1), (2**32, 1)]),
        (fastblock.feed_forward, [(2**50, 3), (4, 3), (4,), (3, 4), (3,)]),
        (fastblock.feed_forward, [(5, 3), (2**58, 3), (2**58,), (3, 2**58), (3,)]),
        (fastblock.attention_weights, [(2**40, 1), (1, 1), (1, 1)]),
        (fastblock.attention_weights, [(2**26, 1), (1, 1), (1, 1)]),
        (fastblock.attention_weights, [(2**60, 0), (1, 0), (1, 0)]),
        (fastblock.Block, [(2**58, 3), (2**58,), (3, 2**58), (3,)]),
        (fastblock.Block, [(2**29, 2**29), None, (2**29, 2**29), None]),
        (BLOCK.feed_forward, [(2**50, D)]),
        (BLOCK, [(2**50, D)]),
        (BLOCK, [(2**50, P, D), (P, P)]),
        (STACK, [(2**50, P, D), (P, P)]),
    ],
)
def test_too_large(function, shapes):
    operands = [shape and huge(*shape) for shape in shapes]
    before = resident_bytes()
    for _ in range(20):
        with pytest.raises(MemoryError):
            function(*operands)
    assert resident_bytes() - before < 2**22


# ---- overlap


@pytest.mark.parametrize("call", WITH_OUT)
def test_out_may_overlap_an_input(call, dtype, same_bytes):
    """P = D = F = 6: then `out` can be any of the inputs, or straddle it."""
    function, shapes, _ = CALLS[call]
    n = 6
    square = {name: (n,) * len(shape) for name, shape in shapes.items()}
    good = arrays(square, dtype)
    if "Block" in call or "Stack" in call:
        block = make_block(dtype, {name: (n,) * len(shape) for name, shape in (PARAMETERS | QUERY_KEY).items()})
        model = fastblock.Stack([block, block, block]) if "Stack" in call else block
        method = call.partition(".")[2].partition(",")[0]
        function = getattr(model, method)
    expected = function(**good)
    for name, array in good.items():
        if array.ndim < 2:
            continue
        for shift in (0, 1, 5, 7, -1, -7):
            for transposed in (False, True):
                buffer = np.zeros(n * n + 20, dtype)
                x = buffer[10 : 10 + n * n].reshape(n, n)
                out = buffer[10 + shift : 10 + shift + n * n].reshape(n, n)
                out = out.T if transposed else out
                x[...] = array
                assert function(**good | {name: x}, out=out) is out
                same_bytes(out, expected, f"{call}: out over {name} shifted by {shift}, transposed: {transposed}")


# ---- leaks


def resident_bytes():
    if not os.path.exists("/proc/self/statm"):
        return 0  # elsewhere reference counts have to do
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def failing_calls(call):
    """Calls that fail early and late, by dtype, shape and `out`, with arguments large enough that a leak shows."""
    function, shapes, result = CALLS[call]
    good = arrays(shapes)
    last = [*shapes][-1]
    yield good | {last: np.zeros(shapes[last], "f2")}
    yield good | {last: np.ones((*shapes[last][:-1], shapes[last][-1] + 1), "f4")}
    if result is not None:
        yield good | {"out": np.zeros(result)}
        yield good | {"out": np.zeros((1, *result), "f4")}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_leaks(call):
    function, shapes, result = CALLS[call]
    for keywords in [*failing_calls(call), arrays(shapes)]:
        inputs = [*keywords.values()]

        def repeat(times):
            for _ in range(times):
                try:
                    function(**keywords)
                except (TypeError, ValueError):
                    pass

        repeat(500)
        gc.collect()
        counts, resident = [sys.getrefcount(value) for value in inputs], resident_bytes()
        repeat(10_000)
        gc.collect()
        assert [sys.getrefcount(value) for value in inputs] == counts
        assert resident_bytes() - resident < 2**19  # 10000 of anything that malloc gives would be more than that


def test_block_that_fails_to_construct_frees_its_panels():
    parameters = arrays({"w1": (512, 64), "b1": (512,), "w2": (64, 512), "b2": (65,)})
    before = resident_bytes()
    for _ in range(1000):
        with pytest.raises(ValueError):
            fastblock.Block(**parameters)
    for _ in range(1000):
        fastblock.Block(**parameters | {"b2": None})
    assert resident_bytes() - before < 2**24  # 1000 times 256 KiB would be 2**28
