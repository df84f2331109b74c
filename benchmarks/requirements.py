"""Where fastblock must stand, and how a run is held against it."""

from collections.abc import Callable
from dataclasses import dataclass

from . import plan
from .cases import UpProject
from .measure import Entry
from .results import Results


@dataclass(frozen=True)
class Requirement:
    """A figure that has to be reached. `measure` gives (figure, remark), or None if the run has not measured it."""

    work: str
    against: str
    bound: float
    measure: Callable[[Results], tuple[float, str] | None]
    at_most: bool = False

    def met(self, figure):
        return figure <= self.bound if self.at_most else figure >= self.bound


def against(case, bound, *names):
    """How many times as long the fastest of these contestants takes with one thread."""

    def measure(results):
        result = results.find("comparison", case, 1)
        best = result and result.fastest(*names)
        return best and (best[1].median, best[0])

    return Requirement(case.label, " or ".join(names) or "best peer", bound, measure)


def below_one_product(bound):
    """The worked example, in times of one np.matmul of A and X."""

    def measure(results):
        result = results.find("comparison", plan.WORKED_EXAMPLE, 1)
        product = Entry("numpy expression", 1, plan.WORKED_EXAMPLE_MIXING)
        ratio = result and result.ratio(result.entry("fastblock"), product)
        return ratio and (ratio.median, "")

    return Requirement(plan.WORKED_EXAMPLE.label, "time of np.matmul of A and X", bound, measure, at_most=True)


def scaling(case, bound):
    """How many times as long one thread takes as two."""

    def measure(results):
        result = results.find("scaling", case)
        ratio = result and result.ratio(*(Entry("fastblock", threads, case) for threads in (1, 2)))
        return ratio and (ratio.median, "")

    return Requirement(case.label, "2 threads, time of 1", bound, measure)


def flat(bound):
    """The largest time per position over all lengths, in times of the least."""

    def measure(results):
        result = results.find("cost against positions", plan.feed_forward((plan.SWEEP_POSITIONS[0], 768, 3072)))
        if result is None:
            return None
        first, *others = (entry for entry in result.race.entries if entry.contestant == "fastblock")
        ratios = [result.ratio(other, first) for other in others]
        if not all(ratios):
            return None
        lengths = [other.case.positions / first.case.positions for other in others]
        costs = [1.0, *(ratio.median / length for ratio, length in zip(ratios, lengths, strict=True))]
        return max(costs) / min(costs), ""

    return Requirement("time per position, 512 to 65536", "least over the lengths", bound, measure, at_most=True)


def _requirements():
    yield against(plan.WORKED_EXAMPLE, 20, "numpy expression")
    yield below_one_product(0.3)
    for shape, gaussian, sparse in (
        ((1, 768, 3072), 1.3, 1.8),
        ((8, 768, 3072), 1.6, None),
        ((16, 64, 256), 1.6, None),
        ((128, 384, 1536), 1.25, 1.7),
        ((128, 768, 3072), 1.25, 1.7),
        ((512, 768, 3072), 1.25, 1.75),
        ((2048, 768, 3072), 1.25, 1.75),
    ):
        yield against(plan.feed_forward(shape), gaussian)
        if sparse:
            yield against(plan.feed_forward(shape, 0.97), sparse)
    for rows in plan.LAYER_ROWS:
        yield against(plan.layer(UpProject, rows), 0.95 if rows >= 128 else 0.85, "FMA peak")
    for rows in plan.LAYER_ROWS:
        if rows >= 128:
            yield against(plan.layer(UpProject, rows, "float64"), 0.95, "FMA peak")
    for shape in plan.FEED_FORWARD_SHAPES:
        if shape[0] >= 128:
            yield against(plan.feed_forward(shape, 0.0, "float64"), 0.95, "FMA peak")
    for shape, dense in zip(plan.MIXING_SHAPES, (1.1, 1.02), strict=True):
        yield against(plan.mixing(*shape), dense)
        yield against(plan.mixing(*shape, causal=True), 1.8)
    for positions in plan.ATTENTION_POSITIONS:
        yield against(plan.attention(positions), 1.15, "torch", "torch.compile")
        yield against(plan.attention(positions, causal=True), 1.7, "torch", "torch.compile")
    for case in plan.SCALING_CASES:
        yield scaling(case, 1.9)
    yield flat(1.1)


REQUIREMENTS = tuple(_requirements())
