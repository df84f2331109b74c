"""The command line: ``fastblock`` or ``python -m fastblock``.

Exit status 0: done. 1: a result differed from the reference, and nothing else. 2: bad input, or an output that cannot
be written, in one sentence on stderr. 3: a fault of fastblock, with a traceback. 130: interrupted. 141: the reader has
left.
"""

import argparse
import math
import sys
import threading
import time

import numpy as np

from . import __version__, _process, show_config
from ._files import atomic_write, check_seekable
from .layers import load

PART_BYTES = 2**24  # of a batch, at most, that are read, computed and written together


def main(argv=None):
    """Run the command line with the arguments `argv`; return the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.command(arguments)
    except SystemExit as leaving:  # the parser has printed help, or what is wrong
        status = leaving.code
    except (Exception, KeyboardInterrupt, _process.Terminated) as error:
        status = _process.status_of(error)
    return _process.finish(status)


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message, file=None):
        """What is wrong is said where there is somebody to tell; help that cannot be printed is a failure. Whether
        argparse itself lets a failure pass depends on the version of Python."""
        stream = sys.stderr if file is None else file
        try:
            if stream is not None:
                stream.write(message or "")
        except OSError:
            if stream is sys.stdout:
                raise

    def error(self, message):
        """Never on stdout, where argparse says it if there is no stderr."""
        self.exit(_process.BAD_INPUT, f"{self.format_usage()}{self.prog}: error: {message}\n")


def _parser():
    parser = _Parser(
        prog="fastblock",
        description="A transformer block on the CPU, exact to the bit. Without a command: a worked example with "
        "every step to check with pencil and paper, a comparison with the reference, and two timings.",
    )
    parser.add_argument("--version", action="version", version=f"fastblock {__version__}")
    parser.set_defaults(command=_walkthrough)
    commands = parser.add_subparsers(title="commands", metavar="{run,config}")

    run = commands.add_parser(
        "run",
        help="run a saved Block or Stack on an array",
        description="Run a saved Block or Stack on an array. Bad input is answered with one sentence and exit "
        "status 2, and an existing output stays as it is.",
    )
    run.add_argument("params", metavar="PARAMS.npz", help="written by Block.save or Stack.save")
    run.add_argument("input", metavar="INPUT.npy", help="features, shape (..., positions, features)")
    run.add_argument(
        "-o", "--output", metavar="OUTPUT.npy", required=True, help="the result, in the shape of the input"
    )
    run.add_argument(
        "--weights",
        metavar="A.npy",
        help="attention weights for every block, shape (positions, positions), or with the leading dimensions of the "
        "input in front; without them each block uses its own query-key module",
    )
    run.add_argument("--causal", action="store_true", help="a position attends to itself and those before it only")
    run.set_defaults(command=_run)

    config = commands.add_parser(
        "config",
        help="show version, CPU, instruction sets, threads and compiler",
        description="Show what this build of fastblock is, and what it uses on this machine.",
    )
    config.set_defaults(command=_config)
    return parser


def _walkthrough(arguments):
    from . import walkthrough

    _check_stdout()
    return _process.DONE if walkthrough.main() else _process.DIFFERS


def _config(arguments):
    _check_stdout()
    show_config()
    return _process.DONE


def _check_stdout():
    if sys.stdout is None:
        raise ValueError("standard output: expected a stream to print on, got a closed one")


def _run(arguments):
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        _process.Terminated.catch()
    for path in (arguments.params, arguments.input, arguments.weights, arguments.output):
        if path == "-":
            raise ValueError("-: expected the name of a file; standard streams are not used (./- is a file)")
    model = load(arguments.params)
    x = _open_array(arguments.input)
    expected = f"(..., positions, {model.features})"
    _check(arguments.input, x, model, expected, x.ndim >= 2 and x.shape[-1] == model.features)
    weights = None
    if arguments.weights is not None:
        weights = _open_array(arguments.weights)
        square = x.shape[-2:-1] * 2
        shapes = dict.fromkeys([square, x.shape[:-2] + square])
        _check(arguments.weights, weights, model, " or ".join(map(str, shapes)), weights.shape in shapes)
    try:
        with atomic_write(arguments.output) as file:
            _write_results(file, model, x, weights, arguments.causal)
    except OSError as error:  # of writing, which knows no name
        error.filename = error.filename or arguments.output
        raise
    except MemoryError as error:
        raise MemoryError(f"{error}; the input is {arguments.input}") from error
    return _process.DONE


def _open_array(path):
    """Map the array in an .npy file: what is not needed yet is not read yet."""
    check_seekable(path)
    with open(path, "rb") as file:
        magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    if magic != np.lib.format.MAGIC_PREFIX:
        found = "an .npz archive" if magic.startswith(b"PK") else "something else"
        raise ValueError(f"{path}: expected an array saved as .npy, got {found}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a damaged header makes NumPy do
        raise ValueError(f"{path}: expected an array saved as .npy, got one that cannot be read ({error})") from error


def _check(path, array, model, expected, fits):
    if not fits:
        raise ValueError(f"{path}: expected shape {expected}, got {array.shape}")
    if array.dtype != model.dtype:
        raise TypeError(f"{path}: expected dtype {model.dtype} (as the parameters), got {array.dtype}")


def _write_results(file, model, x, weights, causal):
    """Write `model` of `x` as .npy, a part of the batch at a time: by contract the split changes no bit."""
    np.lib.format.write_array_header_2_0(
        file, {"descr": np.lib.format.dtype_to_descr(x.dtype), "fortran_order": False, "shape": x.shape}
    )
    batched = weights is not None and weights.ndim > 2
    total = math.prod(x.shape[:-2])
    item_bytes = math.prod(x.shape[-2:]) * x.itemsize
    if batched:
        item_bytes += math.prod(weights.shape[-2:]) * weights.itemsize
    most = max(1, PART_BYTES // max(1, item_bytes))
    # An item of a Fortran-order file lies all over it: the more are read together, the fewer times it is read.
    done, size = 0, 1 if x.flags.c_contiguous else most
    with _Progress(total) as progress:
        while True:  # once at least, so that an empty batch meets the same checks
            start = time.monotonic()
            end = min(total, done + size)
            file.write(
                model(_items(x, done, end), _items(weights, done, end) if batched else weights, causal=causal).data
            )
            done = end
            if done == total:
                return
            progress.update(done)
            if time.monotonic() - start < 0.1:
                size = min(2 * size, most)


def _items(array, start, end):
    """Items start to end - 1 of the batch `array`, (end - start, ., .): no other is read or copied."""
    lead, item = array.shape[:-2], array.shape[-2:]
    if array.flags.c_contiguous or len(lead) < 2:
        return array.reshape(math.prod(lead), *item)[start:end]
    return array[np.unravel_index(np.arange(start, end), lead)]


class _Progress:
    """A bar on a terminal once the work has taken a second, and its last line when the work is over."""

    WIDTH = 40

    def __init__(self, total):
        self.total = total

    def __enter__(self):
        self.start = time.monotonic()
        self.shown = False
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        return self

    def update(self, done):
        elapsed = time.monotonic() - self.start
        if elapsed < 1 or not self.terminal:
            return
        self.shown = True
        share = done / self.total if self.total else 1
        bar = "#" * int(share * self.WIDTH)
        print(f"\r[{bar:<{self.WIDTH}}] {done} of {self.total}, {elapsed:.0f} s", end="", file=sys.stderr, flush=True)

    def __exit__(self, kind, *_):
        if kind is None:
            self.update(self.total)
        if self.shown:
            print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
