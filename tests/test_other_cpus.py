"""The tiers this CPU lacks, and other CPUs, in emulation: they return the bits that the portable tier returns here.

tests/tiers/tiers.c compares the tiers of one program with each other and prints hashes of the results; here it is
built for this and for other CPUs, and what all of these programs print must be the same. What is shown is that the
source means the same everywhere; the instructions of a real AVX-512 CPU are shown only where the tests run on one.
"""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastblock

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted((ROOT / "csrc").glob("*.c"))
TIERS = ROOT / "tests" / "tiers"
# Not c11: with it gcc promises double precision for float on s390x. -O1: the portable tier compiles slowly.
FLAGS = ["-std=gnu11", "-O1", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
NO_FMA = ["-U__FP_FAST_FMA", "-U__FP_FAST_FMAF"]  # the portable tier then computes it
CPUS = {
    # name: (Debian's architecture, tiers, flags)
    "aarch64": ("arm64", ["portable", "neon"], []),
    "s390x": ("s390x", ["portable"], []),  # big-endian
    "s390x without fma": ("s390x", ["portable"], NO_FMA),
    "powerpc64le": ("ppc64el", ["portable"], []),
    "riscv64": ("riscv64", ["portable"], []),
}


def needs(program, package):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed (Debian: {package})")
    return program


def call(*command, timeout=900):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{' '.join(map(str, command[:3]))}: {result.stdout}{result.stderr}"
    return result.stdout


def build(folder, compiler, flags=(), link=(), sources=CSRC, special=None):
    """The program, from the library's sources and tiers.c; special: more flags for some of the sources, by name."""

    def compiled(source):
        target = folder / f"{source.stem}.o"
        more = (special or {}).get(source.name, [])
        call(compiler, "-c", *FLAGS, *flags, *more, "-I", ROOT / "csrc", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, TIERS / "tiers.c"]))
    call(compiler, *objects, "-pthread", *link, "-lm", "-o", folder / "tiers")
    return folder / "tiers"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What this CPU prints, where all of its own tiers agree."""
    program = build(tmp_path_factory.mktemp("here"), needs("gcc", "gcc"))
    return call(program, "portable", *(name for name in fastblock.isas() if name != "portable"))


def test_avx512(here, tmp_path):
    """AVX-512 in halves of 256 bits (tests/tiers/avx512.c)."""
    if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in fastblock.isas():
        pytest.skip("AVX-512 is emulated with AVX2, which this CPU has not")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe is not installed (Debian: libsimde-dev)")
    sources = [path for path in CSRC if path.name != "fb_kernels_avx512.c"] + [TIERS / "avx512.c"]
    special = {
        "avx512.c": ["-mavx2", "-mfma", "-mpopcnt"],
        "fb_dispatch.c": ["-D__builtin_cpu_supports(name)=1"],  # the emulated tier is usable
    }
    assert call(build(tmp_path, needs("gcc", "gcc"), sources=sources, special=special), "portable", "avx512") == here


@pytest.mark.parametrize("name", CPUS)
def test_other_cpu(here, tmp_path, name):
    debian, tiers, flags = CPUS[name]
    cpu = name.split()[0]
    compiler = needs(f"{cpu}-linux-gnu-gcc", f"gcc-{cpu}-linux-gnu libc6-dev-{debian}-cross")
    emulator = needs(f"qemu-{cpu.replace('powerpc', 'ppc')}", "qemu-user")
    assert call(emulator, build(tmp_path, compiler, flags, ["-static"]), *tiers) == here
