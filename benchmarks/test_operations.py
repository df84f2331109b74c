"""``pytest benchmarks``: every case against NumPy on one thread, bits verified before the clock starts."""

import pytest
from threadpoolctl import threadpool_limits

import fastblock

from .cases import CASES
from .contestants import CONTESTANTS
from .measure import wrong
from .timing import fastest


@pytest.mark.parametrize("contestant", ["fastblock", "numpy"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_operation(benchmark, contestant, case):
    with threadpool_limits(1), fastblock.num_threads(1):
        call = fastest(CONTESTANTS[contestant](case, *case.data(), threads=1))
        assert wrong(contestant, case, call()[case.rows]) is None
        benchmark.group = case.label
        benchmark(call.function, *call.arguments, **call.keywords)
