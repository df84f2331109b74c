"""Results as Markdown tables; `ratio` and `best_peer` are what the plot shows, too."""

from itertools import groupby
from operator import itemgetter
from statistics import quantiles

from .measure import ONE_THREAD

NOTHING = "–"
NO_PEERS = "fastblock", ONE_THREAD, "FMA peak"
TIME_UNITS = (1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")


def quartiles(values):
    return quantiles(values, n=4, method="inclusive")


def ratio(row, name):
    """Quartiles, over the rounds, of how many times as long a contestant takes as fastblock; None without a result."""
    own, other = row["seconds"].get("fastblock"), row["seconds"].get(name)
    return quartiles([b / a for a, b in zip(own, other, strict=True)]) if own and other else None


def best_peer(row):
    """(name, quartiles of its ratio) of the fastest peer, or None."""
    ratios = {name: found for name in row["seconds"] if name not in NO_PEERS and (found := ratio(row, name))}
    return min(ratios.items(), key=lambda item: item[1][1]) if ratios else None


def threads_text(count):
    return f"{count} thread{'s' * (count > 1)}"


def time_text(seconds):
    """Three digits and a unit."""
    size, unit = next(found for found in TIME_UNITS if float(f"{seconds:.3g}") >= found[0] or found[1] == "ns")
    return f"{seconds / size:.3g} {unit}"


def as_markdown(run):
    machine = run["machine"]
    failures = {}
    for row in run["rows"]:
        for name, failure in row["failures"].items():
            cases = failures.setdefault(f"- {name}: {failure}", [])
            cases.append(f"{row['label']}, {threads_text(row['threads'])}")
    lines = [
        "# fastblock side by side with its peers",
        "",
        f"{machine['cpu']}, cores: {machine['cores']}; {machine['system']}; Python {machine['python']}; commit "
        f"{machine['commit']}. Started {run['started']}, when the load was {machine['load']}.",
        f"{'; '.join(filter(None, run['contestants'].values()))}.",
        "",
        "The columns of the contestants say how many times as long they take as fastblock: medians of the ratios "
        f"within rounds, of {run['rounds']} rounds or fewer. GFLOP/s count all operations, also skipped ones.",
        *(f"\nMissing: {name} ({reason})." for name, reason in run["missing"].items()),
        *_tables(run),
        *(["", "## Not done", ""] if failures else []),
        *(f"{failure} ({'; '.join(cases)})" for failure, cases in failures.items()),
        "",
    ]
    return "\n".join(lines)


def _tables(run):
    group = itemgetter("threads", "dtype")
    for (threads, dtype), rows in groupby(sorted(run["rows"], key=group), group):
        rows = [row for row in rows if row["seconds"].get("fastblock")]
        names = dict.fromkeys(name for row in rows for name in row["seconds"] if name not in ("fastblock", "FMA peak"))
        header = ["case", "fastblock", "quartiles", "GFLOP/s", "of FMA peak", *names, "best peer"]
        yield from ["", f"## {dtype}, {threads_text(threads)}", ""]
        for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *(_cells(row, names) for row in rows)):
            yield f"| {' | '.join(cells)} |"


def _cells(row, names):
    low, middle, high = quartiles(row["seconds"]["fastblock"])
    peak, best = ratio(row, "FMA peak"), best_peer(row)
    return [
        row["label"],
        time_text(middle),
        f"−{1 - low / middle:.0%} +{high / middle - 1:.0%}",
        f"{row['flops'] / middle / 1e9:.3g}",
        f"{peak[1]:.0%}" if peak else NOTHING,
        *(f"{found[1]:.2f}" if (found := ratio(row, name)) else NOTHING for name in names),
        f"**{best[1][1]:.2f}** {best[0]}" if best else NOTHING,
    ]
