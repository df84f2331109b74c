"""``pytest benchmarks/``: each operation against NumPy, bits verified before the clock starts."""

import dataclasses

import pytest

from .cases import BiasReLU, DownProject, UpProject
from .contestants import Fastblock, NumPy
from .plan import DTYPES, WORKED_EXAMPLE, attention, feed_forward, layer, mixing
from .verify import judge

SHAPES = (
    *(BiasReLU(positions=positions, features=3072) for positions in (1, 128)),
    *(layer(kind, rows) for kind in (UpProject, DownProject) for rows in (1, 16, 128)),
    *(feed_forward(shape) for shape in ((1, 768, 3072), (16, 64, 256), (128, 384, 1536))),
    *(mixing(*shape) for shape in ((5, 3), (128, 64, 12))),
    *(attention(positions, causal) for positions in (16, 128) for causal in (False, True)),
    WORKED_EXAMPLE,
)
CASES = [dataclasses.replace(case, dtype=dtype) for case in SHAPES for dtype in DTYPES]


@pytest.mark.parametrize("contestant", [Fastblock, NumPy], ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_operation(benchmark, contestant, case):
    data = case.data()
    call = contestant(threads=1).prepare(case, data)
    assert judge(contestant.name, case, call()[case.sample]).wrong is None
    benchmark.group = case.label
    benchmark(call.function, *call.arguments, **call.keywords)
