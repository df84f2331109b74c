"""What a result depends on besides the code: cores, environment, CPU, commit. Needs nothing but Python."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from . import ROOT

VARIABLES_THAT_MATTER = re.compile("(FASTBLOCK|OMP|OPENBLAS|MKL|KMP|GOMP|MALLOC|GLIBC|ONEDNN|DNNL|XLA|JAX|TORCH)_")


def thread_variables(threads):
    """The environment of a contestant's process.

    The allocator keeps what is freed, as the allocators do that the PyTorch tuning guide recommends: new pages for
    every result would more than double the time of those that cannot be told where to write.
    """
    names = ("FASTBLOCK", "OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")
    allocator = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    return {f"{name}_NUM_THREADS": str(threads) for name in names} | allocator


def available_cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def machine():
    """As JSON."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": cpu.get("flags", cpu.get("Features", "")).split(),
        "cores": len(available_cores()),
        "caches": _caches(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": _commit(),
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "environment": {name: value for name, value in os.environ.items() if VARIABLES_THAT_MATTER.match(name)},
        "environment_of_one_thread": thread_variables(1),
    }


def _read(path):
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu():
    """Of the first core."""
    first, _, _ = (_read("/proc/cpuinfo") or "").partition("\n\n")
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _caches():
    """Of the first core, as {"L1 Data": "32K", ...}."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return {f"L{_read(folder / 'level')} {_read(folder / 'type')}": _read(folder / "size") for folder in folders}


def _commit():
    """The checkout's, with "-dirty" if files differ from it; None where there is none, or no git."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
