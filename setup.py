"""Build of the one extension module; everything else is in pyproject.toml."""

import os
import re
import sys
import tomllib
from glob import glob
from importlib.metadata import PackageNotFoundError, version

# Without build isolation nobody else asks, and an older setuptools, say, stops at the license with other words.
with open("pyproject.toml", "rb") as file:
    build_requirements = tomllib.load(file)["build-system"]["requires"]
for requirement in build_requirements:
    name, _, oldest = requirement.split()
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "none"
    if [*map(int, re.findall(r"\d+", found))] < [*map(int, re.findall(r"\d+", oldest))]:
        sys.exit(f"Building fastblock needs {requirement}, found {found}: install it, or build with build isolation.")

import numpy  # noqa: E402 (after the question whether it is there)
from setuptools import Extension, setup  # noqa: E402

FROM_ENVIRONMENT = " ".join(os.environ.get(name, "") for name in ("CC", "CFLAGS", "CPPFLAGS")).split()


def unless_chosen(option):
    """Our choice of an option (-O3, -g0) where the environment makes none, for extra arguments come last and win.

    What the environment chose is repeated, for it may come before something else; -Ofast is -O3 with -ffast-math.
    """
    chosen = [flag for flag in FROM_ENVIRONMENT if flag.startswith(option[:2]) and flag != "-Ofast"]
    return chosen[-1] if chosen else option


if sys.platform == "win32":
    compile_args, link_args = ["/O2", "/std:c11", "/fp:precise"], []
else:
    # -std=gnu11: with c11 gcc computes float in double precision on s390x.
    # -g0: Python's own flags ask for debug information, which would be most of the wheel.
    # -falign-*: the loop over nonzeros is to begin a cache line.
    # IEEE stands last on both command lines, where nothing from the environment can undo it. A multiplication
    # followed by an addition is two roundings, and one rounding only where the source says fma; and a link with
    # -Ofast or -ffast-math would add start-up code that flushes subnormals to zero in the whole process.
    # Compilations go without -fno-unsafe-math-optimizations: -fno-fast-math implies it, and by itself it makes
    # clang keep floating-point exceptions exact, which is slow.
    optimization = unless_chosen("-O3")
    ieee = ["-fno-associative-math", "-fno-reciprocal-math", "-fsigned-zeros", "-fno-finite-math-only"]
    ieee += ["-fno-fast-math", "-ffp-contract=off"]
    compile_args = [optimization, unless_chosen("-g0"), "-std=gnu11", "-fvisibility=hidden", "-pthread"]
    compile_args += ["-falign-functions=64", "-falign-loops=64", "-Wall", "-Wextra", *ieee]
    link_args = ["-pthread", optimization, "-fno-unsafe-math-optimizations", *ieee]

setup(
    ext_modules=[
        Extension(
            "fastblock._core",
            sources=["fastblock/_core.pyx", *sorted(glob("csrc/*.c"))],
            depends=sorted(glob("csrc/*.h") + glob("fastblock/*.px[di]")),
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    # force: what an earlier build left behind may come from other flags, another compiler or another numpy.
    options={"build_ext": {"cython_c_in_temp": True, "force": True}},
)
