"""The command line: ``fastblock`` or ``python -m fastblock``.

Exit status 0: done. 1: a result differed from the reference. 2: bad input, in one sentence on stderr.
"""

import argparse
import math
import os
import signal
import sys
import threading
import time

import numpy as np

from . import __version__, show_config
from ._files import atomic_write, check_seekable, one_line
from .block import load


class _Terminated(BaseException):
    """A signal that ends a process by default; an exception so that the unfinished output is removed first."""

    SIGNALS = [
        getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")
        if hasattr(signal, name)
    ]

    @classmethod
    def catch(cls):
        for number in cls.SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:  # one that is ignored, as under nohup, stays ignored
                signal.signal(number, cls._raise)

    @classmethod
    def _raise(cls, number, frame):
        for other in cls.SIGNALS:  # a second one does not stop the cleaning
            signal.signal(other, signal.SIG_IGN)
        raise cls(number)


def main(argv=None):
    """Run the command line with the arguments `argv`; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has left, as `head` does: no traceback, and none when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except _Terminated as terminated:  # who waits for this process sees the signal
        [number] = terminated.args
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _parser():
    parser = argparse.ArgumentParser(
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
    run.add_argument("-o", "--output", metavar="OUTPUT.npy", required=True, help="the result, in the shape of the input")
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

    return 0 if walkthrough.main() else 1


def _config(arguments):
    show_config()
    return 0


def _run(arguments):
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        _Terminated.catch()
    try:
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
        with atomic_write(arguments.output) as file:
            _write_results(file, model, x, weights, arguments.causal)
    except OSError as error:
        return _bad_input(f"{error.filename or arguments.output}: {error.strerror or error}")
    except MemoryError as error:
        return _bad_input(f"{arguments.input}: not enough memory ({error})")
    except (TypeError, ValueError) as error:
        return _bad_input(error)
    return 0


def _bad_input(sentence):
    print(f"fastblock: {one_line(sentence)}", file=sys.stderr)
    return 2


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
    total = math.prod(x.shape[:-2])
    x = x.reshape(total, *x.shape[-2:])
    batched = weights is not None and weights.ndim > 2
    if batched:
        weights = weights.reshape(total, *weights.shape[-2:])
    done, size = 0, 1
    with _Progress(total) as progress:
        while True:  # once at least, so that an empty batch meets the same checks
            start = time.monotonic()
            part = slice(done, done + size)
            file.write(model(x[part], weights[part] if batched else weights, causal=causal).data)
            done = min(total, done + size)
            if done == total:
                return
            progress.update(done)
            if time.monotonic() - start < 0.1:
                size *= 2


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
