"""One picture: how many times as long the peers take as fastblock, for the cases that the table of cases marks."""

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image  # as matplotlib requires

from .report import best_peer, quartiles, ratio, threads_text, time_text

STYLE = {
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{"figure.constrained_layout.use": True, "font.size": 9.5, "legend.frameon": False, "ytick.major.size": 0},
    **{"axes.grid": True, "axes.grid.axis": "x", "axes.axisbelow": True, "grid.color": "#e4e4e4"},
}
FASTER, SLOWER, PEER = "#9ecae1", "#fdae6b", "#404040"
NAMES = {"numpy": "NumPy", "torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "jax": "JAX"}
MARKERS = dict(zip(NAMES, "osD^v", strict=True))
TICKS = 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4
EDGE = 4  # what is beyond is drawn here, or one case would squeeze all others; the numbers say how far it is


def draw(run, path):
    """The plotted cases of the smallest number of threads, or all cases where none of those was measured."""
    threads = min(row["threads"] for row in run["rows"])
    rows = [row for row in run["rows"] if row["threads"] == threads and best_peer(row)]
    rows = [row for row in rows if row["plotted"]] or rows
    if not rows:
        return
    peers = [name for name in NAMES if any(name in row["seconds"] for row in rows)]
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(9, 2 + 0.32 * len(rows)))
        panel.set_xscale("log")
        lows = [_draw_row(panel, y, row) for y, row in enumerate(rows)]
        for name in peers:
            label = run["contestants"][name].replace(name, NAMES[name])
            panel.plot([], [], MARKERS[name], color="white", markeredgecolor=PEER, markersize=5, label=label)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(ylim=(len(rows) - 0.4, -0.6), xlim=(min(0.55, *lows) / 1.04, EDGE))
        panel.xaxis.set(major_locator=FixedLocator(TICKS), minor_locator=NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        panel.set_yticks(range(len(rows)), [_label(row) for row in rows])
        for x, across, text, align, color in [
            (0, "axes fraction", "case, and time of fastblock ", "right", PEER),
            (1, "data", "← a peer is faster ", "right", "#a63603"),
            (1, "data", " fastblock is faster →", "left", "#08519c"),
            (1, "axes fraction", "    fastest peer", "left", PEER),
        ]:
            panel.annotate(text, (x, 1.01), xycoords=(across, "axes fraction"), ha=align, color=color)
        panel.set_xlabel("time of a peer / time of fastblock, log scale; bar: median of the fastest, line: quartiles")
        figure.legend(loc="outside lower center", ncols=len(peers), handletextpad=0.1, columnspacing=1.2)
        figure.suptitle("How many times as fast as other libraries is fastblock?", weight="bold", fontsize=12)
        own, when, dtypes = run["contestants"]["fastblock"], run["started"][:10], {row["dtype"] for row in rows}
        subtitle = f"{own}, {run['machine']['cpu']}, {threads_text(threads)}, {' and '.join(sorted(dtypes))}, {when}\n"
        panel.set_title(subtitle, fontsize=9.5, color=PEER)
        figure.savefig(path, dpi=140)
        plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size, to be kept in git


def _draw_row(panel, y, row):
    """Bar, quartiles and number of the fastest peer, and a mark for each; the leftmost x is returned."""
    name, (low, middle, high) = best_peer(row)
    panel.barh(y, min(middle, EDGE) - 1, left=1, height=0.7, color=FASTER if middle >= 1 else SLOWER)
    panel.plot([min(low, EDGE), min(high, EDGE)], [y, y], color="black", linewidth=1.5, zorder=3)
    for peer, marker in MARKERS.items():
        if (found := ratio(row, peer)) and found[1] <= EDGE:
            panel.plot(found[1], y, marker, color="white", markeredgecolor=PEER, markersize=5, zorder=4)
    text = f"{'▸' if middle > EDGE else '  '} {middle:.2f}× {NAMES[name]}"
    panel.annotate(text, (1, y), (3, 0), ("axes fraction", "data"), "offset points", va="center")
    return low


def _label(row):
    return f"{row['label'].replace('->', '→')}   {time_text(quartiles(row['seconds']['fastblock'])[1]):>7}"
