"""The FMA peak that benchmarks compare with is that of the units: its loops do not touch memory."""

import re
import shutil
import subprocess

import pytest

from fastblock import _core


def functions(library, name):
    """{symbol: disassembly} of the functions whose symbols contain `name`."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], check=True, capture_output=True, text=True
    )
    blocks = re.split(r"\n(?=[0-9a-f]+ <)", listing.stdout)
    return {
        symbol: block for block in blocks if (symbol := block.partition("<")[2].partition(">")[0]) and name in symbol
    }


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_peak_is_measured_in_registers():
    """Accumulators on the stack showed half the peak, merged ones three times the peak."""
    seen = functions(_core.__file__, "fma_chains")
    vectors = {symbol: text for symbol, text in seen.items() if re.search(r"_(avx2|avx512|neon)$", symbol)}
    if not vectors:
        pytest.skip("no vector tier on this platform, or a library without symbols")
    for symbol, text in vectors.items():
        steps = [line for line in text.splitlines() if re.search(r"\t(vfn?madd|fmla)", line)]
        assert len(steps) >= 12 + 10, f"{symbol}: {len(steps)} multiply-adds"
        assert not [line for line in steps if "(" in line or "[" in line], symbol


def test_two_loops_agree(dtype):
    """Else _peak raises."""
    assert _core._peak(dtype, 0.02) > 0
