"""What holds for the whole process: the tier in use, the number of threads, the environment, the configuration."""

import os
import platform
from typing import Any, Literal, SupportsIndex, overload

from . import _core


def isas() -> list[str]:
    """The names of the tiers (instruction sets) that this CPU can run, fastest first.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.isas()[-1]
    'portable'
    """
    return _core._tiers(True)


def isa() -> str:
    """The name of the tier in use.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.isa() in fastblock.isas()
    True
    """
    return _core._isa()


def use_isa(name: str) -> None:
    """Use the tier `name` from now on, in the whole process. The results are the same bits in every tier.

    Parameters
    ----------
    name : str
        One of `isas()`. The environment variable ``FASTBLOCK_ISA`` sets it at import.

    Raises
    ------
    ValueError
        If this CPU or this build does not have the tier; nothing is changed then.
    TypeError
        If `name` is no str.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.use_isa(fastblock.isas()[0])
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if not _core._use_isa(name):
        raise ValueError(f"name: expected one of {', '.join(isas())} (the tiers of this CPU and build), got {name!r}")


def get_num_threads() -> int:
    """How many threads a large call may use.

    The number given to `set_num_threads`, else by the environment variable ``FASTBLOCK_NUM_THREADS``, else by
    ``OMP_NUM_THREADS``, else the CPUs that this process may use (affinity and cgroup quota).

    Examples
    --------
    >>> import fastblock
    >>> fastblock.get_num_threads() >= 1
    True
    """
    return _core._get_num_threads()


def set_num_threads(n: SupportsIndex) -> None:
    """Let large calls use up to `n` threads from now on, in the whole process. No result depends on it.

    Parameters
    ----------
    n : int
        At least 1; more than 256 count as 256.

    Raises
    ------
    ValueError
        If `n` is less than 1.
    TypeError
        If `n` is no integer.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.set_num_threads(2)
    >>> fastblock.get_num_threads()
    2
    """
    _core._set_num_threads(n)


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print what this build of fastblock is, and what it uses on this machine.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        "stdout" prints, "dicts" returns the same facts as a dictionary, as in `numpy.show_config`.

    Returns
    -------
    dict or None

    Examples
    --------
    >>> fastblock.show_config(mode="dicts")["arithmetic"]
    'chain256-v1'
    """
    from . import ARITHMETIC, __version__

    if mode not in ("stdout", "dicts"):
        raise ValueError(f'mode: expected "stdout" or "dicts", got {mode!r}')
    facts = {
        "version": __version__,
        "arithmetic": ARITHMETIC,
        "cpu": _cpu(),
        "isas_compiled": _core._tiers(False),
        "isas_usable": isas(),
        "isa": isa(),
        "threads": get_num_threads(),
        "compiler": _core._compiler(),
    }
    if mode == "dicts":
        return facts
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {' '.join(fact) if isinstance(fact, list) else fact}")
    return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _check_environment() -> None:
    """Refuse what the environment asks for in vain: our own variables are no place for a silent fallback."""
    threads = os.environ.get("FASTBLOCK_NUM_THREADS")
    if threads and not (threads.isascii() and threads.isdigit() and threads.strip("0")):
        raise ImportError(f"FASTBLOCK_NUM_THREADS: expected a number of threads, at least 1, got {threads[:40]!r}")
    if not isa():
        raise ImportError(
            f"FASTBLOCK_ISA: expected one of {', '.join(isas())} (the tiers of this CPU and build), "
            f"got {os.environ.get('FASTBLOCK_ISA')!r}"
        )


_check_environment()

# threadpoolctl, where it is installed, sees and limits the threads: it finds a library by the name of its file and
# talks to it through C symbols, so `threadpool_limits` and `threadpool_info` work here as they do for a BLAS.
try:
    from threadpoolctl import LibController, register
except ImportError:  # not installed, or older than 3.2: then there is nobody to tell
    pass
else:

    class FastblockController(LibController):
        user_api = "fastblock"
        internal_api = "fastblock"
        filename_prefixes = ("_core.",)
        check_symbols = ("fb_get_process_threads", "fb_set_num_threads")

        def get_num_threads(self):
            return self.dynlib.fb_get_process_threads()  # what it restores is the number of the process

        def set_num_threads(self, num_threads):
            self.dynlib.fb_set_num_threads(num_threads)

        def get_version(self):
            from . import __version__

            return __version__

    register(FastblockController)
