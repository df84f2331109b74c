"""`Block` and `Stack`: what they own, keep and hand on. Their arithmetic is tested in test_exact.py."""

import copy
import operator
import os
import pickle
import threading
import timeit
import tracemalloc
import zipfile

import numpy as np
import pytest

import fastblock
from fastblock import _files, reference
from fastblock.layers import PARAMETERS

SHAPES = {"w1": (9, 5), "b1": (9,), "w2": (5, 9), "b2": (5,), "w_q": (3, 5), "w_k": (3, 5), "b_q": (3,), "b_k": (3,)}
VARIANTS = {
    "all": PARAMETERS,
    "no query-key module": ("w1", "b1", "w2", "b2"),
    "no bias": ("w1", "w2", "w_q", "w_k"),
    "some biases": ("w1", "w2", "b2", "w_q", "w_k", "b_k"),
}


def make_parameters(dtype, names=PARAMETERS, seed=0):
    rng = np.random.default_rng(seed)
    parameters = {name: rng.standard_normal(SHAPES[name]).astype(dtype) for name in names}
    return dict.fromkeys(("w1", "b1", "w2", "b2")) | parameters


def make_stack(dtype=np.float32, names=PARAMETERS, count=3):
    return fastblock.Stack(fastblock.Block(**make_parameters(dtype, names, seed)) for seed in range(count))


def inputs(dtype):
    rng = np.random.default_rng(99)
    return rng.standard_normal((2, 7, 5)).astype(dtype), rng.standard_normal((7, 7)).astype(dtype)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def names(request):
    return request.param


def assert_equal_models(got, want, same_bytes):
    """Same parameters, same types, same results."""
    assert type(got) is type(want)
    blocks = zip(got, want, strict=True) if isinstance(want, fastblock.Stack) else [(got, want)]
    for one, other in blocks:
        for name in PARAMETERS:
            if getattr(other, name) is None:
                assert getattr(one, name) is None
            else:
                same_bytes(getattr(one, name), getattr(other, name), name)
    x, weights = inputs(want.dtype)
    same_bytes(got(x, weights), want(x, weights))


# ---- what a block owns


def test_attributes(dtype, names, same_bytes):
    parameters = make_parameters(dtype, names)
    block = fastblock.Block(**parameters)
    for name in PARAMETERS:
        kept = getattr(block, name)
        if parameters.get(name) is None:
            assert kept is None
        else:
            same_bytes(kept, parameters[name], name)
            with pytest.raises(AttributeError):
                setattr(block, name, parameters[name])
    assert block.dtype == np.dtype(dtype) and isinstance(block.dtype, np.dtype)
    assert (block.features, block.hidden) == (5, 9)
    assert block.head_width == (3 if "w_q" in names else None)


def test_every_bit_of_a_parameter_is_kept(dtype, same_bytes):
    """NaN payloads and signs of zeros, too: packing and unpacking moves values, it does not compute with them."""
    rng = np.random.default_rng(5)
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    parameters = {
        name: rng.integers(0, np.iinfo(unsigned).max, shape, unsigned).view(dtype) for name, shape in SHAPES.items()
    }
    parameters["b1"][0] = -0.0
    block = fastblock.Block(**parameters)
    for name, array in parameters.items():
        same_bytes(getattr(block, name), array, name)


def test_parameters_are_copied_once(dtype, names, same_bytes):
    parameters = make_parameters(dtype, names)
    x, weights = inputs(dtype)
    block = fastblock.Block(**parameters)
    expected = block(x, weights)
    for array in parameters.values():
        if array is not None:
            array[...] = np.nan
    same_bytes(block(x, weights), expected)
    for name in PARAMETERS:  # what the attributes give away is a copy, too
        kept = getattr(block, name)
        if kept is not None and kept.flags.writeable:
            kept[...] = np.nan
    same_bytes(block(x, weights), expected)


def test_parameters_of_any_layout(dtype, same_bytes):
    plain = make_parameters(dtype)
    layouts = [
        {name: np.asfortranarray(array) for name, array in plain.items()},
        {
            name: np.repeat(np.repeat(array, 2, 0), 3, -1)[::2, ..., ::3] if array.ndim > 1 else array
            for name, array in plain.items()
        },
        {name: array[..., ::-1].copy()[..., ::-1] for name, array in plain.items()},
    ]
    block = fastblock.Block(**plain)
    for parameters in layouts:
        for array in parameters.values():
            array.flags.writeable = False
        assert_equal_models(fastblock.Block(**parameters), block, same_bytes)


def test_repr():
    assert repr(fastblock.Block(**make_parameters("f4"))) == "Block(features=5, hidden=9, head_width=3, dtype=float32)"
    block = fastblock.Block(**make_parameters("f8", ("w1", "w2")))
    assert repr(block) == "Block(features=5, hidden=9, head_width=None, dtype=float64)"
    assert repr(fastblock.Stack([block])) == f"Stack([\n    {block!r},\n])"


# ---- pickle and copy


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", [lambda *a: make_stack(*a)[0], make_stack], ids=["Block", "Stack"])
def test_pickle(make, protocol, dtype, names, same_bytes):
    model = make(dtype, names)
    assert_equal_models(pickle.loads(pickle.dumps(model, protocol)), model, same_bytes)
    assert_equal_models(copy.copy(model), model, same_bytes)
    assert_equal_models(copy.deepcopy(model), model, same_bytes)


class Scaled(fastblock.Block):
    """A subclass whose parameters are made from other arguments."""

    def __init__(self, scale, *, features=5):
        super().__init__(scale * np.eye(features), None, np.eye(features), None)
        self.scale = scale


def test_subclass_with_arguments_of_its_own(same_bytes):
    block = Scaled(2.0)
    for twin in (pickle.loads(pickle.dumps(block)), copy.copy(block), copy.deepcopy(block)):
        assert type(twin) is Scaled and twin.scale == 2.0
        same_bytes(twin.w1, block.w1)


def test_copies_share_the_weights(same_bytes):
    """A copy of a block, or of a stack, takes no memory for parameters: they never change. Attributes are its own."""
    w1, w2 = np.ones((1024, 768), "f4"), np.ones((768, 1024), "f4")
    for model in (Named(w1, None, w2, None), fastblock.Stack([Named(w1, None, w2, None)] * 2)):
        model.tags = ["first"]
        before = resident_bytes()
        copies = [make(model) for make in (copy.copy, copy.deepcopy) for _ in range(20)]
        assert resident_bytes() - before < 2**22  # one of its matrices is 3 MiB
        x, weights = np.ones((2, 768), "f4"), np.eye(2, dtype="f4")
        for twin in (copies[0], copies[-1]):
            assert twin is not model and type(twin) is type(model) and twin.tags == ["first"]
            same_bytes(twin(x, weights), model(x, weights))
        assert copies[0].tags is model.tags and copies[-1].tags is not model.tags
        copies[0].tags = ["second"]
        assert model.tags == ["first"]


def test_copies_outlive_the_block(same_bytes):
    parameters, (x, weights) = make_parameters("f4"), inputs("f4")
    block = fastblock.Block(**parameters)
    expected, twin = block(x, weights), copy.copy(copy.deepcopy(block))
    del block
    same_bytes(twin(x, weights), expected)
    for name in PARAMETERS:
        same_bytes(getattr(twin, name), parameters[name], name)
    with pytest.raises(RuntimeError, match="^a block cannot be initialised twice: make a new one$"):
        twin.__init__(**parameters)


def test_every_bit_goes_through_pickles(dtype, same_bytes):
    """Scaled panels, too, as weights with subnormal numbers make them, and NaN with their payloads."""
    rng = np.random.default_rng(6)
    tiny = np.finfo(dtype).smallest_subnormal
    for make in (
        lambda shape: (tiny * rng.integers(-9, 9, shape)).astype(dtype),
        lambda shape: rng.integers(0, 2**63, shape, np.uint64).view("f8").astype(dtype),
    ):
        with np.errstate(all="ignore"):
            parameters = {name: make([8 * n for n in shape]) for name, shape in SHAPES.items()}
        block = fastblock.Block(**parameters)
        for twin in (pickle.loads(pickle.dumps(block)), copy.copy(block), copy.deepcopy(block)):
            for name, array in parameters.items():
                same_bytes(getattr(twin, name), array, name)


def resident_bytes():
    if not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# ---- half-made objects


UNINITIALISED = {
    "call": lambda block: block(*inputs("f4")),
    "call, small": lambda block: block(np.ones((2, 0), "f4"), np.ones((2, 2), "f4")),
    "feed_forward": lambda block: block.feed_forward(inputs("f4")[0]),
    "up_project": lambda block: block.up_project(inputs("f4")[0]),
    "down_project": lambda block: block.down_project(inputs("f4")[0]),
    "repr": repr,
    "Stack": lambda block: fastblock.Stack([block]),
    "Stack, second": lambda block: fastblock.Stack([make_stack()[0], block]),
    "pickle": pickle.dumps,
    "pickle 0": lambda block: pickle.dumps(block, 0),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{name: operator.attrgetter(name) for name in (*PARAMETERS, "dtype", "features", "hidden", "head_width")},
}


def half_made_blocks():
    yield fastblock.Block.__new__(fastblock.Block)
    yield Scaled.__new__(Scaled)
    block = fastblock.Block.__new__(fastblock.Block)
    with pytest.raises(ValueError):
        block.__init__(np.ones((3, 2)), None, np.ones((3, 3)), None)
    yield block


@pytest.mark.parametrize("use", UNINITIALISED.values(), ids=UNINITIALISED)
def test_block_without_parameters(use):
    for block in half_made_blocks():
        with pytest.raises(RuntimeError, match="^the block has no parameters: its __init__ has not been called"):
            use(block)


def test_block_without_parameters_is_not_saved(tmp_path):
    for block in half_made_blocks():
        with pytest.raises(RuntimeError, match="^the block has no parameters"):
            block.save(tmp_path / "block.npz")
    assert not os.listdir(tmp_path)


def test_block_whose_first_initialisation_failed_can_be_initialised(same_bytes):
    *_, block = half_made_blocks()
    block.__init__(**make_parameters("f4"))
    assert_equal_models(block, fastblock.Block(**make_parameters("f4")), same_bytes)


def test_a_block_is_initialised_once(monkeypatch, same_bytes):
    first, second = make_parameters("f4"), make_parameters("f4", seed=1)
    block = fastblock.Block(**first)
    with pytest.raises(RuntimeError, match="^a block cannot be initialised twice: make a new one$"):
        block.__init__(**second)
    assert_equal_models(block, fastblock.Block(**first), same_bytes)

    # The same while another initialisation is under way, as in two threads: here it runs inside the other's checks.
    block = fastblock.Block.__new__(fastblock.Block)

    class Plain(np.ndarray):
        pass

    class Meanwhile:
        @property
        def MaskedArray(self):
            monkeypatch.undo()
            block.__init__(**first)
            return np.ma.MaskedArray

    monkeypatch.setattr(np, "ma", Meanwhile())
    with pytest.raises(RuntimeError, match="^a block cannot be initialised twice: make a new one$"):
        block.__init__(**second | {"w1": second["w1"].view(Plain)})
    assert_equal_models(block, fastblock.Block(**first), same_bytes)


def test_initialised_by_several_threads(same_bytes):
    """One succeeds, the others are told; calls in between see no parameters, or all of them."""
    x = np.ones((3, 64), "f4")
    weights = np.eye(3, dtype="f4")
    w2 = np.ones((64, 2048), "f4")
    candidates = [fastblock.Block(np.full((2048, 64), n, "f4"), None, w2, None) for n in (1, 2, 3)]
    allowed = {candidate(x, weights).tobytes() for candidate in candidates}
    parameters = [(candidate.w1, None, candidate.w2, None) for candidate in candidates]
    for _ in range(10):
        block = fastblock.Block.__new__(fastblock.Block)
        start = threading.Barrier(4)
        outcomes = []

        def initialise(own):
            start.wait()
            try:
                block.__init__(*own)
                outcomes.append("made")
            except RuntimeError as error:
                outcomes.append(str(error))

        def use():
            start.wait()
            for _ in range(50):
                try:
                    results.append(block(x, weights).tobytes())
                except RuntimeError:
                    pass

        results = []
        threads = [threading.Thread(target=initialise, args=(own,)) for own in parameters]
        threads.append(threading.Thread(target=use))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["a block cannot be initialised twice: make a new one"] * 2 + ["made"]
        results.append(block(x, weights).tobytes())
        assert len(set(results)) == 1 and set(results) < allowed


@pytest.mark.parametrize(
    "use",
    [len, list, repr, bool, pickle.dumps, copy.copy, copy.deepcopy]
    + [lambda stack: stack(*inputs("f4")), lambda stack: stack[0], lambda stack: stack[:1]]
    + [lambda stack: stack.dtype, lambda stack: stack.features, lambda stack: stack.save("stack.npz")],
)
def test_stack_without_blocks(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = fastblock.Stack.__new__(fastblock.Stack)
    with pytest.raises(TypeError):
        failed.__init__([make_stack()[0], 1])
    for stack in (fastblock.Stack.__new__(fastblock.Stack), failed):
        with pytest.raises(RuntimeError, match="^the stack has no blocks: its __init__ has not been called"):
            use(stack)
    assert not os.listdir(tmp_path)


def test_a_stack_is_initialised_once():
    stack = make_stack()
    blocks = list(stack)
    with pytest.raises(RuntimeError, match="^a stack cannot be initialised twice: make a new one$"):
        stack.__init__(blocks[:1])
    assert list(stack) == blocks


def test_num_threads_without_a_number():
    with pytest.raises(RuntimeError, match="^num_threads has no number: its __init__ has not been called$"):
        fastblock.num_threads.__new__(fastblock.num_threads).__enter__()


def test_pickle_holds_raw_parameters_only():
    """Neither padding nor a second, packed copy."""
    rng = np.random.default_rng(0)
    block = fastblock.Block(*(rng.standard_normal(shape) for shape in [(101, 67), 101, (67, 101), 67]))
    raw = sum(array.nbytes for array in (block.w1, block.b1, block.w2, block.b2))
    assert raw < len(pickle.dumps(block)) < raw + 2000


class Named(fastblock.Block):
    """A subclass with an attribute of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = "unnamed"


def test_subclass(tmp_path, same_bytes):
    block = Named(**make_parameters("f4"))
    assert repr(block).startswith("Named(features=5")
    block.name = "first"
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        assert_equal_models(twin, block, same_bytes)
        assert twin.name == "first"
    block.save(tmp_path / "block.npz")
    assert_equal_models(Named.load(tmp_path / "block.npz"), block, same_bytes)
    assert type(fastblock.Stack([block])[0]) is Named


# ---- files


@pytest.mark.parametrize("make", [lambda *a: make_stack(*a)[0], make_stack], ids=["Block", "Stack"])
def test_save_and_load(make, dtype, names, tmp_path, same_bytes):
    model = make(dtype, names)
    for path in (tmp_path / "model.npz", str(tmp_path / "no suffix is added")):
        model.save(path)
        assert_equal_models(type(model).load(path), model, same_bytes)
        assert_equal_models(fastblock.layers.load(path), model, same_bytes)
    assert sorted(os.listdir(tmp_path)) == ["model.npz", "no suffix is added"]


def test_a_stack_of_more_than_ten_blocks_keeps_its_order(tmp_path, same_bytes):
    stack = make_stack(count=12)
    stack.save(tmp_path / "stack.npz")
    assert_equal_models(fastblock.Stack.load(tmp_path / "stack.npz"), stack, same_bytes)


def test_a_file_holds_plain_arrays(tmp_path):
    """Anyone with NumPy can read the parameters; nothing in the file is pickled."""
    stack = make_stack()
    stack[0].save(tmp_path / "block.npz")
    stack.save(tmp_path / "stack.npz")
    with np.load(tmp_path / "block.npz", allow_pickle=False) as file:
        assert sorted(file) == sorted(["fastblock_format", *PARAMETERS])
        assert str(file["fastblock_format"]) == "fastblock.Block/1"
    with np.load(tmp_path / "stack.npz", allow_pickle=False) as file:
        assert sorted(file) == sorted(["fastblock_format", *(f"{i}.{name}" for i in range(3) for name in PARAMETERS)])
        assert str(file["fastblock_format"]) == "fastblock.Stack/1"


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "file"
    stack = make_stack()
    parameters = make_parameters("f4")

    def refused(expectation, loaders=(fastblock.Block.load, fastblock.Stack.load)):
        for load in loaders:
            with pytest.raises(ValueError) as caught:
                load(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and expectation in message and "\n" not in message, message

    stack.save(path)
    refused("format fastblock.Block/1, got fastblock.Stack/1", [fastblock.Block.load])
    stack[0].save(path)
    refused("format fastblock.Stack/1, got fastblock.Block/1", [fastblock.Stack.load])
    for content in (b"", b"\x80", b"text\n" * 100, b"PK", b"PK\x03\x04" + bytes(100), pickle.dumps(stack)):
        path.write_bytes(content)
        refused("a file that cannot be read")
    with open(path, "wb") as file:
        np.save(file, parameters["w1"])
    refused("a single array")
    with open(path, "wb") as file:
        np.savez(file, **parameters)
    refused("an .npz file that fastblock has not written")
    with open(path, "wb") as file:
        np.savez(file, fastblock_format="fastblock.Block/2", **parameters)
    refused("got fastblock.Block/2")
    with open(path, "wb") as file:
        np.savez(file, fastblock_format=np.array({"a": 1}, dtype=object), **parameters)
    refused("cannot be read")

    for message, change in {
        "w1": {"w1": None},
        "b1: expected shape (9,), got (4,)": {"b1": np.ones(4, "f4")},
        "dtype": {"w2": parameters["w2"].astype("f8")},
        "w_q": {"w_k": None},
        "w3": {"w3": parameters["w1"]},
    }.items():
        arrays = {name: array for name, array in (parameters | change).items() if array is not None}
        _files.write_arrays(path, "Block", arrays)
        refused(message, [fastblock.Block.load])
        _files.write_arrays(path, "Stack", {f"0.{name}": array for name, array in arrays.items()})
        refused(message, [fastblock.Stack.load])
    for arrays in ({}, {"0w1": parameters["w1"]}, {"1.w1": parameters["w1"]}, {".": parameters["w1"]}):
        _files.write_arrays(path, "Stack", arrays)
        refused("do not fit together", [fastblock.Stack.load])

    for load in (fastblock.Block.load, fastblock.Stack.load):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "missing")
        with pytest.raises(IsADirectoryError):
            load(tmp_path)


def test_damaged_files_are_refused_or_read_right(tmp_path, same_bytes):
    """Cut anywhere, or with any byte changed: an error that says so, never other parameters (zip has checksums)."""
    block = make_stack()[0]
    block.save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "damaged.npz"
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(whole), 300):
        flipped = bytearray(whole)
        flipped[position] ^= int(rng.integers(1, 256))
        for content in (whole[:position], flipped):
            path.write_bytes(content)
            try:
                assert_equal_models(fastblock.Block.load(path), block, same_bytes)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
    assert refused > 400


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    path.write_bytes(b"what was there before")
    stack = make_stack()

    def fail(*_, **__):
        raise failure

    def fail_half_way(file, **arrays):
        file.write(b"half")
        raise failure

    for failure in (OSError("disk full"), KeyboardInterrupt()):
        for module, name, stand_in in [(np, "savez", fail_half_way), (os, "fsync", fail), (os, "replace", fail)]:
            with monkeypatch.context() as patch:
                patch.setattr(module, name, stand_in)
                with pytest.raises(type(failure)):
                    stack.save(path)
        assert path.read_bytes() == b"what was there before"
        assert os.listdir(tmp_path) == ["model.npz"]

    with pytest.raises(IsADirectoryError):
        stack.save(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        stack.save(tmp_path / "missing" / "model.npz")
    assert caught.value.filename == str(tmp_path / "missing" / "model.npz")
    assert os.listdir(tmp_path) == ["model.npz"]


@pytest.mark.skipif(os.name != "posix", reason="symbolic links, permissions and devices of POSIX")
def test_save_respects_what_the_path_is(tmp_path):
    block = make_stack()[0]
    (tmp_path / "link").symlink_to("target")
    block.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and zipfile.is_zipfile(tmp_path / "target")
    umask = os.umask(0o027)
    try:
        block.save(tmp_path / "new")
    finally:
        os.umask(umask)
    assert os.stat(tmp_path / "new").st_mode & 0o777 == 0o640
    with pytest.raises(OSError, match="Not a regular file"):
        block.save(os.devnull)
    assert not os.path.isfile(os.devnull)


# ---- stack


def test_stack_is_the_blocks_one_after_another(dtype, same_bytes):
    rng = np.random.default_rng(3)
    x, shared = inputs(dtype)
    mask = np.arange(7) < 5
    for count in (1, 2, 3, 4, 5):
        stack = make_stack(dtype, count=count)
        own = [rng.standard_normal((7, 7)).astype(dtype) for _ in range(count)]
        mixed = [weights if index % 2 else None for index, weights in enumerate(own)]
        batched = rng.standard_normal((2, 7, 7)).astype(dtype)
        for weights, rule in [
            (None, {}), (None, {"causal": True}), (None, {"key_mask": mask}),
            (None, {"causal": True, "key_mask": mask}),
            (shared, {}), (batched, {}), (own, {}), (tuple(own), {}), (mixed, {}), ([None] * count, {"causal": True}),
        ]:  # fmt: skip
            expected = x
            for index, block in enumerate(stack):
                one = weights[index] if isinstance(weights, (list, tuple)) else weights
                expected = block(expected, one, **rule)
            unchanged = x.copy()
            same_bytes(stack(x, weights, **rule), expected, f"{count} blocks")
            same_bytes(x, unchanged, "input")
            out = np.empty_like(x)
            assert stack(x, weights, out=out, **rule) is out
            same_bytes(out, expected, f"{count} blocks with out")
            assert stack(unchanged, weights, out=unchanged, **rule) is unchanged
            same_bytes(unchanged, expected, f"{count} blocks in place")


def call_and_error(function, *args, **keywords):
    """What a call returns as bytes, and the error that it raises."""
    try:
        return function(*args, **keywords).tobytes(), None
    except (TypeError, ValueError, MemoryError) as error:
        return None, (type(error), str(error))


def test_a_leading_axis_and_a_stack_of_one_change_nothing(dtype):
    """Hot and cold calls go the same way: results, and errors but for the shape that they name, are the same."""
    block = make_stack(dtype)[0]
    stack = fastblock.Stack([block])
    x, a = inputs(dtype)
    x, other = x[0], np.dtype("f4") if dtype == np.float64 else np.dtype("f8")
    out, mask, short = np.empty_like(x), np.arange(7) < 5, np.ones((7, 4), dtype)
    locked = np.empty_like(x)
    locked.flags.writeable = False
    for args, rule in [
        ((x, a), {}), ((x,), {}), ((x,), {"causal": True}), ((x,), {"key_mask": mask}), ((x, a), {"out": out}),
        ((x,), {"out": out}), ((x[::-1], a.T), {}), ((x, a), {"out": np.empty_like(x).T.copy().T}),
        ((x, a), {"causal": True}), ((x, a), {"key_mask": mask}), ((x, a), {"causal": "no"}), ((short, a), {}),
        ((x, a[:6]), {}), ((x, a.astype(other)), {}), ((x.astype(other), a), {}), ((x, a), {"out": short}),
        ((x, a), {"out": locked}), ((x, a), {"out": x.astype(other)}), ((x.tolist(), a), {}),
        ((x,), {"key_mask": mask[:6]}),
    ]:  # fmt: skip
        want = call_and_error(block, *args, **rule)
        assert call_and_error(stack, *args, **rule) == want
        leading = [one[None] if isinstance(one, np.ndarray) else one for one in args]
        named = {name: one[None] if isinstance(one, np.ndarray) else one for name, one in rule.items()}
        for variant in (block, stack):
            got = call_and_error(variant, *leading, **named)
            if want[0] is not None or "shape" not in want[1][1]:
                assert got == want
            else:
                message = want[1][1].replace("got (", "got (1, ").replace("shape (7", "shape (1, 7").replace(",)", ")")
                assert got[1] == (want[1][0], message)


@pytest.mark.slow
def test_a_leading_axis_and_a_stack_of_one_take_as_long():
    """1.0 to 1.2 times as long as the plain call; it was 5 to 6 times while only that had a way of its own."""
    block = fastblock.Block(*(np.ones(shape, "f4") for shape in [(4, 3), 4, (3, 4), 3]))
    x, a = np.ones((5, 3), "f4"), np.ones((5, 5), "f4")
    calls = [(block, (x, a)), (block, (x[None], a)), (fastblock.Stack([block]), (x, a))]
    best = [float("inf")] * 3
    for _ in range(300):
        for i, (function, args) in enumerate(calls):
            best[i] = min(best[i], timeit.timeit(lambda: function(*args), number=300))  # noqa: B023 (called in this round)
    assert max(best) < 2 * best[0]


def test_stack_against_the_reference(dtype, same_bytes):
    x, weights = inputs(dtype)
    stack = make_stack(dtype)
    by_reference = {"given": x, "own": x}
    for seed in range(3):
        parameters = make_parameters(dtype, seed=seed)
        feed_forward = {name: parameters[name] for name in ("w1", "b1", "w2", "b2")}
        by_reference["given"] = reference.block(by_reference["given"], **feed_forward, weights=weights)
        by_reference["own"] = reference.block(by_reference["own"], **parameters)
    same_bytes(stack(x, weights), by_reference["given"])
    same_bytes(stack(x), by_reference["own"])


def test_stack_allocates_two_arrays_at_most():
    """Blocks take turns with two buffers, however many there are."""
    x = np.ones((7, 2000, 5), "f4")
    weights = np.eye(2000, dtype="f4")
    stack = make_stack(count=6)
    tracemalloc.start()  # NumPy tells it what arrays take
    try:
        stack(x, weights)
        assert 2 * x.nbytes <= tracemalloc.get_traced_memory()[1] < 2.5 * x.nbytes
    finally:
        tracemalloc.stop()


def test_stack_whose_weights_bring_more_leading_dimensions(dtype, same_bytes):
    x, shared = inputs(dtype)
    batched = np.stack([shared, shared[::-1]])
    stack = make_stack(dtype, count=5)
    for mixed in (
        [shared, None, None, batched, shared],
        [None, None, batched[:1], batched, None],
        [shared] * 4 + [batched],
    ):
        expected = x[0]
        for block, weights in zip(stack, mixed, strict=True):
            expected = block(expected, weights)
        same_bytes(stack(x[0], mixed), expected)


# ---- blocks that override __call__


class Override(fastblock.Block):
    """Returns what `answer` makes of its arguments and of the result."""

    answer = None

    def __call__(self, x, weights=None, **rule):
        return self.answer(x, lambda: super(Override, self).__call__(x, weights, **rule))


def make_mixed_stack(answer, where, count):
    """A stack with an Override at one place, and what the blocks give without it."""
    blocks = list(make_stack(count=count))
    blocks[where] = Override(**make_parameters("f4", seed=where))
    blocks[where].answer = answer
    return fastblock.Stack(blocks)


@pytest.mark.parametrize("count", range(1, 6))
def test_stack_writes_nothing_that_a_subclass_shares(count, same_bytes):
    """What it returns may be its input, an array that it keeps, or a view of either; what it was given it may keep."""
    x, weights = inputs("f4")
    constant = np.full_like(x, 3)
    kept = []

    def keep(x, result):
        kept.append((x, x.copy()))
        kept.append((result := result(), result.copy()))
        return result

    answers = {
        "its input": (lambda x, result: x, lambda x, block: x),
        "a view of its input": (lambda x, result: x[::-1], lambda x, block: x[::-1]),
        "an array of its own": (lambda x, result: constant, lambda x, block: constant),
        "a result that it keeps": (keep, lambda x, block: block(x, weights)),
    }
    for name, (answer, meaning) in answers.items():
        for where in range(count):
            stack = make_mixed_stack(answer, where, count)
            plain = list(make_stack(count=count))
            expected = x
            for index, block in enumerate(plain):
                expected = meaning(expected, block) if index == where else block(expected, weights)
            expected = expected.copy()
            for out in (None, np.empty_like(x)):
                given = x.copy()
                result = stack(given, weights, out=out)
                same_bytes(result, expected, f"{name}, block {where} of {count}")
                assert out is None or result is out
                same_bytes(given, x, f"{name}: the caller's x")
                same_bytes(constant, np.full_like(x, 3), f"{name}: the block's own array")
                for array, copied in kept:
                    if array is not out:
                        same_bytes(array, copied, "what it has kept")
                kept.clear()


def test_stack_checks_what_a_subclass_returns():
    x, weights = inputs("f4")
    for where in range(3):
        for value, got in [(None, "NoneType"), (x.tolist(), "list"), (x.astype("f2"), "float16")]:
            stack = make_mixed_stack(lambda x, result: value, where, 3)
            out = np.full_like(x, 7)
            for given in (None, out):
                expected = rf"^the result of blocks\[{where}\]: expected .*, got {got}"
                with pytest.raises(TypeError, match=expected) as caught:
                    stack(x, weights, out=given)
                assert caught.value.__notes__ == [f"in block {where} of the stack"]
    stack = make_mixed_stack(lambda x, result: x[:1], 2, 3)
    with pytest.raises(ValueError, match=r"^out: expected shape \(1, 7, 5\), got \(2, 7, 5\)(\n|$)"):
        stack(x, weights, out=out)
    assert (out == 7).all()


def test_stack_is_a_sequence(same_bytes):
    stack = make_stack()
    assert len(stack) == 3
    assert list(stack) == [stack[0], stack[1], stack[2]]
    assert stack[-1] is stack[2] and stack.index(stack[1]) == 1 and stack[0] in stack
    assert isinstance(stack[1:], fastblock.Stack) and list(stack[1:]) == [stack[1], stack[2]]
    assert (stack.dtype, stack.features) == (np.dtype("f4"), 5)
    with pytest.raises(IndexError):
        stack[3]
    with pytest.raises(ValueError, match="at least one block"):
        stack[3:]
    with pytest.raises(TypeError):
        stack[0] = stack[1]


def test_stack_refuses_what_does_not_fit():
    block = make_stack()[0]
    with pytest.raises(ValueError, match="^blocks: expected at least one block, got none$"):
        fastblock.Stack([])
    with pytest.raises(TypeError, match=r"^blocks\[1\]: expected a Block, got function$"):
        fastblock.Stack([block, make_stack])
    for wrong in (block, 1, None):
        with pytest.raises(TypeError, match=f"^blocks: expected an iterable of Block, got {type(wrong).__name__}$"):
            fastblock.Stack(wrong)

    def broken():
        yield block
        raise TypeError("in the caller's generator")

    with pytest.raises(TypeError, match="^in the caller's generator$"):
        fastblock.Stack(broken())
    with pytest.raises(TypeError, match=r"^blocks\[1\]: expected dtype float32 \(as blocks\[0\]\), got float64$"):
        fastblock.Stack([block, make_stack("f8")[0]])
    other = fastblock.Block(np.ones((9, 4), "f4"), None, np.ones((4, 9), "f4"), None)
    with pytest.raises(ValueError, match=r"^blocks\[2\]: expected features 5 \(as blocks\[0\]\), got 4$"):
        fastblock.Stack([block, block, other])

    x, weights = inputs("f4")
    stack = make_stack()
    for wrong in ([], [weights], [weights] * 4, ()):
        with pytest.raises(ValueError, match=f"^weights: expected one for each of the 3 blocks, got {len(wrong)}$"):
            stack(x, wrong)
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match="weights: expected shape .*") as caught:
        stack(x, [weights, weights[:, :6], weights], out=out)
    assert caught.value.__notes__ == ["in block 1 of the stack"]
    assert (out == 7).all()
