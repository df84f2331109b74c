"""From samples to figures: a ratio of two contestants is the median of their ratios within rounds."""

from dataclasses import dataclass
from statistics import quantiles

from .measure import Entry, Outcome, Race

NO_PEER = "fastblock", "FMA peak"


@dataclass(frozen=True)
class Spread:
    """Quartiles and minimum of what was measured round by round."""

    low: float
    median: float
    high: float
    minimum: float

    @classmethod
    def of(cls, values):
        return cls(*quantiles(values, n=4, method="inclusive"), min(values))


@dataclass(frozen=True)
class RaceResult:
    """A race that has been run. Entries without a result, or with a wrong one, are as if they had not been there."""

    race: Race
    outcomes: dict[Entry, Outcome]

    @property
    def case(self):
        return self.race.entries[0].case

    @property
    def threads(self):
        return self.race.entries[0].threads

    def entry(self, name):
        return Entry(name, self.threads, self.case)

    def samples(self, entry):
        """The samples of an entry, or None. fastblock has some only if its bits were verified just before."""
        outcome = self.outcomes.get(entry)
        if outcome is None or outcome.failure or (entry.contestant == "fastblock" and not outcome.verdict.verified):
            return None
        return outcome.samples

    def seconds(self, entry):
        samples = self.samples(entry)
        return samples and Spread.of(samples)

    def ratio(self, slower, faster):
        """How many times as long `slower` takes, or None."""
        slower, faster = self.samples(slower), self.samples(faster)
        return slower and faster and Spread.of([a / b for a, b in zip(slower, faster, strict=True)])

    def against(self, name):
        """How many times as long a contestant takes as fastblock; for the FMA peak, the share of it that is reached."""
        return self.ratio(self.entry(name), self.entry("fastblock"))

    def fastest(self, *names):
        """(name, how many times as long it takes as fastblock) of the fastest of some contestants, or of all peers."""
        names = names or [e.contestant for e in self.outcomes if e.case == self.case and e.contestant not in NO_PEER]
        ratios = {name: ratio for name in names if (ratio := self.against(name))}
        return min(ratios.items(), key=lambda item: item[1].median) if ratios else None


class Results(list):
    """All races that have been run, in order."""

    def find(self, kind, case, threads=None):
        """The race of this kind that starts with this case, or None."""
        for result in self:
            if result.race.kind == kind and result.case == case and threads in (None, result.threads):
                return result
        return None

    def of_kind(self, kind):
        return [result for result in self if result.race.kind == kind]

    def memory(self):
        """[(case, median of its seconds)] of reading memory."""
        return [
            (entry.case, seconds.median)
            for result in self.of_kind("memory")
            for entry in result.race.entries
            if (seconds := result.seconds(entry))
        ]

    def wrong(self):
        """Whether anything that fastblock returned was wrong."""
        return any(
            entry.contestant == "fastblock" and outcome.verdict.wrong
            for result in self
            for entry, outcome in result.outcomes.items()
        )
