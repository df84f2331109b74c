"""The type annotations: a program that uses all of the public interface is clean under mypy --strict, wrong programs
are found out, and the stub of the core says what the core is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastblock

pytest.importorskip("mypy", reason="needs mypy")

PROGRAM = """
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import fastblock
import fastblock.layers
from fastblock import Block, Stack, reference

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def ones(*shape: int) -> F32:
    return np.ones(shape, np.float32)


x, weights, bias, w = ones(2, 5, 3), ones(5, 5), ones(3), ones(3, 3)
double: F64 = np.ones((5, 3))
mask: NDArray[np.bool_] = np.arange(5) < 4
out = np.empty_like(x)

# functions
assert_type(fastblock.mix_positions(weights, x, out=out), F32)
assert_type(fastblock.mix_positions(np.ones((5, 5)), double), F64)
assert_type(fastblock.bias_relu(x, bias, out=out), F32)
assert_type(fastblock.up_project(x, w), F32)
assert_type(fastblock.up_project(x, w, bias, out=out), F32)
assert_type(fastblock.down_project(h=x, w2=w, b2=None), F32)
assert_type(fastblock.feed_forward(x, w, None, w, bias, out=out), F32)
assert_type(fastblock.attention_weights(x, w, w, causal=True, key_mask=mask), F32)

# Block
block = Block(w, None, w, bias, w_q=w, w_k=w, b_q=bias, b_k=None)
assert_type(block(x), F32)
assert_type(block(x, weights, out=out), F32)
assert_type(block(x, causal=np.bool_(True), key_mask=mask), F32)
assert_type(block.feed_forward(x, out=out), F32)
assert_type(block.up_project(x), F32)
assert_type(block.down_project(x), F32)
assert_type(block.w1, NDArray[Any])
assert_type(block.w2, NDArray[Any])
for parameter in (block.b1, block.b2, block.w_q, block.w_k, block.b_q, block.b_k):
    assert_type(parameter, NDArray[Any] | None)
assert_type(block.dtype, np.dtype[np.float32] | np.dtype[np.float64])
assert_type(block.features + block.hidden, int)
assert_type(block.head_width, int | None)
block.save("block.npz")
assert_type(Block.load("block.npz"), Block)


class Named(Block):
    def __init__(self, name: str, **parameters: Any) -> None:
        super().__init__(w, None, w, None, **parameters)
        self.name = name


named = Named("first", w_q=w, w_k=w)
assert_type(named(x), F32)

# Stack
stack = Stack([block, named])
assert_type(stack(x, causal=True, key_mask=mask), F32)
assert_type(stack(x, weights, out=out), F32)
assert_type(stack(x, [weights, None]), F32)
assert_type(stack(x, (weights, weights)), F32)
each = [weights, weights]
assert_type(stack(x, each), F32)
assert_type(Stack(one for one in stack)[0], Block)
assert_type(stack[:1], Stack)
assert_type(len(stack) + stack.features + stack.index(block), int)
assert_type(stack.dtype, np.dtype[np.float32] | np.dtype[np.float64])
stack.save("stack.npz")
assert_type(Stack.load("stack.npz"), Stack)
assert_type(fastblock.layers.load("stack.npz"), Block | Stack)

# tiers, threads, configuration
assert_type(fastblock.isas(), list[str])
fastblock.use_isa(fastblock.isa())
fastblock.set_num_threads(fastblock.get_num_threads())
with fastblock.num_threads(np.int64(1)) as inside:
    assert_type(inside, fastblock.num_threads)
fastblock.show_config()
assert_type(fastblock.show_config("dicts"), dict[str, Any])
assert_type(fastblock.ARITHMETIC + fastblock.__version__, str)

# the reference
assert_type(reference.fma(x, x, x), F32)
assert_type(reference.exp(double), F64)
assert_type(reference.chain256(x, x), F32)
assert_type(reference.canonical(x), F32)
assert_type(reference.finish(x, bias), F32)
assert_type(reference.relu(x), F32)
assert_type(reference.mix_positions(weights, x, out=out), F32)
assert_type(reference.bias_relu(x, bias), F32)
assert_type(reference.up_project(x, w, None), F32)
assert_type(reference.down_project(x, w), F32)
assert_type(reference.feed_forward(x, w, None, w, bias), F32)
assert_type(reference.attention_weights(x, w, w, causal=True, key_mask=mask), F32)
assert_type(reference.block(x, w, None, w, None, w_q=w, w_k=w, key_mask=mask, out=out), F32)
"""

# Every ignored error must be there: --strict reports an ignore that nothing needs.
WRONG = """
import numpy as np
import fastblock
from fastblock import Block, Stack, reference

x, w = np.ones((5, 3), np.float32), np.ones((3, 3), np.float32)
double = np.ones((5, 3))
block = Block(w, None, w, None, w_q=w, w_k=w)
stack = Stack([block])
fastblock.mix_positions(np.ones((5, 5)), x)  # type: ignore
fastblock.bias_relu(x)  # type: ignore
fastblock.up_project([[1.0]], w)  # type: ignore
Block(w, None, w)  # type: ignore
Block(w.tolist(), None, "w", None)  # type: ignore
block(x, causal="no")  # type: ignore
block(x, out=double)  # type: ignore
block.features = 4  # type: ignore
Stack(block)  # type: ignore
Stack([1])  # type: ignore
stack(x, 1)  # type: ignore
stack[0] = block  # type: ignore
stack.save(1)  # type: ignore
fastblock.use_isa(1)  # type: ignore
fastblock.show_config("yaml")  # type: ignore
reference.relu("x")  # type: ignore
"""

# The name of a handled exception is gone at run time. The base class of the controller has no types.
ALLOWED = r"""
fastblock\.error
fastblock\._runtime\.FastblockController
"""


def run(module, *arguments, folder):
    """A tool of mypy on the fastblock that is imported here, however it was installed."""
    (folder / "config").write_text("[mypy]\n[mypy-threadpoolctl.*]\nignore_missing_imports = True\n")
    variables = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    home = Path(fastblock.__file__).parent.parent
    if home.name not in ("site-packages", "dist-packages"):
        variables |= {"MYPYPATH": str(home), "PYTHONPATH": str(home)}
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


def check(program, folder):
    (folder / "program.py").write_text(program)
    options = ["--strict", "--follow-imports=silent", "--config-file", "config"]
    result = run("mypy", *options, "program.py", folder=folder)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_program_that_uses_everything(tmp_path, monkeypatch):
    check(PROGRAM, tmp_path)
    monkeypatch.chdir(tmp_path)
    isa, threads = fastblock.isa(), fastblock.get_num_threads()
    exec(compile(PROGRAM, "program.py", "exec"), {"__name__": "program"})  # what it is allowed to do works
    assert (fastblock.isa(), fastblock.get_num_threads()) == (isa, threads)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pyright"), reason="needs pyright")
def test_pyright(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    home = str(Path(fastblock.__file__).parent.parent)
    settings = {"typeCheckingMode": "strict", "include": ["program.py"], "extraPaths": [home]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_program_uses_everything():
    public = {f"fastblock.{name}" for name in fastblock.__all__ if name not in ("Block", "Stack", "reference")}
    public |= {f"reference.{name}" for name in fastblock.reference.__all__}
    for cls in (fastblock.Block, fastblock.Stack):
        own = {name for base in cls.__mro__ if base.__module__.startswith("fastblock") for name in vars(base)}
        public |= {f"{cls.__name__}(", *(f".{name}" for name in own if not name.startswith("_"))}
    assert len(public) > 40
    assert [name for name in sorted(public) if name not in PROGRAM] == []


def test_wrong_programs_are_found_out(tmp_path):
    check(WRONG, tmp_path)


def test_stub_says_what_the_core_is(tmp_path):
    (tmp_path / "allowed").write_text(ALLOWED)
    options = ["--mypy-config-file", "config", "--allowlist", "allowed", "--ignore-disjoint-bases"]
    result = run("mypy.stubtest", *options, "fastblock", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
