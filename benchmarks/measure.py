"""Processes, one for each contestant and number of threads, taken in turn.

One process samples its case while all others sleep, so that nobody runs while the pool of somebody else still spins.
What the machine does in the meantime hits all alike: what counts is the ratio of two contestants within a round.
"""

import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from unittest.mock import patch

import numpy as np

from fastblock.walkthrough import wait_until_quiet

from .contestants import CONTESTANTS, facts
from .timing import fastest

ROUNDS_AT_LEAST = 3
SECONDS_PER_CASE = 20
ROUNDING = 1000  # units in the last place that rounding explains in the root mean square; a lower precision shows
ONE_THREAD = "fastblock, 1 thread"


def wrong(name, case, result):
    """What is wrong with the checked rows of a result, if anything: fastblock must have the bits, peers the values."""
    expected = case.expected()
    if result.shape != expected.shape:
        return f"WRONG RESULT, of shape {result.shape}"
    if name == "fastblock":
        return None if result.dtype == expected.dtype and result.tobytes() == expected.tobytes() else "WRONG BITS"
    off = np.sqrt(np.mean(np.square(result - expected)) / np.mean(np.square(expected)))
    return None if off < ROUNDING * np.finfo(case.dtype).eps else f"WRONG RESULT, off by {off:.1e}"


# ---- in the contestant's process

_ways = _call = None


def _start(name, threads):
    global _ways
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    os.dup2(2, 1)  # stdout is for the report
    _ways = partial(CONTESTANTS[name], threads=threads)
    return facts(name)


def _prepare(case):
    """(way, rows to be checked)"""
    global _call
    _call = None  # its memory is free before the next one's is taken
    _call = fastest(_ways(case, *case.data()))
    _call.sample()
    return _call.way, np.array(_call()[case.rows]) if callable(_call) else None


def _sample():
    seconds = _call.sample()
    wait_until_quiet()
    return seconds


def _tell(function, *arguments):
    """(result, None) or (None, what went wrong): not every library's exceptions survive the way between processes."""
    try:
        return function(*arguments), None
    except Exception as error:
        text = " ".join(str(error).split())[:300]  # a missing package is told in its own words
        plain = isinstance(error, (ModuleNotFoundError, NotImplementedError))
        return None, text if plain else f"{type(error).__name__}: {text}"


# ---- in the driver


class Failure(Exception):
    """A contestant cannot be started, or cannot do a case."""


def available_cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


@contextmanager
def _inheritable(threads):
    """Processes started in here inherit what limits them to `threads` threads.

    They are pinned to the last cores, as the first usually serves the interrupts. Their allocator keeps what is freed,
    as those do that the PyTorch tuning guide recommends: new pages for every result would more than double the time of
    libraries that cannot be told where to write.
    """
    names = "FASTBLOCK", "OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM"
    limits = {f"{name}_NUM_THREADS": str(threads) for name in names}
    limits |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    pin, cores = getattr(os, "sched_setaffinity", lambda pid, cores: None), available_cores()
    with patch.dict(os.environ, limits):
        pin(0, cores[-threads:])
        try:
            yield
        finally:
            pin(0, cores)


class Driver:
    """Starts processes when they are first needed, and remembers which contestants are missing."""

    def __init__(self, peers, rounds):
        self.names, self.rounds = ("fastblock", *peers, "FMA peak"), rounds
        self.facts, self.missing, self._processes = {}, {}, {}

    def run(self, case, threads):
        """A row of the results: seconds per call of each contestant, one for each round, or why there are none."""
        row = {**asdict(case), "label": case.label, "flops": case.flops, "threads": threads, "ways": {}, "failures": {}}
        who = {name: (name, threads) for name in self.names} | ({ONE_THREAD: ("fastblock", 1)} if threads > 1 else {})
        seconds = {}
        for shown, key in who.items():
            try:
                row["ways"][shown] = self._prepare(key, case)
                seconds[shown] = []
            except Failure as failure:
                if shown not in self.missing:
                    row["failures"][shown] = str(failure)
        start, done, rounds = time.perf_counter(), 0, self.rounds
        while done < rounds:
            # Another order each time: who always followed the same neighbour would find the cores as it left them.
            for shown in random.Random(done).sample(list(seconds), len(seconds)):
                try:
                    seconds[shown].append(float(f"{self._ask(who[shown], _sample):.4g}"))
                except Failure as failure:
                    row["failures"][shown] = str(failure)
                    del seconds[shown]
            done += 1
            rounds = min(rounds, max(ROUNDS_AT_LEAST, int(SECONDS_PER_CASE / (time.perf_counter() - start) * done)))
        return row | {"seconds": seconds}

    def _prepare(self, key, case):
        name, threads = key
        if name not in self.missing and key not in self._processes:
            with _inheritable(threads):
                self._processes[key] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                try:
                    self.facts[name] = self._ask(key, _start, name, threads)
                except Failure as failure:
                    self.missing[name] = str(failure)
        if name in self.missing:
            raise Failure(self.missing[name])
        way, rows = self._ask(key, _prepare, case)
        if rows is not None and (fault := wrong(name, case, rows)):
            raise Failure(fault)
        return way

    def _ask(self, key, function, *arguments):
        try:
            result, failure = self._processes[key].submit(_tell, function, *arguments).result()
        except BrokenProcessPool:
            del self._processes[key]  # the next case starts another one
            result, failure = None, "its process has ended"
        if failure:
            raise Failure(failure)
        return result
