"""Build of the one extension module; everything else is in pyproject.toml."""

import os
import sys
from glob import glob

import numpy
from setuptools import Extension, setup

FROM_ENVIRONMENT = os.environ.get("CFLAGS", "").split()


def unless_chosen(option):
    """Our choice of an option (-O3, -g0) where CFLAGS makes none: extra arguments come after CFLAGS and would win."""
    return [] if any(flag.startswith(option[:2]) for flag in FROM_ENVIRONMENT) else [option]


if sys.platform == "win32":
    compile_args, link_args = ["/O2", "/std:c11", "/fp:precise"], []
else:
    # -std=gnu11: with c11 gcc computes float in double precision on s390x.
    # -g0: Python's own flags ask for debug information, which would be most of the wheel.
    # -falign-*: the loop over nonzeros takes 1.06 times as long where it does not begin a cache line.
    # -ffp-contract=off stands last, where nothing can undo it: a multiplication followed by an addition
    # is two roundings, and one rounding only where the source says fma.
    compile_args = [*unless_chosen("-O3"), *unless_chosen("-g0"), "-std=gnu11", "-fvisibility=hidden", "-pthread"]
    compile_args += ["-falign-functions=64", "-falign-loops=64", "-Wall", "-Wextra", "-ffp-contract=off"]
    link_args = ["-pthread"]

setup(
    ext_modules=[
        Extension(
            "fastblock._core",
            sources=["fastblock/_core.pyx", *sorted(glob("csrc/*.c"))],
            depends=sorted(glob("csrc/*.h")) + sorted(glob("fastblock/*.pxd")),
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    options={"build_ext": {"cython_c_in_temp": True}},
)
