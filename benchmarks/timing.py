"""One call of a library as it is timed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from timeit import Timer
from typing import Any

import numpy as np

SAMPLE_SECONDS = 2e-3
WARM_UP_BELOW = 20e-3  # reading parameters of 20 MB again takes some 2 ms, which is nothing to a longer call


@dataclass
class Call:
    """function(*arguments, **keywords); `read` makes an array of its value, `way` tells it from its alternatives."""

    function: Callable
    arguments: tuple = ()
    keywords: dict = field(default_factory=dict)
    read: Callable[[Any], np.ndarray] = np.asarray
    way: str = ""

    def __call__(self):
        return self.read(self.function(*self.arguments, **self.keywords))

    @cached_property
    def _timer(self):
        """A loop around the bare call; a function around it would cost a tenth of what the smallest ones take."""
        arguments = [f"a{index}" for index in range(len(self.arguments))]
        setup = "".join(f"{name}, " for name in ["f", *arguments, *self.keywords]) + "= everything"
        statement = ", ".join(arguments + [f"{name}={name}" for name in self.keywords])
        everything = self.function, *self.arguments, *self.keywords.values()
        return Timer(f"f({statement})", setup, globals={"everything": everything})

    @cached_property
    def _repetitions(self):
        """(to warm up, to be timed): calls enough for SAMPLE_SECONDS; the first find in the caches what others left."""
        self()
        repetitions = 1
        while (seconds := self._timer.timeit(repetitions)) < SAMPLE_SECONDS:
            repetitions = max(2 * repetitions, int(1.2 * repetitions * SAMPLE_SECONDS / max(seconds, 1e-7)))
        return 0 if seconds > WARM_UP_BELOW else max(1, repetitions // 4), repetitions

    def sample(self):
        """Seconds per call."""
        warm_up, repetitions = self._repetitions
        self._timer.timeit(warm_up)
        return self._timer.timeit(repetitions) / repetitions


def fastest(calls):
    """The fastest of several calls that do the same, in a short trial."""
    calls = list(calls)
    return min(calls, key=lambda call: min(call.sample() for _ in range(3))) if len(calls) > 1 else calls[0]
