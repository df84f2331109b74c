"""The documents: what they name exists, and what exists is named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/architecture.md", "docs/contract.md"]
DOCUMENTS += ["docs/tuning.md"]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def sources():
    """(name, text) of every file of the core, the package, the tests and the benchmarks"""
    for folder in ("csrc", "fastblock", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".c", ".h", ".py", ".pyi", ".pyx", ".pxd", ".pxi"):
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def anchors(name):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_cited_sections_of_the_contract_are_there():
    sections = set(re.findall(r"^## (\d+)\.", text_of("docs/contract.md"), re.MULTILINE))
    cited = {
        (name, number)
        for name, text in sources()
        for numbers in re.findall(r"contract,? sections? ((?:\d+|,| |and)+)", text, re.IGNORECASE)
        for number in re.findall(r"\d+", numbers)
    }
    assert len(cited) > 5
    assert {place for place in cited if place[1] not in sections} == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), target
            if anchor:
                assert anchor in anchors(file.resolve().relative_to(ROOT.resolve()).as_posix()), target


def test_every_document_is_looked_at():
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")}
    assert found == {name for name in DOCUMENTS if name.startswith("docs/")}


def test_the_architecture_names_every_file():
    described = re.search(r"```\n(.*?)```", text_of("docs/architecture.md"), re.DOTALL).group(1)
    named = set(re.findall(r"[\w.]+\.(?:[ch]|pyx?|pyi|pxd|pxi|typed)\b", described))
    there = {path.name for folder in ("csrc", "fastblock") for path in (ROOT / folder).iterdir() if path.is_file()}
    there = {name for name in there if not name.endswith((".so", ".o")) and name != "_core.c"}
    there |= {path.name for path in (ROOT / "tests").rglob("*") if path.name in ("tiers.c", "mutants.py")}
    assert named == there


def test_the_makefile_does_what_is_said():
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    assert {"test", "bench", "sanitize", "lint"} <= targets
    assert set(re.findall(r"\bmake ([a-z]+)", text_of("CONTRIBUTING.md") + text_of("docs/tuning.md"))) <= targets


def test_files_can_be_read_in_a_sitting():
    long = {name: text.count("\n") for name, text in sources() if name.startswith(("csrc/", "fastblock/"))}
    assert {name: lines for name, lines in long.items() if lines >= 600} == {}
