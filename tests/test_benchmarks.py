"""``python -m benchmarks --quick`` in the checkout, with none of the peers but NumPy. No time is judged."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
PEERS = "torch", "onnxruntime", "openvino", "jax"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what was printed, folder with what was written)"""
    folder = tmp_path_factory.mktemp("benchmarks")
    for peer in PEERS:  # installed or not, here they are not
        (folder / f"{peer}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{peer}'\")")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--out", folder / "out"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, folder / "out"


def test_missing_peers_are_named(run):
    printed, _ = run
    for peer in PEERS:
        assert f"Missing: {peer} (No module named '{peer}')" in printed
    assert "Not done" not in printed


def test_report(run):
    printed, folder = run
    assert (folder / "benchmarks.md").read_text(encoding="utf-8") in printed
    for operation in "block", "feed_forward", "up_project", "mix_positions", "attention_weights":
        assert f"## {operation}, float32, 1 thread" in printed
    assert "| block 5 x 3 -> 4 | numpy expression | ≥ 20 |" in printed


def test_json(run):
    _, folder = run
    report = json.loads((folder / "benchmarks.json").read_text(encoding="utf-8"))
    assert report["machine"]["cores"] >= 1
    assert report["contestants"]["fastblock, 1 thread"]["arithmetic"] == "chain256-v1"
    kinds = {race["kind"] for race in report["races"]}
    assert kinds >= {"comparison", "memory", "cost against positions", "cost against hidden units"}
    entries = [entry for race in report["races"] for entry in race["entries"]]
    assert {entry["contestant"] for entry in entries} >= {"fastblock", "numpy", "numpy expression"}
    for entry in entries:
        assert entry["failure"] is None
        assert len(entry["samples"]) == report["rounds"] == 3
        assert all(seconds > 0 for seconds in entry["samples"])
        assert entry["verdict"]["verified"] == (entry["contestant"] == "fastblock")


def test_plots(run):
    printed, folder = run
    if importlib.util.find_spec("matplotlib") is None:
        assert "No plots: No module named 'matplotlib'" in printed
    else:
        for name in "ratios", "roofline", "positions", "hidden":
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
