"""The documentation runs: every example in a public docstring, and the README."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

import fastblock
from fastblock import _core

README = Path(__file__).resolve().parent.parent / "README.md"
PUBLIC = {name: getattr(fastblock, name) for name in fastblock.__all__ if callable(getattr(fastblock, name))}
METHODS = {
    f"{cls.__name__}.{name}": method
    for cls in (_core.PackedBlock, fastblock.Block, fastblock.Stack)
    for name, method in vars(cls).items()
    if name == "__call__" or (callable(getattr(cls, name)) and not name.startswith("_"))
}


def examples(name, item):
    globs = {"np": np, "fastblock": fastblock}
    return [test for test in doctest.DocTestFinder(recurse=False).find(item, name, module=False, globs=globs) if test.examples]


@pytest.mark.parametrize("name", PUBLIC | METHODS)
def test_examples(name):
    before = fastblock.isa()
    for test in examples(name, (PUBLIC | METHODS)[name]):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0
    fastblock.use_isa(before)


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    assert examples(name, PUBLIC[name]), f"{name} has no example in its docstring"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_docstring(name):
    assert METHODS[name].__doc__


def test_readme(tmp_path, monkeypatch):
    """The Python in the README runs as it stands, and its commands are there exactly once."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    for command in ("pip install . && fastblock", 'pip install ".[test]" && pytest'):
        assert text.splitlines().count(command) == 1
