"""The documentation runs: every example in a public docstring, and the README."""

import doctest
import inspect
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest

import fastblock
from fastblock import _core, layers

README = Path(__file__).resolve().parent.parent / "README.md"
PUBLIC = {name: getattr(fastblock, name) for name in fastblock.__all__ if callable(getattr(fastblock, name))}
METHODS = {
    f"{cls.__name__}.{name}": getattr(cls, name)
    for cls in (_core.PackedBlock, _core.PackedStack, layers.Saved)
    for name in vars(cls)
    if name == "__call__" or (callable(getattr(cls, name)) and not name.startswith("_"))
}


def examples(name, item):
    globs = {"np": np, "fastblock": fastblock}
    return [
        test
        for test in doctest.DocTestFinder(recurse=False).find(item, name, module=False, globs=globs)
        if test.examples
    ]


@pytest.mark.parametrize("name", PUBLIC | METHODS)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of them write files
    isa, threads = fastblock.isa(), fastblock.get_num_threads()
    found = examples(name, (PUBLIC | METHODS)[name])
    assert found, f"{name} has no example in its docstring"
    for test in found:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0
    fastblock.use_isa(isa)
    fastblock.set_num_threads(threads)


@pytest.mark.parametrize("name", PUBLIC | METHODS)
def test_docstrings_say_what_the_signature_says(name):
    """A summary, and in the sections of numpydoc every argument and, for methods and functions, what is returned."""
    item = (PUBLIC | METHODS)[name]
    text = inspect.getdoc(item)
    assert re.match(r".+[.:]\n\n", text), "a summary of one sentence on the first line"
    sections = re.findall(r"^(\w[\w ]*)\n-{3,}\n((?:.*\n?)*?)(?=^\w[\w ]*\n-{3,}\n|\Z)", text, re.MULTILINE)
    described = re.findall(r"^([\w, ]+?)(?: :.*)?$", dict(sections).get("Parameters", ""), re.MULTILINE)
    described = [argument for line in described if not line.startswith(" ") for argument in line.split(", ")]
    signature = inspect.signature(item)
    assert described == [argument for argument in signature.parameters if argument not in ("self", "cls")]
    for argument in signature.parameters.values():
        assert argument.default in (argument.empty, None, False, "stdout"), f"{argument}: not to be shown"


def test_signatures():
    """What `inspect.signature` and `help` show of code that is not Python."""
    block = "(w1, b1, w2, b2, *, w_q=None, w_k=None, b_q=None, b_k=None)"
    call = "x, weights=None, *, causal=False, key_mask=None, out=None)"
    assert str(inspect.signature(fastblock.Block)) == block
    assert str(inspect.signature(fastblock.Block.__call__)) == f"(self, /, {call}"
    assert str(inspect.signature(fastblock.mix_positions)) == "(weights, x, *, out=None)"
    assert str(inspect.signature(fastblock.Block.feed_forward)) == "(self, /, x, *, out=None)"

    class Other(fastblock.Block):
        def __init__(self, scale):
            super().__init__(scale * np.eye(2), None, np.eye(2), None)

    assert str(inspect.signature(Other)) == "(scale)"
    for item, shown in [(fastblock.Block, block), (fastblock.Block.__call__, call)]:
        text = pydoc.render_doc(item, renderer=pydoc.plaintext)
        assert shown in text and "Parameters" in text and "Examples" in text
        assert "Call self as a function" not in text and "nothing" not in text


def test_readme(tmp_path, monkeypatch):
    """The Python in the README runs as it stands, and its commands are there exactly once."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    for command in ("pip install . && fastblock", 'pip install ".[test]" && pytest'):
        assert text.splitlines().count(command) == 1
