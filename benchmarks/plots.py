"""Results as pictures: ratios over shapes, a roofline, and cost against positions and hidden units."""

import math
from statistics import median

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .measure import threads_text
from .report import time_text
from .requirements import REQUIREMENTS

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.bbox": "tight",
}
OURS, THEIRS = "#08519c", "#8c8c8c"
DENSE, GAUSSIAN = "dense", "Gaussian, about half zeros"
VARIANTS = {  # of a shape: color and marker
    DENSE: ("#74a9cf", "o"),
    GAUSSIAN: (OURS, "o"),
    "50 % zeros": ("#807dba", "s"),
    "90 % zeros": ("#fd8d3c", "s"),
    "97 % zeros": ("#cb181d", "s"),
    "causal": ("#238b45", "D"),
}
OPERATIONS = {
    "feed_forward": (OURS, "o"),
    "up_project": ("#cb181d", "^"),
    "down_project": ("#fd8d3c", "v"),
    "mix_positions": ("#238b45", "D"),
    "attention_weights": ("#807dba", "s"),
    "block": ("#252525", "*"),
}
RATIO_TICKS = 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50


def write_plots(results, folder):
    """Those for which there are results."""
    with plt.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw(results)
            if figure is not None:
                figure.savefig(folder / f"{name}.png")
                plt.close(figure)


def ratios(results):
    """How many times as long the best peer takes: a line for each shape, a panel for each number of threads."""
    measured = [result for result in results.of_kind("comparison") if result.fastest()]
    if not measured:
        return None
    threads = sorted({result.threads for result in measured})
    rows = list(dict.fromkeys(_row(result.case) for result in measured))
    required = {r.work: r.bound for r in REQUIREMENTS if r.against == "best peer"}
    size = 3 + 4 * len(threads), 1.2 + 0.21 * len(rows)
    figure, panels = plt.subplots(1, len(threads), figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel, count in zip(panels[0], threads, strict=True):
        for variant, (color, marker) in VARIANTS.items():
            chosen = [result for result in measured if result.threads == count and _variant(result.case) == variant]
            points = [(result.fastest()[1].median, rows.index(_row(result.case))) for result in chosen]
            panel.scatter(*_columns(points), s=24, color=color, marker=marker, label=variant, zorder=3)
            if count == 1:  # as the requirements say
                bounds = [
                    (required[label], y)
                    for result, (_, y) in zip(chosen, points, strict=True)
                    if (label := result.case.label) in required
                ]
                panel.scatter(*_columns(bounds), s=70, color=color, marker="|", linewidth=1.2, zorder=2)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel("time of the best peer / time of fastblock")
        panel.set_title(threads_text(count))
    first = panels[0][0]
    first.set_xscale("log")
    low, high = first.get_xlim()
    first.set_xticks([tick for tick in RATIO_TICKS if low < tick < high])
    _plain_numbers(first.xaxis)
    first.set_yticks(range(len(rows)), rows)
    first.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Right of 1: faster than every peer. Small bars: what is required of the point of their color")
    return figure


def roofline(results):
    """GFLOP/s against operations per byte, float32 on one thread, under the roofs measured in the same run."""
    shown = [
        result
        for result in results.of_kind("comparison")
        if (result.threads, result.case.dtype) == (1, "float32")
        and getattr(result.case, "zeros", None) is None
        and not getattr(result.case, "causal", False)
        and result.seconds(result.entry("fastblock"))
    ]
    if not shown or not results.memory():
        return None
    figure, panel = plt.subplots(figsize=(7.5, 5))
    intensities = [result.case.flops / result.case.nbytes for result in shown]
    span = min(0.25, *intensities), max(200, *intensities) * 1.5  # wide enough for the slope and the peak
    peaks = [
        result.case.flops / seconds.median / 1e9
        for result in shown
        if (seconds := result.seconds(result.entry("FMA peak")))
    ]
    peak = median(peaks) if peaks else math.inf
    if peaks:
        panel.axhline(peak, color="black", linewidth=1)
        panel.annotate(f"FMA peak {peak:.0f} GFLOP/s", (span[1], peak), ha="right", va="bottom")
    slower_first = sorted(results.memory(), key=lambda item: item[0].nbytes / item[1])
    for (case, seconds), side in zip(slower_first, ("top", "bottom"), strict=False):
        rate = case.nbytes / seconds / 1e9
        ends = span[0], min(span[1], peak / rate)
        panel.plot(ends, [end * rate for end in ends], color="black", linewidth=1, linestyle="--")
        panel.text(
            ends[0] * 1.1,
            ends[0] * 1.1 * rate * (1.1 if side == "bottom" else 0.9),
            f"reads {case.nbytes >> 20} MiB at {rate:.0f} GB/s",
            rotation=math.degrees(math.atan(rate)),
            rotation_mode="anchor",
            transform_rotates_text=True,
            va=side,
        )
    for operation, (color, marker) in OPERATIONS.items():
        label = operation
        for result in shown:
            if result.case.operation == operation:
                x = result.case.flops / result.case.nbytes
                y = result.case.flops / result.seconds(result.entry("fastblock")).median / 1e9
                if best := result.fastest():
                    peer = y / best[1].median
                    panel.plot([x, x], [peer, y], color=THEIRS, linewidth=0.8, zorder=2)
                    panel.scatter(x, peer, s=14, color="white", edgecolors=THEIRS, marker=marker, zorder=3)
                panel.scatter(x, y, s=34, color=color, marker=marker, label=label, zorder=4)
                label = None  # once in the legend
    panel.scatter([], [], s=14, color="white", edgecolors=THEIRS, label="best peer, same case")
    panel.set(xscale="log", yscale="log", xlim=span, ylabel="GFLOP/s")
    panel.set_xlabel("floating-point operations per byte, each byte read or written once")
    for axis in panel.xaxis, panel.yaxis:
        _plain_numbers(axis)
    panel.set_title("float32, 1 thread. Skipped operations count, so that ReLU may lift a point above the peak")
    panel.legend(loc="lower right")
    return figure


def positions(results):
    """Time per position."""
    return _cost(results, "cost against positions", "positions", per="position")


def hidden(results):
    """Time of a call."""
    return _cost(results, "cost against hidden units", "hidden")


def _cost(results, kind, attribute, per=None):
    found = results.of_kind(kind)
    if not found:
        return None
    result = found[0]
    counts = list(dict.fromkeys(getattr(entry.case, attribute) for entry in result.race.entries))
    figure, panel = plt.subplots(figsize=(5, 3.4))
    for name, color in ("fastblock", OURS), ("numpy", THEIRS):
        points = [
            (count, seconds.median / (count if per else 1))
            for entry in result.race.entries
            if entry.contestant == name and (seconds := result.seconds(entry))
            for count in [getattr(entry.case, attribute)]
        ]
        panel.plot(*_columns(points), color=color, marker="o", label=name)
    panel.set(xscale="log", yscale="log", ylabel=f"time per {per or 'call'}")
    low, high = panel.get_ylim()
    panel.set_ylim(low / 2, high * 2)
    panel.set_xticks(counts)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.minorticks_off()
    _plain_numbers(panel.xaxis)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: time_text(value)))
    features, units = result.case.features, result.case.hidden
    if attribute == "positions":
        panel.set(title=f"feed_forward {features} -> {units}, float32, 1 thread", xlabel="positions")
    else:
        panel.set(title=f"feed_forward {result.case.positions} x {features}, float32, 1 thread", xlabel="hidden units")
    panel.legend()
    return figure


def _variant(case):
    if getattr(case, "causal", False):
        return "causal"
    zeros = getattr(case, "zeros", 0.0)
    if zeros is None:
        return GAUSSIAN
    return f"{100 * zeros:.0f} % zeros" if zeros else DENSE


def _row(case):
    return f"{case.operation}  {case.shape}" + (" float64" if case.dtype == "float64" else "")


def _columns(points):
    """(xs, ys), also of no points."""
    return [x for x, _ in points], [y for _, y in points]


def _plain_numbers(axis):
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


PLOTS = {"ratios": ratios, "roofline": roofline, "positions": positions, "hidden": hidden}
