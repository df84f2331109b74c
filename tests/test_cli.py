"""The command line, as a person meets it: processes, files, exit statuses, and what is on the screen."""

import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastblock
from fastblock import __main__ as cli
from fastblock import reference, walkthrough

COMMAND = [sys.executable, "-W", "error", "-m", "fastblock"]


def command(*arguments, cwd, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, **options
    )


# ---- the worked example


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    result = command(cwd=tmp_path_factory.mktemp("walkthrough"))
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def panels(text):
    """The matrices of one step, as printed: those with a row for each position in order, and the parameters | bias."""
    by_position, parameters = {}, []
    for line in text.splitlines():
        rows = re.findall(r"\b([Xhy])\d \[ ([^]]*) \]", line)
        for column, (_, numbers) in enumerate(row for row in rows if row[0] == "X"):
            by_position.setdefault(column, []).append([int(number) for number in numbers.split()])
        parameters += [[int(number) for number in row.replace("|", "").split()] for label, row in rows if label != "X"]
    return [np.array(rows) for rows in by_position.values()], np.array(parameters)


def test_walkthrough_can_be_checked_by_hand(shown):
    """Every number on the screen follows from those before it, with integers and no code of ours."""
    sections = re.split(r"^BLOCK \d+$", shown.split("\nTIME")[0], flags=re.MULTILINE)[1:]
    assert len(sections) == 2
    handed_on, seen = None, []
    for section in sections:
        steps = re.split(r"^(\d)\. ", section, flags=re.MULTILINE)[1:]
        assert steps[::2] == list("123456")
        steps = [panels(step) for step in steps[1::2]]

        ([x], _), ([a], _) = steps[:2]
        assert x.shape == (5, 3)
        assert (a == np.eye(5) + np.eye(5, k=1)).all()  # X1 := X1 + X2, X2 := X2 + X3, ..., X5 := X5
        if handed_on is not None:
            assert (x == handed_on).all()

        [a_again, x_again, z], _ = steps[2]
        assert (a_again == a).all() and (x_again == x).all()
        assert (z[:-1] == x[:-1] + x[1:]).all() and (z[-1] == x[-1]).all()

        [z_again, before], w1_b1 = steps[3]
        assert w1_b1.shape == (4, 4) and (z_again == z).all()
        assert (before == z @ w1_b1[:, :3].T + w1_b1[:, 3]).all()
        assert (before < 0).any() and (before > 0).any()

        [before_again, after], _ = steps[4]
        assert (before_again == before).all() and (after == np.maximum(before, 0)).all()

        [after_again, y], w2_b2 = steps[5]
        assert w2_b2.shape == (3, 5) and (after_again == after).all()
        assert (y == after @ w2_b2[:, :4].T + w2_b2[:, 4]).all()

        parameters = [w1_b1[:, :3], w1_b1[:, 3], w2_b2[:, :4], w2_b2[:, 4]]
        definition = reference.block(*(array.astype("f4") for array in (x, *parameters, a)))
        assert (y == definition).all()
        seen.append(parameters)
        handed_on = y
    assert all((one != other).any() for one, other in zip(*seen))  # completely separate parameters


def test_walkthrough_spells_sums_out_right(shown):
    sums = re.findall(r": ([^:=]+) = (-?\d+)$", shown, flags=re.MULTILINE)
    assert len(sums) == 6
    for terms, result in sums:
        assert re.fullmatch(r"[-\d ()+*]+", terms) and eval(terms) == int(result)


def test_walkthrough_compares_and_times(shown):
    assert shown.count("C result equals the reference bit for bit: yes (60 bytes compared)\n") == 2
    rows = re.findall(
        r"^ +(\d+ x \d+ -> \d+) +([\d.]+) ([um]s) +([\d.]+) ([um]s) +([\d.]+) +(\d+) +yes \(\d+ bytes", shown, re.M
    )
    assert [row[0] for row in rows] == ["5 x 3 -> 4", "128 x 768 -> 3072"]
    for _, ours, our_unit, numpys, numpys_unit, ratio, _rounds in rows:
        scale = {"us": 1e-6, "ms": 1e-3}
        computed = float(numpys) * scale[numpys_unit] / (float(ours) * scale[our_unit])
        assert abs(computed - float(ratio)) <= 0.03 * computed + 0.01
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("wrong", ["values", "dtype"])
def test_walkthrough_says_when_a_result_differs(wrong, monkeypatch, capsys):
    define = reference.block

    def other(*args, **kwargs):
        y = define(*args, **kwargs)
        return np.nextafter(y, np.float32(9)) if wrong == "values" else y.astype("f8")

    monkeypatch.setattr(reference, "block", other)
    monkeypatch.setattr(walkthrough, "_show_timings", lambda: True)
    assert cli.main([]) == 1
    assert capsys.readouterr().out.count("bit for bit: NO (") == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_early(unbuffered, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written: nothing depends on when
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(COMMAND, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


# ---- config and help


def test_config(tmp_path):
    result = command("config", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    facts = dict(re.split(" {2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    expected = fastblock.show_config(mode="dicts")
    assert [*facts] == [*expected]
    assert facts["version"] == fastblock.__version__
    assert facts["arithmetic"] == fastblock.ARITHMETIC == "chain256-v1"
    assert facts["isas_usable"].split() == list(fastblock.isas())
    assert facts["isa"] in facts["isas_usable"] and facts["isa"] in facts["isas_compiled"]
    assert facts["cpu"] and facts["compiler"] and int(facts["threads"]) >= 1


def test_config_with_a_chosen_tier(tmp_path):
    for isa in fastblock.isas():
        result = command("config", cwd=tmp_path, env=os.environ | {"FASTBLOCK_ISA": isa})
        assert re.search(rf"^isa +{isa}$", result.stdout, re.MULTILINE), result


def test_help_and_usage(tmp_path):
    for arguments, words in [
        (["-h"], ["run", "config", "worked example"]),
        (["run", "-h"], ["PARAMS.npz", "INPUT.npy", "OUTPUT.npy", "--weights", "--causal"]),
        (["config", "-h"], ["on this machine"]),
    ]:
        result = command(*arguments, cwd=tmp_path)
        assert result.returncode == 0
        assert all(word in " ".join(result.stdout.split()) for word in words)
    assert command("--version", cwd=tmp_path).stdout == f"fastblock {fastblock.__version__}\n"
    for arguments in (["walk"], ["run"], ["run", "a", "b"], ["--causal"], ["config", "x"]):
        result = command(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and "usage: fastblock" in result.stderr


# ---- streams, signals, environment: before and while the package is imported, too

SCRIPT = [sys.executable, "-W", "error", str(Path(sysconfig.get_path("scripts")) / "fastblock")]


@pytest.mark.parametrize("how", [COMMAND, SCRIPT], ids=["-m", "script"])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("FASTBLOCK_ISA", "no-such-tier", "expected one of .*portable.*, got 'no-such-tier'"),
        ("FASTBLOCK_NUM_THREADS", "two", "expected a number of threads, at least 1, got 'two'"),
    ],
)
def test_a_fault_of_the_environment_is_a_sentence(name, value, sentence, how, tmp_path):
    for arguments in (["config"], [], ["run", "a", "b", "-o", "c"]):
        result = subprocess.run(
            [*how, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ | {name: value}
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(f"fastblock: {name}: {sentence}.*\n", result.stderr), result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [COMMAND, SCRIPT], ids=["-m", "script"])
@pytest.mark.parametrize(
    "module", ["numpy", "numpy.linalg", "fastblock._core", "fastblock.layers", "argparse", "fastblock.__main__"]
)
def test_an_interrupt_while_modules_are_imported(module, how, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"""if True:
        import os, signal, sys
        class Finder:
            def find_spec(name, *_):
                if name == {module!r}:
                    os.write(1, b"interrupted")
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder)
        """)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([*how, "config"], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (130, "interrupted", "")


@pytest.mark.parametrize(
    "arguments", [["-m", "other"], ["-mother"], ["-m", "other", "-m", "fastblock"], ["-m", "other.fastblock"]]
)
@pytest.mark.parametrize("isa", ["", "no-such-tier"])
def test_the_faults_of_other_programs_are_theirs(isa, arguments, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import fastblock\nraise ValueError('theirs')\n")
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | ({"FASTBLOCK_ISA": isa} if isa else {}),
    )
    assert (result.returncode, result.stdout) == (1, "") and "Traceback" in result.stderr
    assert ("FASTBLOCK_ISA" if isa else "ValueError: theirs") in result.stderr.splitlines()[-1]


def test_a_fault_of_our_own_is_no_difference(monkeypatch, capfd):
    def fail():
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr(cli, "show_config", fail)
    assert cli.main(["config"]) == 3
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("Traceback") and err.endswith("ZeroDivisionError: of our own\n")


def test_a_failure_of_the_timings_is_no_difference(monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert cli.main([]) == 3
    assert "the process that takes the times ended with status 1" in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("stderr", ["", "closed", "full", "left"])
@pytest.mark.parametrize("stdout", ["", "closed", "full", "left"])
def test_standard_streams_that_take_nothing(stdout, stderr, unbuffered, files):
    make_bad_inputs(files)
    expected = fastblock.Block.load(files / "block.npz")(np.load(files / "x.npy")).tobytes()
    printing = {"": 0, "closed": 2, "full": 2, "left": 141}[stdout]
    helping = printing if stdout != "closed" else 0  # on stderr then
    for arguments, wanted in [
        ("run block.npz x.npy -o y.npy", 0),
        ("run block.npz wrong-features.npy -o there.npy", 2),
        ("run block.npz", 2),
        ("config", printing),
        ("--help", helping),
        ("--version", helping),
    ]:
        out, err = Stream(stdout, files / "stdout"), Stream(stderr, files / "stderr")
        status = subprocess.run(
            [*COMMAND, *arguments.split()],
            cwd=files, stdout=out.fd, stderr=err.fd, timeout=60, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            preexec_fn=lambda: [os.close(n) for n, stream in ((1, out), (2, err)) if stream.kind == "closed"],
        ).returncode  # fmt: skip
        said = err.close()
        out.close()
        assert status == wanted, (arguments, status, said)
        assert b"Traceback" not in said and b"Exception ignored" not in said, said
        if not stderr and status == 2 and arguments != "run block.npz":
            assert said.startswith(b"fastblock: ") and said.count(b"\n") == 1, said
        if arguments.endswith("y.npy") and status == 0 and "wrong" not in arguments:
            assert (files / "y.npy").read_bytes()[-len(expected) :] == expected
            (files / "y.npy").unlink()
    assert (files / "there.npy").read_bytes() == b"an output of yesterday"


class Stream:
    """A standard stream for a process: a file, nothing, a full device, or a pipe that nobody reads."""

    def __init__(self, kind, path):
        self.kind, self.path = kind, path
        if kind == "left":
            reader, self.fd = os.pipe()
            os.close(reader)
        else:
            self.fd = os.open("/dev/full" if kind == "full" else path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def close(self):
        """What the process has written, if that can be seen."""
        os.close(self.fd)
        return self.path.read_bytes() if self.kind in ("", "closed") else b""


# ---- run


SHAPES = {"w1": (8, 3), "b1": (8,), "w2": (3, 8), "b2": (3,), "w_q": (2, 3), "w_k": (2, 3)}


def make_block(dtype="f4", shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return fastblock.Block(**{name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()})


@pytest.fixture
def files(tmp_path):
    """A directory with a block, a stack, inputs and an output that is there already."""
    rng = np.random.default_rng(7)
    block = make_block()
    block.save(tmp_path / "block.npz")
    fastblock.Stack([block, make_block(seed=1)]).save(tmp_path / "stack.npz")
    make_block(shapes={name: SHAPES[name] for name in ("w1", "b1", "w2", "b2")}).save(tmp_path / "plain.npz")
    np.save(tmp_path / "x.npy", rng.standard_normal((4, 5, 3)).astype("f4"))
    np.save(tmp_path / "A.npy", rng.standard_normal((5, 5)).astype("f4"))
    (tmp_path / "there.npy").write_bytes(b"an output of yesterday")
    return tmp_path


def run_in_process(directory, monkeypatch, *arguments):
    monkeypatch.chdir(directory)
    return cli.main(["run", *map(str, arguments)])


@pytest.mark.parametrize("model", ["block", "stack"])
def test_run(model, files, same_bytes):
    loaded = fastblock.layers.load(files / f"{model}.npz")
    x, weights = np.load(files / "x.npy"), np.load(files / "A.npy")
    for arguments, expected in [
        ([], loaded(x)),
        (["--causal"], loaded(x, causal=True)),
        (["--weights", "A.npy"], loaded(x, weights)),
    ]:
        result = command("run", f"{model}.npz", "x.npy", "-o", "there.npy", *arguments, cwd=files)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        same_bytes(np.load(files / "there.npy"), expected, f"{model} {arguments}")


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("positions", [5, 1, 0])
def test_run_any_shape(lead, positions, files, monkeypatch, same_bytes, dtype):
    rng = np.random.default_rng(1)
    block = make_block(dtype)
    block.save(files / "block.npz")
    x = rng.standard_normal((*lead, positions, 3)).astype(dtype)
    for order in "CF":
        np.save(files / "x.npy", np.array(x, order=order))
        for shape in dict.fromkeys([(positions, positions), (*lead, positions, positions)]):
            weights = rng.standard_normal(shape).astype(dtype)
            np.save(files / "A.npy", np.array(weights, order=order))
            assert run_in_process(files, monkeypatch, "block.npz", "x.npy", "-o", "y.npy", "--weights", "A.npy") == 0
            same_bytes(np.load(files / "y.npy"), block(x, weights))
        assert run_in_process(files, monkeypatch, "block.npz", "x.npy", "-o", "y.npy") == 0
        same_bytes(np.load(files / "y.npy"), block(x))


@pytest.mark.parametrize("index", ["00", "+0", " 0", "0 ", "0_0", "\u0660", "-0", "\u00b2", "x", ""])
def test_a_stack_has_one_name_for_each_array(index, files, monkeypatch, capfd):
    with np.load(files / "stack.npz") as archive:
        arrays = dict(archive)
    bias = arrays.pop("0.b1")
    with open(files / "odd.npz", "wb") as file:
        np.savez(file, **arrays, **{f"{index}.b1": bias})
    with pytest.raises(ValueError, match="expected the index of a block in the name of each array, got "):
        fastblock.Stack.load(files / "odd.npz")
    assert run_in_process(files, monkeypatch, "odd.npz", "x.npy", "-o", "there.npy") == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("model", ["block", "stack"])
def test_two_arrays_of_one_name_are_refused(model, files):
    path = files / f"{model}.npz"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, data in members.items():
        for second in (name, name.removesuffix(".npy")):  # NumPy takes both for one array
            path.write_bytes(whole)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile sees the fault, too
                with zipfile.ZipFile(path, "a") as archive:
                    archive.writestr(second, data)
            with pytest.raises(ValueError, match="two arrays have one name"):
                fastblock.layers.load(path)


@pytest.mark.parametrize("as_path", [os.fsencode, os.fsdecode, lambda path: path], ids=["bytes", "str", "PathLike"])
@pytest.mark.parametrize("model", ["block", "stack"])
def test_any_path_does_for_save_and_load(model, as_path, files):
    loaded = fastblock.layers.load(as_path(files / f"{model}.npz"))
    loaded.save(as_path(files / "saved.npz"))
    assert (files / "saved.npz").read_bytes() == (files / f"{model}.npz").read_bytes()
    with pytest.raises(ValueError, match=r"^" + re.escape(f"{files}/x.npy: expected a file of parameters")):
        type(loaded).load(as_path(files / "x.npy"))


def test_messages_have_one_line(files, monkeypatch, capfd):
    whole = (files / "x.npy").read_bytes()
    header = (b"{'descr': '<f4',\n 'fortran_order': 0,\n 'shape': (4, 5, 3), \n" + b" " * 118)[:117] + b"\n"
    (files / "lines.npy").write_bytes(whole[:10] + header + whole[128:])
    with open(files / "format.npz", "wb") as file:
        np.savez(file, fastblock_format="two\nlines", w1=np.eye(3))
    with open(files / "matrix.npz", "wb") as file:
        np.savez(file, fastblock_format=np.eye(3), w1=np.eye(3))
    for arguments in (
        ["block.npz", "lines.npy"],
        ["format.npz", "x.npy"],
        ["matrix.npz", "x.npy"],
        ["block.npz", "two\nlines.npy"],
    ):
        assert run_in_process(files, monkeypatch, *arguments, "-o", "there.npy") == 2
        err = capfd.readouterr().err
        assert err.startswith("fastblock: ") and err.count("\n") == 1, err
    for name in ("format.npz", "matrix.npz"):
        with pytest.raises(ValueError) as caught:
            fastblock.layers.load(files / name)
        assert "\n" not in str(caught.value)


def test_run_over_its_own_input(files, monkeypatch, same_bytes):
    expected = fastblock.Block.load(files / "block.npz")(np.load(files / "x.npy"))
    assert run_in_process(files, monkeypatch, "block.npz", "x.npy", "-o", "x.npy") == 0
    same_bytes(np.load(files / "x.npy"), expected)


class WouldRun:
    """Unpickling this would leave a trace: nothing the command line reads may be unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def make_bad_inputs(directory):
    """Files by name; the name says what is wrong with them."""
    good = np.load(directory / "x.npy")
    for name, array in {
        "wrong-features": good[..., :2],
        "one-dimension": good[0, 0],
        "no-dimension": good[0, 0, 0],
        "float64": good.astype("f8"),
        "float16": good.astype("f2"),
        "integers": good.astype("i4"),
        "big-endian": good.astype(">f4"),
        "text-array": good.astype("U8"),
        "record": np.zeros((5, 3), "f4,f4"),
        "batch-of-three": np.zeros((3, 5, 5), "f4"),
        "not-square": np.zeros((5, 4), "f4"),
        "six-by-six": np.zeros((6, 6), "f4"),
    }.items():
        np.save(directory / f"{name}.npy", array)
    np.save(directory / "objects.npy", np.array([[WouldRun()]]), allow_pickle=True)
    np.savez(directory / "archive.npz", x=good)
    (directory / "empty.npy").write_bytes(b"")
    (directory / "text.npy").write_text("1 2 3\n4 5 6\n")
    (directory / "pickle.npy").write_bytes(pickle.dumps(WouldRun()))
    whole = (directory / "x.npy").read_bytes()
    (directory / "cut.npy").write_bytes(whole[:-1])
    (directory / "cut-header.npy").write_bytes(whole[:40])
    (directory / "odd-header.npy").write_bytes(whole[:10] + whole[10:].replace(b"descr", b"d\xffscr"))
    (directory / "huge-shape.npy").write_bytes(whole.replace(b"(4, 5, 3)", b"(9999999999999999999999, 5, 3)"))


BAD_INPUTS = [
    ("block.npz missing.npy", "missing.npy: No such file or directory"),
    ("block.npz .", ".: Is a directory"),
    ("block.npz wrong-features.npy", "wrong-features.npy: expected shape (..., positions, 3), got (4, 5, 2)"),
    ("block.npz one-dimension.npy", "one-dimension.npy: expected shape (..., positions, 3), got (3,)"),
    ("block.npz no-dimension.npy", "no-dimension.npy: expected shape (..., positions, 3), got ()"),
    ("block.npz float64.npy", "float64.npy: expected dtype float32 (as the parameters), got float64"),
    ("block.npz float16.npy", "float16.npy: expected dtype float32 (as the parameters), got float16"),
    ("block.npz integers.npy", "integers.npy: expected dtype float32 (as the parameters), got int32"),
    ("block.npz big-endian.npy", "big-endian.npy: expected dtype float32 (as the parameters), got >f4"),
    ("block.npz text-array.npy", "text-array.npy: expected dtype float32 (as the parameters), got <U8"),
    ("block.npz record.npy", "record.npy: expected dtype float32 (as the parameters), got "),
    ("block.npz objects.npy", "objects.npy: expected an array saved as .npy, got one that cannot be read"),
    ("block.npz archive.npz", "archive.npz: expected an array saved as .npy, got an .npz archive"),
    ("block.npz empty.npy", "empty.npy: expected an array saved as .npy, got something else"),
    ("block.npz text.npy", "text.npy: expected an array saved as .npy, got something else"),
    ("block.npz pickle.npy", "pickle.npy: expected an array saved as .npy, got something else"),
    ("block.npz cut.npy", "cut.npy: expected an array saved as .npy, got one that cannot be read"),
    ("block.npz cut-header.npy", "cut-header.npy: expected an array saved as .npy, got one that cannot be read"),
    ("block.npz odd-header.npy", "odd-header.npy: expected an array saved as .npy, got one that cannot be read"),
    ("block.npz huge-shape.npy", "huge-shape.npy: expected an array saved as .npy, got one that cannot be read"),
    ("block.npz x.npy --weights missing.npy", "missing.npy: No such file or directory"),
    ("block.npz x.npy --weights text.npy", "text.npy: expected an array saved as .npy, got something else"),
    ("block.npz x.npy --weights not-square.npy", "not-square.npy: expected shape (5, 5) or (4, 5, 5), got (5, 4)"),
    ("block.npz x.npy --weights six-by-six.npy", "six-by-six.npy: expected shape (5, 5) or (4, 5, 5), got (6, 6)"),
    (
        "block.npz x.npy --weights batch-of-three.npy",
        "batch-of-three.npy: expected shape (5, 5) or (4, 5, 5), got (3, 5, 5)",
    ),
    ("block.npz x.npy --weights float64.npy", "float64.npy: expected shape (5, 5) or (4, 5, 5), got (4, 5, 3)"),
    ("block.npz x.npy --weights A.npy --causal", "causal"),
    ("plain.npz x.npy", "weights"),
    ("missing.npz x.npy", "missing.npz: No such file or directory"),
    ("archive.npz x.npy", "archive.npz: expected a file of parameters"),
    ("x.npy x.npy", "x.npy: expected a file of parameters"),
    ("text.npy x.npy", "text.npy: expected a file of parameters"),
    ("pickle.npy x.npy", "pickle.npy: expected a file of parameters"),
]


def test_run_bad_input(files, monkeypatch, capfd):
    """In this process, which is fast; the next test shows that a process of its own says the same."""
    make_bad_inputs(files)
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    for arguments, sentence in BAD_INPUTS:
        for output in ("there.npy", "new.npy"):
            assert run_in_process(files, monkeypatch, *arguments.split(), "-o", output) == 2, arguments
            out, err = capfd.readouterr()
            assert out == "" and err.startswith("fastblock: ") and err.count("\n") == 1, (arguments, err)
            assert sentence in err, arguments
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "block.npz wrong-features.npy -o there.npy",
            "wrong-features.npy: expected shape (..., positions, 3), got (4, 5, 2)",
        ),
        ("block.npz missing.npy -o there.npy", "missing.npy: No such file or directory"),
        ("block.npz pickle.npy -o there.npy", "pickle.npy: expected an array saved as .npy, got something else"),
        ("block.npz x.npy -o .", ".: Is a directory"),
        ("block.npz x.npy -o missing/y.npy", "missing/y.npy: No such file or directory"),
        ("block.npz x.npy -o A.npy/y.npy", "A.npy/y.npy: Not a directory"),
        (f"block.npz x.npy -o {os.devnull}", f"{os.devnull}: Not a regular file"),
    ],
)
def test_run_bad_input_in_a_process(arguments, sentence, files):
    make_bad_inputs(files)
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    result = command("run", *arguments.split(), cwd=files)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"fastblock: {sentence}\n")
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind the administrator")
def test_run_into_a_directory_without_permission(files):
    (files / "closed").mkdir(mode=0o500)
    result = command("run", "block.npz", "x.npy", "-o", "closed/y.npy", cwd=files)
    assert (result.returncode, result.stderr) == (2, "fastblock: closed/y.npy: Permission denied\n")


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_run_onto_a_full_disk(files):
    import resource

    np.save(files / "x.npy", np.zeros((1000, 5, 3), "f4"))
    before = sorted(os.listdir(files))
    result = command(
        *["run", "block.npz", "x.npy", "-o", "there.npy"],
        cwd=files,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert (result.returncode, result.stderr) == (2, "fastblock: there.npy: File too large\n")
    assert (files / "there.npy").read_bytes() == b"an output of yesterday"
    assert sorted(os.listdir(files)) == before


class StandIn:
    """A model that does something else first."""

    features, dtype = 3, np.dtype("f4")

    def __init__(self, first):
        self.first = first

    def __call__(self, x, weights=None, causal=False):
        self.first()
        return np.array(x)


@pytest.mark.parametrize(("failure", "status"), [(KeyboardInterrupt(), 130), (MemoryError("too much"), 2)])
def test_run_interrupted_half_way(failure, status, files, monkeypatch, capfd):
    calls = []

    def fail_at_the_second_call():
        calls.append(1)
        if len(calls) == 2:
            assert [name for name in os.listdir(files) if name.endswith(".tmp")]
            raise failure

    monkeypatch.setattr(cli, "load", lambda path: StandIn(fail_at_the_second_call))
    before = sorted(os.listdir(files))
    assert run_in_process(files, monkeypatch, "block.npz", "x.npy", "-o", "there.npy") == status
    assert len(calls) == 2
    assert (files / "there.npy").read_bytes() == b"an output of yesterday"
    assert sorted(os.listdir(files)) == before
    assert capfd.readouterr().err.count("\n") == (status == 2)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_leaves_nothing_behind(name, files):
    program = """if True:
        import sys, time
        import numpy as np
        from fastblock import __main__ as cli
        class Model:
            features, dtype = 3, np.dtype("f4")
            def __call__(self, *args, **kwargs):
                print("running", flush=True)
                time.sleep(100)
        cli.load = lambda path: Model()
        sys.exit(cli.main(["run", "block.npz", "x.npy", "-o", "there.npy"]))
        """
    before = sorted(os.listdir(files))
    with subprocess.Popen([sys.executable, "-c", program], cwd=files, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"running\n"
        assert sorted(os.listdir(files)) != before
        process.send_signal(getattr(signal, name))
    assert process.returncode == -getattr(signal, name)
    assert sorted(os.listdir(files)) == before
    assert (files / "there.npy").read_bytes() == b"an output of yesterday"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_the_mode_of_an_output(umask, files):
    for name, mode in [("there.npy", 0o600), ("there.npy", 0o666), ("there.npy", 0o640), ("new.npy", 0o666 & ~umask)]:
        if name == "there.npy":
            (files / name).chmod(mode)
        assert command("run", "block.npz", "x.npy", "-o", name, cwd=files, umask=umask).returncode == 0
        assert stat.S_IMODE((files / name).stat().st_mode) == mode, name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("block.npz x.npy -o new/", "new/: Is a directory"),
        ("block.npz x.npy -o new/.", "new/.: Is a directory"),
        ("block.npz x.npy -o there.npy/", "there.npy/: Is a directory"),
        ("block.npz x.npy -o -", "-: expected the name of a file; standard streams are not"),
        ("block.npz - -o there.npy", "-: expected the name of a file; standard streams are not"),
        ("block.npz x.npy -o pipe", "pipe: Not a regular file"),
        ("block.npz x.npy -o /dev/stdout", "/dev/stdout: Not a regular file"),
        ("block.npz /dev/stdin -o there.npy", "/dev/stdin: expected a regular file, which can be read at any"),
        ("block.npz pipe -o there.npy", "pipe: expected a regular file, which can be read at any"),
        ("block.npz x.npy --weights pipe -o there.npy", "pipe: expected a regular file, which can be read at any"),
        ("pipe x.npy -o there.npy", "pipe: expected a regular file, which can be read at any"),
    ],
)
def test_streams_and_names_of_directories_are_refused(arguments, sentence, files):
    os.mkfifo(files / "pipe")
    before = sorted(os.listdir(files))
    result = command("run", *arguments.split(), cwd=files, input="")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"fastblock: {sentence}") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(os.listdir(files)) == before


@pytest.mark.parametrize("terminal", [True, False])
def test_run_shows_progress_after_a_second(terminal, files, monkeypatch, capfd, same_bytes):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(cli, "load", lambda path: StandIn(lambda: time.sleep(0.3)))
    assert run_in_process(files, monkeypatch, "block.npz", "x.npy", "-o", "there.npy") == 0
    err = capfd.readouterr().err
    if not terminal:
        assert err == ""
        return
    assert err.endswith("\r[########################################] 4 of 4, 1 s\n")
    assert "1 of 4" not in err  # not before there is something to wait for
    same_bytes(np.load(files / "there.npy"), np.load(files / "x.npy"))


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("lead", [(256,), (2, 4, 32)], ids=str)
def test_run_holds_a_part_of_the_batch_only(lead, order, files, monkeypatch, same_bytes):
    """Of x and weights, 16 MB each; peaks below three parts: what is read of each, and the result."""
    rng = np.random.default_rng(5)
    block = make_block(shapes={"w1": (8, 128), "b1": (8,), "w2": (128, 8), "b2": (128,)})
    block.save(files / "wide.npz")
    x, weights = (rng.random((*lead, 128, 128), np.float32) for _ in range(2))
    np.save(files / "x.npy", np.array(x, order=order))
    np.save(files / "A.npy", np.array(weights, order=order))
    monkeypatch.setattr(cli, "PART_BYTES", 2**20)
    tracemalloc.start()
    try:
        assert run_in_process(files, monkeypatch, "wide.npz", "x.npy", "--weights", "A.npy", "-o", "y.npy") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**20, peak
    same_bytes(np.load(files / "y.npy"), block(x, weights))


def test_run_splits_a_batch_without_changing_a_bit(files, monkeypatch, same_bytes):
    x = np.random.default_rng(3).standard_normal((100, 5, 3)).astype("f4")
    np.save(files / "x.npy", x)
    sizes = []
    block = fastblock.Block.load(files / "block.npz")

    class Watched(StandIn):
        def __call__(self, x, weights=None, causal=False):
            sizes.append(len(x))
            return block(x, weights, causal=causal)

    monkeypatch.setattr(cli, "load", lambda path: Watched(None))
    assert run_in_process(files, monkeypatch, "block.npz", "x.npy", "-o", "y.npy") == 0
    assert sum(sizes) == 100 and len(sizes) > 1
    same_bytes(np.load(files / "y.npy"), block(x))
