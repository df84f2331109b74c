"""``python -m benchmarks`` in the checkout, with none of the peers but NumPy. No time is judged."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
PEERS = "torch", "onnxruntime", "openvino", "jax"
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """benchmarks(*arguments of Python): (exit status, what was printed)"""
    folder = tmp_path_factory.mktemp("missing")
    for peer in PEERS:  # installed or not, here they are not
        (folder / f"{peer}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{peer}'\")")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    options = {"cwd": CHECKOUT, "env": {**os.environ, "PYTHONPATH": path}, "capture_output": True, "text": True}

    def run(*arguments):
        result = subprocess.run([sys.executable, *map(str, arguments)], **options, timeout=300)
        return result.returncode, result.stdout + result.stderr

    return run


@pytest.fixture(scope="module")
def quick(benchmarks, tmp_path_factory):
    """(what was printed, folder with what was written)"""
    folder = tmp_path_factory.mktemp("benchmarks")
    status, printed = benchmarks("-m", "benchmarks", "--quick", "--out", folder)
    assert status == 0, printed
    return printed, folder


def test_missing_peers_are_named(quick):
    printed, _ = quick
    for peer in PEERS:
        assert f"Missing: {peer} (No module named '{peer}')" in printed
    assert "Not done" not in printed


def test_report(quick):
    printed, folder = quick
    assert (folder / "benchmarks.md").read_text(encoding="utf-8") in printed
    assert "## float32, 1 thread" in printed and "## float64, 1 thread" in printed
    for label in "block 5 x 3 -> 4, worked example", "feed_forward 1 x 768 -> 3072, 97% zeros":
        assert f"\n| {label} | " in printed


def test_json(quick):
    _, folder = quick
    run = json.loads((folder / "benchmarks.json").read_text(encoding="utf-8"))
    assert run["rounds"] == 3
    assert len({(row["label"], row["threads"]) for row in run["rows"]}) == len(run["rows"]) > 10
    operations = {"block", "feed_forward", "up_project", "mix_positions", "attention_weights"}
    assert {row["operation"] for row in run["rows"]} == operations
    assert run["rows"][0]["flops"] == 2 * 5 * 5 * 3 + 2 * 2 * 5 * 3 * 4
    for row in run["rows"]:
        assert row["failures"] == {}
        own_again = {"fastblock, 1 thread"} if row["threads"] > 1 else set()
        assert row["seconds"].keys() == {"fastblock", "numpy", "FMA peak"} | own_again
        assert all(len(samples) == 3 and min(samples) > 0 for samples in row["seconds"].values())


@needs_matplotlib
def test_plot(quick):
    picture = (quick[1] / "benchmarks.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 60_000


def test_ratios_are_medians_within_rounds(benchmarks, quick, tmp_path):
    """Of numpy 2, 3 and 4 times as long, though the machine was 10 times as slow in one of the rounds."""
    run = json.loads((quick[1] / "benchmarks.json").read_text(encoding="utf-8"))
    row = run["rows"][0] | {"seconds": {"fastblock": [1, 10, 1], "numpy": [2, 40, 3], "FMA peak": [0.5, 5, 0.5]}}
    (tmp_path / "run.json").write_text(json.dumps(run | {"rows": [row]}), encoding="utf-8")
    status, printed = benchmarks("-m", "benchmarks", "--redraw", tmp_path / "run.json", "--out", tmp_path)
    assert status == 0, printed
    assert "| 1 s | −0% +450% | 3.9e-07 | 50% | 3.00 | **3.00** numpy |" in printed


def test_wrong_bits_are_not_timed(benchmarks, tmp_path):
    """The reference of this run is off by one unit in the last place."""
    code = f"""if True:
        import sys, benchmarks, numpy
        from fastblock import reference
        right = reference.mix_positions
        reference.mix_positions = lambda weights, x: numpy.nextafter(right(weights, x), x.dtype.type(numpy.inf))
        sys.argv[1:] = ["--filter", "mix_positions 12 x 128", "--quick", "--threads", "1", "--out", {str(tmp_path)!r}]
        from benchmarks.__main__ import main
        sys.exit(main())
        """
    status, printed = benchmarks("-c", code)
    assert status == 1, printed
    assert "- fastblock: WRONG BITS (mix_positions 12 x 128 x 64, 1 thread; " in printed
    for row in json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))["rows"]:
        assert row["seconds"].keys() == {"numpy", "FMA peak"}


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="no pytest-benchmark")
def test_pytest_benchmark(benchmarks):
    selection = "feed_forward and 16 and 64 and not 97", "--benchmark-disable", "-p", "no:cacheprovider"
    status, printed = benchmarks("-m", "pytest", "benchmarks", "-q", "-k", *selection)
    assert status == 0 and "4 passed" in printed, printed
