"""The command line: ``python -m benchmarks``. Exit status 1 if fastblock has returned something wrong."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import fastblock

from . import ROOT
from .cases import CASES
from .contestants import PEERS
from .measure import Driver, available_cores
from .report import as_markdown, threads_text

QUICK_FLOPS = 1e8


def main():
    arguments = _arguments()
    run = json.loads(arguments.redraw.read_text(encoding="utf-8")) if arguments.redraw else _measure(arguments)
    text = as_markdown(run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.json").write_text(json.dumps(run, indent=1, allow_nan=False), encoding="utf-8")
    (arguments.out / "benchmarks.md").write_text(text, encoding="utf-8")
    print(text)
    try:
        from .plot import draw
    except ModuleNotFoundError as error:
        print(f"No plot: {error}.")
    else:
        draw(run, arguments.out / "benchmarks.png")
    print(f"Written to {arguments.out}")
    return 1 if any("WRONG BITS" in row["failures"].values() for row in run["rows"]) else 0


def _measure(arguments):
    plan = [
        (case, count)
        for count in sorted(set(arguments.threads))
        for case in CASES
        if arguments.filter in case.label
        if count == 1 or case.many_threads
        if case.flops < QUICK_FLOPS or not arguments.quick
    ]
    if not plan:
        sys.exit(f"no case contains {arguments.filter!r}")
    run = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "rounds": arguments.rounds}
    driver, rows = Driver(arguments.peers, arguments.rounds), []
    for number, (case, threads) in enumerate(plan, start=1):
        print(f"{number}/{len(plan)} {case.label}, {threads_text(threads)}", file=sys.stderr, flush=True)
        rows.append(driver.run(case, threads))
    return run | {"contestants": driver.facts, "missing": driver.missing, "rows": rows}


def machine():
    """What a result depends on besides the contestants."""
    command = shlex.join(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"])
    failed, commit = subprocess.getstatusoutput(command)
    return {
        "cpu": fastblock.show_config(mode="dicts")["cpu"],
        "cores": len(available_cores()),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": "unknown" if failed else commit,
    }


def _arguments():
    cores = len(available_cores())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fastblock side by side with its peers.")
    add = parser.add_argument
    add("--quick", action="store_true", help="small shapes and 3 rounds, to see that everything works")
    counts = range(1, cores + 1)
    add("--threads", nargs="+", type=int, choices=counts, default=[1, cores], metavar="N", help="default: 1, all cores")
    add("--filter", default="", metavar="TEXT", help='only what contains it, such as "feed_forward 128"')
    add("--rounds", type=int, default=15, metavar="N", help="samples of each, fewer of long ones (default: 15)")
    add("--out", type=Path, default=Path("build/benchmarks"), metavar="DIR", help="default: %(default)s")
    add("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="NAME", help=f"some of: {', '.join(PEERS)}")
    add("--redraw", type=Path, metavar="JSON", help="measure nothing: report and plot of an earlier run")
    arguments = parser.parse_args()
    arguments.rounds = max(3, 0 if arguments.quick else arguments.rounds)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
