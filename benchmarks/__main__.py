"""The command line: ``python -m benchmarks``. Exit status 1 if fastblock has returned something wrong."""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from .contestants import PEERS
from .machine import available_cores, machine
from .measure import Driver, threads_text
from .plan import full_plan, quick_plan
from .report import as_json, as_markdown
from .results import RaceResult, Results


def main():
    arguments = _arguments()
    plan = (quick_plan if arguments.quick else full_plan)(sorted(set(arguments.threads)), arguments.peers)
    # The roofline needs its roof, whatever is chosen.
    races = [race for race in plan if race.kind == "memory" or arguments.filter in f"{race.kind}: {race.label}"]
    if all(race.kind == "memory" for race in races):
        sys.exit(f"nothing in the plan contains {arguments.filter!r}")

    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rounds": arguments.rounds,
    }
    results = Results()
    with Driver(arguments.rounds) as driver, Progress(len(races)) as progress:
        for race in races:
            progress.start(f"{race.label}, {threads_text(race.entries[0].threads)}")
            results.append(RaceResult(race, driver.run(race, progress.show)))
        facts |= {"contestants": driver.facts(), "missing": driver.missing}

    text = as_markdown(results, facts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.md").write_text(text, encoding="utf-8")
    with open(arguments.out / "benchmarks.json", "w", encoding="utf-8") as file:
        json.dump(as_json(results, facts), file, indent=1, allow_nan=False)
    try:
        from .plots import write_plots
    except ModuleNotFoundError as error:
        plots = f"No plots: {error}. "
    else:
        plots = ""
        write_plots(results, arguments.out)
    print(f"{text}\n{plots}Written to {arguments.out}")
    return 1 if results.wrong() else 0


def _arguments():
    cores, names = len(available_cores()), [peer.name for peer in PEERS]

    def threads(text):
        count = cores if text == "all" else int(text)
        if not 1 <= count <= cores:
            raise argparse.ArgumentTypeError(f"expected 1 to {cores} or all, got {text}")
        return count

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fastblock side by side with its peers.")
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny shapes and 3 rounds, to see that everything works")
    add("--threads", nargs="+", type=threads, default=[1, cores], metavar="N", help="numbers, or all (default: 1 all)")
    add("--filter", default="", metavar="TEXT", help='only what contains it, such as "feed_forward 128"')
    add("--rounds", type=int, metavar="N", help="samples of each contestant (default: 15), fewer where they are long")
    add("--out", type=Path, default=Path("build/benchmarks"), metavar="DIR", help="default: %(default)s")
    add("--peers", nargs="*", choices=names, default=names, metavar="NAME", help=f"some of: {', '.join(names)}")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 15)
    if arguments.rounds < 3:
        parser.error("argument --rounds: expected at least 3, as quartiles are shown")
    return arguments


class Progress:
    """A bar on a terminal, elsewhere a line for each race."""

    def __init__(self, total):
        self.total, self.done, self.text = total, -1, ""

    def start(self, text):
        self.done, self.text = self.done + 1, text
        if sys.stderr.isatty():
            self.show(0)
        else:
            print(f"{self.done}/{self.total} {text}", file=sys.stderr, flush=True)

    def show(self, part):
        """`part` of the present race is done."""
        if sys.stderr.isatty():
            bar = "#" * int(30 * (self.done + part) / self.total)
            print(f"\r[{bar:.<30}] {self.done}/{self.total} {self.text:70.70}", end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
