"""The command line as a process: what it says of faults, its exit statuses, its standard streams and signals.

The package imports this first, without anything that could fail or take long: so a fault of the environment, or an
interrupt while NumPy is loaded, ends the command as it would later.
"""

import os
import re
import signal
import sys
import traceback

DONE, DIFFERS, BAD_INPUT, FAULT, INTERRUPTED, READER_LEFT = 0, 1, 2, 3, 130, 141


class Terminated(BaseException):
    """A signal that ends a process by default; an exception so that the unfinished output is removed first."""

    SIGNALS = [
        getattr(signal, name)
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")
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


def one_line(text):
    """The text of an error or a name from a file, which can have several lines, for use within a sentence."""
    return " ".join(str(text).splitlines())


def status_of(error):
    """The exit status of a command that ended in `error`, after saying on stderr what there is to say."""
    if isinstance(error, BrokenPipeError):  # the reader has left, as `head` does
        return READER_LEFT
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Terminated):  # who waits for this process sees the signal
        [number] = error.args
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if isinstance(error, OSError):
        say(f"{error.filename or 'standard output'}: {error.strerror or error}")
    elif isinstance(error, MemoryError):
        say(f"not enough memory ({error})")
    elif isinstance(error, (TypeError, ValueError, ImportError)):
        say(error)
    else:
        say("".join(traceback.format_exception(error)).rstrip(), lines=True)
        return FAULT
    return BAD_INPUT


def say(sentence, lines=False):
    """Print on stderr, if there is one: a message that nobody can be told changes no exit status."""
    if sys.stderr is not None:  # None is what Python makes of a closed stream, and print() of None is stdout
        try:
            print(sentence if lines else f"fastblock: {one_line(sentence)}", file=sys.stderr)
        except OSError:
            pass


def finish(status):
    """Flush the standard streams; return the exit status, which a failure to write on stdout changes."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            if stream is sys.stdout and status in (DONE, DIFFERS):
                status = status_of(error)
            # or Python would try again at exit, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _end(kind, error, trace):
    raise SystemExit(finish(status_of(error)))


def _is_command():
    """Whether this process runs the command: while -m imports the package, argv does not say yet whose -m it is."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m":
        return re.fullmatch(r"(-\w*m)?fastblock(\.__main__)?", sys.orig_argv[-len(sys.argv)]) is not None
    return name in ("fastblock", "fastblock.exe")


if _is_command():
    sys.excepthook = _end
