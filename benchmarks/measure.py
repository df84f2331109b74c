"""Processes, one for each contestant and number of threads, taken in turn.

A process starts with an environment and an affinity that leave it its threads and no more. It prepares cases, and
samples one when its turn comes: the clock is read inside, around nothing but calls, while all others sleep. So nobody
runs while the pool of somebody else still spins, and what the machine does in the meantime hits all alike: what counts
is the ratio of two contestants within a round, and the median of these ratios over the rounds.
"""

import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fastblock.walkthrough import wait_until_quiet

from .contestants import CONTESTANTS
from .machine import available_cores, thread_variables
from .verify import Verdict, judge

ROUNDS_AT_LEAST = 3
SECONDS_PER_RACE = 60


@dataclass(frozen=True)
class Entry:
    """Who runs what with how many threads."""

    contestant: str
    threads: int
    case: object


def threads_text(count):
    return f"{count} thread{'s' * (count > 1)}"


@dataclass(frozen=True)
class Race:
    """Entries that are measured together, each once in each round, and can be compared with each other."""

    kind: str
    label: str
    entries: tuple[Entry, ...]


@dataclass
class Outcome:
    """What has become of an entry: seconds per call, one for each round, or the reason why there are none."""

    samples: list[float] = field(default_factory=list)
    way: str = ""
    verdict: Verdict = Verdict()
    failure: str | None = None


class ContestantError(Exception):
    """A contestant cannot be started, or cannot do a case."""


# ---- in the contestant's process


def _serve(connection, name, threads):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    os.dup2(2, 1)  # stdout is for the report
    try:
        contestant = CONTESTANTS[name](threads)
        connection.send((True, contestant.facts()))
    except Exception as error:
        connection.send((False, _sentence(error)))
        return
    calls = {}

    def prepare(case, data):
        # What comes through the pipe lies in some odd place. NumPy's own memory may have huge pages.
        calls[case] = call = contestant.prepare(case, {name: array.copy() for name, array in data.items()})
        result = call()
        call.sample()
        return call.way, None if result is None else result[case.sample]

    def sample(case):
        seconds = calls[case].sample()
        wait_until_quiet()
        return seconds

    methods = {"prepare": prepare, "sample": sample, "forget": calls.clear}
    with contestant.context():
        while True:
            try:
                method, *arguments = connection.recv()
            except EOFError:
                return
            try:
                connection.send((True, methods[method](*arguments)))
            except Exception as error:
                connection.send((False, _sentence(error)))


def _sentence(error):
    """One line. A missing package is told in its own words, without the name of the exception."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (ModuleNotFoundError, NotImplementedError)) else f"{type(error).__name__}: {text}"


# ---- in the driver


@contextmanager
def _inheritable(threads):
    """Processes started in here inherit the environment and are pinned to `threads` cores, the last ones: the first
    usually serves the interrupts."""
    environment, cores = dict(os.environ), available_cores()
    os.environ.update(thread_variables(threads))
    pin = os.sched_setaffinity if hasattr(os, "sched_setaffinity") else lambda pid, cores: None
    pin(0, cores[-threads:])
    try:
        yield
    finally:
        pin(0, cores)
        os.environ.clear()
        os.environ.update(environment)


class Worker:
    """The driver's end of a contestant's process."""

    def __init__(self, name, threads):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with _inheritable(threads):
            context.Process(target=_serve, args=(theirs, name, threads), daemon=True).start()
        theirs.close()
        self.ended = False
        self.facts = self._answer()

    def ask(self, method, *arguments):
        with suppress(OSError):  # the answer tells why
            self._connection.send((method, *arguments))
        return self._answer()

    def _answer(self):
        try:
            well, value = self._connection.recv()
        except (EOFError, OSError):
            self.ended = True
            raise ContestantError("its process has ended") from None
        if not well:
            raise ContestantError(value)
        return value

    def close(self):
        self._connection.close()


class Driver:
    """Starts processes when they are first needed, remembers which contestants are missing, and runs races."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.missing = {}
        self._workers = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self._workers.values():
            worker.close()

    def facts(self):
        """What the contestants say about themselves, by name and number of threads."""
        return {f"{name}, {threads_text(threads)}": worker.facts for (name, threads), worker in self._workers.items()}

    def _worker(self, entry):
        key = entry.contestant, entry.threads
        if key not in self._workers or self._workers[key].ended:
            self._workers[key] = Worker(*key)
        return self._workers[key]

    def run(self, race, progress):
        """{entry: outcome} for all contestants that are there; `progress` is told the part that is done."""
        outcomes = self._prepare(race, progress)
        self._take_turns(outcomes, progress)
        for entry in outcomes:
            with _noted(outcomes[entry]):
                self._worker(entry).ask("forget")
        return outcomes

    def _prepare(self, race, progress):
        outcomes, data = {}, {}
        for number, entry in enumerate(race.entries):
            progress(number / len(race.entries) / 2)
            if entry.contestant in self.missing:
                continue
            try:
                worker = self._worker(entry)
            except ContestantError as error:
                self.missing[entry.contestant] = str(error)
                continue
            if entry.case not in data:
                data[entry.case] = entry.case.data()
            outcomes[entry] = outcome = Outcome()
            with _noted(outcome):
                outcome.way, result = worker.ask("prepare", entry.case, data[entry.case])
                outcome.verdict = judge(entry.contestant, entry.case, result)
                outcome.failure = outcome.verdict.wrong
        return outcomes

    def _take_turns(self, outcomes, progress):
        start, done, rounds = time.perf_counter(), 0, self.rounds
        while done < rounds and (running := [entry for entry in outcomes if outcomes[entry].failure is None]):
            # Another order each time: whoever always followed the same neighbour would always find the cores as it left them.
            for entry in random.Random(done).sample(running, len(running)):
                with _noted(outcomes[entry]):
                    outcomes[entry].samples.append(self._worker(entry).ask("sample", entry.case))
            done += 1
            seconds = (time.perf_counter() - start) / done
            rounds = min(self.rounds, max(ROUNDS_AT_LEAST, int(SECONDS_PER_RACE / seconds)))
            progress(0.5 + done / rounds / 2)


@contextmanager
def _noted(outcome):
    try:
        yield
    except ContestantError as error:
        outcome.failure = str(error)
