"""Results as a Markdown table to read and as JSON to keep."""

from dataclasses import asdict
from itertools import groupby

from .contestants import PEERS
from .measure import Entry, threads_text
from .requirements import REQUIREMENTS

NOTHING = "–"
TIME_UNITS = (1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")


def as_json(results, facts):
    """Everything, every sample included."""
    return {
        **facts,
        "races": [
            {
                "kind": result.race.kind,
                "label": result.race.label,
                "entries": [
                    {
                        "contestant": entry.contestant,
                        "threads": entry.threads,
                        "case": entry.case.facts(),
                        "seconds": (seconds := result.seconds(entry)) and asdict(seconds),
                        **asdict(outcome),
                    }
                    for entry, outcome in result.outcomes.items()
                ],
            }
            for result in results
        ],
        "requirements": [
            {"work": r.work, "against": r.against, "bound": r.bound, "at_most": r.at_most}
            | ({} if (measured := r.measure(results)) is None else {"measured": measured[0], "met": r.met(measured[0])})
            for r in REQUIREMENTS
        ],
    }


def as_markdown(results, facts):
    """The report that is printed and written next to the JSON."""
    machine = facts["machine"]
    return "\n".join(
        [
            "# fastblock side by side with its peers",
            "",
            f"{machine['cpu']}, {machine['cores']} cores; {machine['system']}; Python {machine['python']}; "
            f"commit {machine['commit']}. Started {facts['started']}.",
            "",
            "The columns of the contestants say how many times as long they take as fastblock: medians of the ratios "
            f"within rounds, of {facts['rounds']} rounds. GFLOP/s count all operations, also those that are skipped.",
            "",
            *(f"Missing: {name} ({reason})." for name, reason in facts["missing"].items()),
            *_requirements(results),
            *_comparisons(results),
            *_sweep(results, "cost against positions", "positions", "positions", "time per position"),
            *_sweep(results, "cost against hidden units", "hidden units", "hidden", "time per hidden unit"),
            *_scaling(results),
            *_memory(results),
            *_failures(results),
            "",
        ]
    )


def _table(title, header, rows):
    """The lines of a Markdown table under a heading; none if there are no rows."""
    if not rows:
        return []
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["", f"## {title}", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)]


def time_text(seconds):
    """Three digits and a unit."""
    size, unit = next((size, unit) for size, unit in TIME_UNITS if seconds >= size or unit == "ns")
    return f"{seconds / size:.3g} {unit}"


def _requirements(results):
    measured = [(requirement, requirement.measure(results)) for requirement in REQUIREMENTS]
    rows = [
        [
            r.work,
            r.against,
            f"{'≤' if r.at_most else '≥'} {r.bound:g}",
            f"{found[0]:.2f}" + (f" ({found[1]})" if found[1] and found[1] != r.against else ""),
            "met" if r.met(found[0]) else "**not met**",
        ]
        for r, found in measured
        if found
    ]
    lines = _table("Where it must stand", ["work", "in terms of", "required", "measured", ""], rows)
    if missing := len(REQUIREMENTS) - len(rows):
        lines += ["", f"{missing} of {len(REQUIREMENTS)} requirements are not measured in this run."]
    return lines


def _comparisons(results):
    def group(result):
        return result.case.operation, result.case.dtype, result.threads

    lines = []
    for (operation, dtype, threads), members in groupby(sorted(results.of_kind("comparison"), key=group), group):
        members = list(members)
        title = f"{operation}, {dtype}, {threads_text(threads)}"
        present = {entry.contestant for result in members for entry in result.outcomes if entry.case == result.case}
        names = [name for name in (*(peer.name for peer in PEERS), "numpy expression") if name in present]
        rows = [row for result in members if (row := _comparison(result, names))]
        header = ["case", "fastblock", "quartiles", "GFLOP/s", "of FMA peak", *names, "best peer"]
        lines += _table(title, header, rows)
        errors = [[_short(result)] + [_error(result, name) for name in ("fastblock", *names)] for result in members]
        lines += _table(f"Errors of {title}: root mean square, largest", ["case", "fastblock", *names], errors)
    return lines


def _short(result):
    return result.case.label.removeprefix(result.case.operation + " ").replace(", float64", "")


def _comparison(result, names):
    own = result.seconds(result.entry("fastblock"))
    if own is None:
        return None
    best, peak = result.fastest(), result.against("FMA peak")
    return [
        _short(result),
        time_text(own.median),
        f"−{1 - own.low / own.median:.0%} +{own.high / own.median - 1:.0%}",
        f"{result.case.flops / own.median / 1e9:.3g}",
        f"{peak.median:.0%}" if peak else NOTHING,
        *(f"{ratio.median:.2f}" if (ratio := result.against(name)) else NOTHING for name in names),
        f"**{best[1].median:.2f}** {best[0]}" if best else NOTHING,
    ]


def _error(result, name):
    outcome = result.outcomes.get(result.entry(name))
    if outcome is None or outcome.verdict.rms_error is None:
        return NOTHING
    return f"{outcome.verdict.rms_error:.1e}, {outcome.verdict.max_error:.1e}"


def _sweep(results, kind, heading, attribute, unit):
    rows = []
    for result in results.of_kind(kind):
        for case in dict.fromkeys(entry.case for entry in result.race.entries):
            count = getattr(case, attribute)
            times = [result.seconds(Entry(name, 1, case)) for name in ("fastblock", "numpy")]
            rows.append([f"{count}"] + [time_text(s.median / count) if s else NOTHING for s in times])
    return _table(f"{kind[0].upper()}{kind[1:]}: {unit}, 1 thread", [heading, "fastblock", "numpy"], rows)


def _scaling(results):
    rows = []
    for result in results.of_kind("scaling"):
        one = result.race.entries[0]
        for entry in result.race.entries:
            if (seconds := result.seconds(entry)) and (ratio := result.ratio(one, entry)):
                rows.append([_short(result), entry.threads, time_text(seconds.median), f"{ratio.median:.2f}"])
    return _table("Threads", ["case", "threads", "fastblock", "times as fast as 1"], rows)


def _memory(results):
    rows = [
        [f"{case.nbytes >> 20} MiB", f"{case.nbytes / seconds / 1e9:.1f} GB/s"] for case, seconds in results.memory()
    ]
    return _table("Reading memory, 1 thread", ["array", "rate"], rows)


def _failures(results):
    failures = {
        f"- {entry.contestant}, {threads_text(entry.threads)}, {entry.case.label}: {outcome.failure}"
        for result in results
        for entry, outcome in result.outcomes.items()
        if outcome.failure
    }
    return ["", "## Not done", "", *sorted(failures)] if failures else []
