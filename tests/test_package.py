"""What is installed and shipped, and that the build cannot change a bit: symbols, files, sizes, compilers and flags."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from binascii import crc32
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastblock
from fastblock import _core

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CC = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

unix = pytest.mark.skipif(
    os.name != "posix" or sys.platform == "darwin", reason="nm and the flags of gcc and clang on ELF"
)


def run(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the checkout without what was built in it."""
    copy = tmp_path_factory.mktemp("source") / "fastblock"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.o", "_core.c")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build(source, folder, **variables):
    """The sdist, and the wheel built from nothing but the sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, env=environment(**variables))
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def distributions(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("dist"), CFLAGS="-O0")  # optimising takes long and changes no name


UNSET = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "FASTBLOCK_ISA")


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return kept | changes


# ---- what is shipped


@pytest.mark.slow
def test_wheel(distributions):
    info = f"fastblock-{fastblock.__version__}.dist-info"
    with zipfile.ZipFile(distributions[1]) as file:
        assert sorted(file.namelist()) == sorted(
            [
                "fastblock/__init__.py",
                "fastblock/__main__.py",
                f"fastblock/_core{SUFFIX}",
                "fastblock/_core.pyi",
                "fastblock/_files.py",
                "fastblock/_process.py",
                "fastblock/_runtime.py",
                "fastblock/layers.py",
                "fastblock/py.typed",
                "fastblock/reference.py",
                "fastblock/walkthrough.py",
                f"{info}/METADATA",
                f"{info}/RECORD",
                f"{info}/WHEEL",
                f"{info}/entry_points.txt",
                f"{info}/licenses/LICENSE",
                f"{info}/top_level.txt",
            ]
        )
        metadata = file.read(f"{info}/METADATA").decode()
    for line in [
        f"Version: {fastblock.__version__}",
        "License-Expression: BSD-3-Clause",
        "License-File: LICENSE",
        "Requires-Python: >=3.11",
        "Requires-Dist: numpy>=2.0",
        "Provides-Extra: test",
        "Provides-Extra: bench",
    ]:
        assert f"\n{line}\n" in metadata


@pytest.mark.slow
def test_wheel_size(source, tmp_path):
    assert build(source, tmp_path)[1].stat().st_size < 1_000_000


@pytest.mark.slow
def test_sdist(distributions):
    with tarfile.open(distributions[0]) as file:
        members = {
            name.partition("/")[2]: member for name in file.getnames() if not (member := file.getmember(name)).isdir()
        }
    shipped = set(members)
    made = {"PKG-INFO", "setup.cfg", *(name for name in shipped if name.startswith("fastblock.egg-info/"))}
    expected = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml"}
    expected.add("setup.py")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in name and path.suffix not in (".so", ".o", ".pyc"):
                expected.add(name)
    assert shipped - made == expected
    pictures = {name: member.size for name, member in members.items() if Path(name).suffix in PICTURES}
    assert {name: size for name, size in pictures.items() if size > 60_000} == {}


FOLDERS = "csrc", "fastblock", "tests", "benchmarks", "docs"
PICTURES = ".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"


def test_pictures_are_small_and_all_that_is_linked_to_is_there():
    for folder in FOLDERS:
        pictures = [path for path in (ROOT / folder).rglob("*") if path.suffix in PICTURES]
        assert [path for path in pictures if path.stat().st_size > 60_000] == []
    for document in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
        assert links and [link for link in links if not (document.parent / link).exists()] == [], document


def test_changelog_knows_this_version():
    assert f"\n## {fastblock.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names():
    for name in fastblock.__all__:
        assert getattr(fastblock, name) is not None
    operations = ["mix_positions", "bias_relu", "up_project", "down_project", "feed_forward", "attention_weights"]
    assert {*operations, "Block", "Stack", "show_config", "isa", "isas", "use_isa"} <= set(fastblock.__all__)
    for name in operations:  # the reference has the same names
        assert callable(getattr(fastblock.reference, name))


def test_show_config(capsys):
    facts = fastblock.show_config(mode="dicts")
    assert fastblock.show_config() is None
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(facts)
    assert facts["isa"] == fastblock.isa()
    assert list(facts["isas_usable"]) == list(fastblock.isas())
    assert set(facts["isas_usable"]) <= set(facts["isas_compiled"])
    with pytest.raises(ValueError, match="mode"):
        fastblock.show_config("yaml")


def test_import_from_sources_that_were_not_built(source):
    # -S and NumPy by its path: with the hook of an install in place, the core would be found at the checkout.
    variables = environment(PYTHONPATH=str(Path(np.__file__).parent.parent))
    command = [sys.executable, "-S", "-c", "import fastblock"]
    result = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: The compiled core of fastblock is not in ") and "pip install ." in last


def test_importing_starts_no_thread_and_imports_little():
    code = "import sys, fastblock, threading; print(threading.active_count(), *sorted(sys.modules))"
    count, *modules = run(sys.executable, "-P", "-W", "error", "-c", code).split()
    assert count == "1"
    assert not {"argparse", "fastblock.walkthrough", "fastblock.__main__"} & set(modules)


# ---- symbols


@unix
def test_the_extension_exports_its_init_only():
    """nm -D --defined-only fastblock/_core*.so"""
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", _core.__file__).splitlines()]
    assert [name for name in symbols if not name.startswith("fb_")] == ["PyInit__core"]


@unix
def test_global_symbols_of_the_c_core_start_with_fb(tmp_path):
    """cc -c csrc/*.c && nm -g --defined-only *.o: the core as it is without Python, nothing hidden."""
    run(*CC, "-std=c11", "-O0", "-pthread", "-ffp-contract=off", "-c", *sorted(CSRC.glob("*.c")), cwd=tmp_path)
    objects = sorted(tmp_path.glob("*.o"))
    listing = run("nm", "-g", "--defined-only", *objects).splitlines()
    symbols = [line.split()[-1] for line in listing if re.match(r"[0-9a-f]+ ", line)]
    assert len(objects) == len(list(CSRC.glob("*.c"))) and len(symbols) > 10
    assert [name for name in symbols if not name.startswith("fb_")] == []


# ---- one source for every tier


TIERS = ("avx2", "avx512", "neon", "portable")
INTRINSIC = re.compile(
    r"\b(_mm(256|512)?_(?!prefetch|getcsr|setcsr)\w+|v(ld|st)1q?_\w+|vfmaq?_\w+|__m(128|256|512)\w*)\b"
)


def test_intrinsics_are_in_the_simd_headers_only():
    found = {path.name for path in CSRC.iterdir() if INTRINSIC.search(path.read_text())}
    assert found <= {f"fb_simd_{tier}.h" for tier in TIERS}


def test_tier_files_hold_no_code():
    """Guard, target, includes and the table: all kernels come from the template."""
    normal_form = set()
    for tier in TIERS:
        text = re.sub(r"/\*.*?\*/", "", (CSRC / f"fb_kernels_{tier}.c").read_text(), flags=re.DOTALL)
        code = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        assert all(line.startswith("const fb_tier *const") for line in code), tier
        normal_form.add(code[0].replace(tier, "TIER"))
        assert text.count('#include "fb_kernels_template.h"') == 2
    assert len(normal_form) == 1


def test_simd_headers_have_the_same_operations_in_the_same_order():
    """But for those that fb_simd_lanes.h has for all: a tier that brings its own says so, or it would not compile."""
    common = re.findall(r"^FB_INLINE .*?\bV\((\w+)\)\(", (CSRC / "fb_simd_lanes.h").read_text(), re.MULTILINE)
    assert common == ["splats", "load_first", "store_first", "stream", "stream_end", "transpose", "end"]
    operations = {}
    for tier in TIERS:
        text = (CSRC / f"fb_simd_{tier}.h").read_text()
        assert text.count('#include "fb_simd_lanes.h"') == 2, tier
        names = re.findall(r"^FB_INLINE .*?\b(fb_f(?:32|64)_\w+)\(", text, re.MULTILINE)
        operations[tier] = [name for name in names if name.split("_", 2)[2] not in common]
    assert len(operations["portable"]) > 20
    for tier in TIERS:
        assert operations[tier] == operations["portable"], tier


# ---- the build cannot change a bit


@unix
def test_fast_math_is_refused(tmp_path):
    for source in sorted(CSRC.glob("*.c")):
        result = subprocess.run(
            [*CC, "-ffast-math", "-c", str(source), "-o", str(tmp_path / "x.o")], capture_output=True, text=True
        )
        assert result.returncode != 0 and "#error" in result.stderr, source.name


def test_a_core_that_breaks_the_contract_is_refused(monkeypatch):
    fastblock._check_core()
    for dtype, expected in fastblock._CHECKSUMS.items():
        results = fastblock._results_for_check(fastblock.reference, dtype)
        assert crc32(b"".join(result.astype("<" + dtype).tobytes() for result in results)) == expected
    exact = fastblock.attention_weights
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="does not compute the contract chain256-v1"):
        patch.setattr(fastblock, "attention_weights", lambda *args: np.nextafter(exact(*args), 1, dtype=args[0].dtype))
        fastblock._check_core()
    flushing = SimpleNamespace(float_info=SimpleNamespace(min=0.0))
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="flush subnormal numbers to zero"):
        patch.setattr(fastblock, "sys", flushing)
        fastblock._check_core()


def test_old_build_requirements_are_named(source, tmp_path):
    (tmp_path / "setuptools-65.5.0.dist-info").mkdir()
    (tmp_path / "setuptools-65.5.0.dist-info" / "METADATA").write_text("Name: setuptools\nVersion: 65.5.0\n")
    variables = environment(PYTHONPATH=str(tmp_path))
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.startswith("Building fastblock needs setuptools >= 77, found 65.5.0: "), result.stderr


@unix
def test_what_an_earlier_build_left_is_not_taken(source, tmp_path):
    """As if the extension had been built a moment ago: a compiler that fails must be asked."""
    library = tmp_path / f"lib/fastblock/_core{SUFFIX}"
    library.parent.mkdir(parents=True)
    library.touch()
    os.utime(library, (2**31 - 1, 2**31 - 1))  # newer than everything it depends on
    folders = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    result = subprocess.run(
        [*map(str, command)], cwd=source, env=environment(CC="/bin/false"), capture_output=True, text=True
    )
    assert result.returncode != 0 and "/bin/false" in result.stderr


@unix
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_flags_for_the_machine_at_hand(compiler, tmp_path):
    """Where it has AVX512-FP16, __FLT_EVAL_METHOD__ is 16."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    options = ["-fsyntax-only", "-U__FLT_EVAL_METHOD__", "-D__FLT_EVAL_METHOD__=16"]
    run(compiler, *options, "-x", "c", CSRC / "fb_base.h")


HASHES = """
import hashlib, json, sys
import numpy as np
sys.path.append(sys.argv[1])
from adversarial import INPUT_CLASSES, generator
import fastblock

assert (np.full(4, 1e-40, np.float32) * np.float32(1) != 0).all(), "the core flushes subnormals in the whole process"
hashes = {}
for isa in fastblock.isas():
    fastblock.use_isa(isa)
    for dtype in map(np.dtype, ("f4", "f8")):
        for name, make in INPUT_CLASSES.items():
            for P, D, F, E in [(5, 3, 4, 2), (17, 33, 65, 16), (7, 259, 515, 1)]:
                x, A, w1, b1, w2, b2, w_q, w_k, b_q, b_k = (
                    make(generator(name, i), shape, dtype)
                    for i, shape in enumerate([(P, D), (P, P), (F, D), (F,), (D, F), (D,), (E, D), (E, D), (E,), (E,)])
                )
                h = fastblock.up_project(x, w1, b1)
                block = fastblock.Block(w1, b1, w2, b2, w_q=w_q, w_k=w_k, b_q=b_q, b_k=b_k)
                results = [
                    h, fastblock.mix_positions(A, x), fastblock.bias_relu(x, b2), fastblock.down_project(h, w2, b2),
                    fastblock.feed_forward(x, w1, b1, w2, b2), fastblock.attention_weights(x, w_q, w_k, b_q, b_k),
                    fastblock.attention_weights(x, w_q, w_k, causal=True), block(x), block(x, A), block(x, causal=True),
                ]
                key = f"{isa} {dtype} {name} {P} {D} {F} {E}"
                hashes[key] = hashlib.sha256(b"".join(map(np.ndarray.tobytes, results))).hexdigest()
json.dump([fastblock.__file__, fastblock.show_config("dicts")["compiler"], hashes], sys.stdout)
"""


def hashes(folder, **variables):
    """Digests of results of every operation, input class, dtype and tier, by the fastblock in `folder`."""
    script = [sys.executable, "-P", "-c", HASHES, ROOT / "tests"]
    location, compiler, result = json.loads(run(*script, env=environment(PYTHONPATH=str(folder), **variables)))
    assert Path(location).parent.parent == Path(folder)
    return compiler, result


@pytest.fixture(scope="session")
def installed_hashes():
    compiler, result = hashes(Path(fastblock.__file__).parent.parent)
    assert len(result) > 20
    return result


@unix
@pytest.mark.slow
@pytest.mark.skipif("avx2" not in fastblock.isas(), reason="counts instructions of the AVX2 tier")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compilers_unroll_the_tiles(compiler, tmp_path):
    """A tile whose loops stay loops has its accumulators in memory, and takes four times as long."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    assembly = tmp_path / "avx2.s"
    run(compiler, "-std=gnu11", "-O3", "-ffp-contract=off", "-S", CSRC / "fb_kernels_avx2.c", "-o", assembly)
    assert assembly.read_text().count("vfmadd") > 1500


# What asks the compiler and the linker for other values; without -mfma an x86 compiler has no fma to contract to.
VALUE_CHANGING = "-Ofast -fno-finite-math-only -ffast-math -funsafe-math-optimizations -fassociative-math"
VALUE_CHANGING += " -freciprocal-math -fno-signed-zeros -ffp-contract=fast" + " -mfma" * ("avx2" in fastblock.isas())
ASKED = {"CFLAGS": VALUE_CHANGING, "LDFLAGS": VALUE_CHANGING}
needs_clang = pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")


@unix
@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"CFLAGS": "-O0"}, id="-O0"),
        pytest.param(ASKED, id="flags that change values"),
        pytest.param({"CC": "clang"}, id="clang", marks=needs_clang),
        pytest.param({"CC": "clang"} | ASKED, id="clang, flags that change values", marks=needs_clang),
    ],
)
def test_any_build_gives_the_same_bits(variables, source, installed_hashes, tmp_path):
    folders = ["--build-base", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    log = run(sys.executable, "setup.py", "--verbose", "build", *folders, cwd=source, env=environment(**variables))
    compilations = [line for line in log.splitlines() if re.search(r" -c \S+\.c ", line)]
    assert len(compilations) == len(list(CSRC.glob("*.c"))) + 1
    links = [line for line in log.splitlines() if " -shared " in line and " -o " in line]
    assert len(links) == 1
    for line in compilations + links:
        assert line.endswith(" -fno-fast-math -ffp-contract=off")  # after all that comes from the environment
        assert re.findall(r" (-O\w*)", line)[-1] == ("-O0" if variables.get("CFLAGS") == "-O0" else "-O3")
    compiler, result = hashes(tmp_path / "lib")
    assert ("clang" in compiler) == ("CC" in variables)
    assert result == installed_hashes
