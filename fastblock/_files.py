"""Files of parameters and results: written whole or not at all, and read without pickle.

A file of parameters is an uncompressed .npz archive. Its array `fastblock_format` says what the file holds,
"fastblock.Block/1" or "fastblock.Stack/1"; the others are the raw parameters.
"""

import errno
import os
import secrets
import stat
from contextlib import contextmanager, suppress

import numpy as np

from ._process import one_line

MARKER = "fastblock_format"


@contextmanager
def atomic_write(path):
    """Open a new binary file that takes the place of `path` once the ``with`` block has succeeded.

    After any failure, an interrupt included, `path` is what it was, and nothing else is left behind.
    """
    path = os.fsdecode(path)
    target = os.path.realpath(path)  # a symbolic link stays one
    if os.path.isdir(target) or os.path.basename(path) in ("", os.curdir, os.pardir):  # "new/" names no file
        raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
    if os.path.exists(path) and not os.path.isfile(path):  # replacing /dev/null would be a catastrophe
        raise OSError(errno.EINVAL, "Not a regular file", path)
    mode = stat.S_IMODE(os.stat(path).st_mode) & 0o777 if os.path.exists(path) else None
    temporary = os.path.join(os.path.dirname(target), f".fastblock-{secrets.token_hex(8)}.tmp")
    try:
        # What is not for everybody to read is not so for a moment.
        with open(temporary, "xb", opener=lambda *name: os.open(*name, 0o666 if mode is None else mode)) as file:
            if mode is not None:
                os.chmod(temporary, mode)  # also what the umask takes away
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename, error.filename2 = path, None  # the name that the caller knows
        raise


def check_seekable(path):
    """Refuse a pipe, terminal or other stream before it is opened, which could wait for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{os.fsdecode(path)}: expected a regular file, which can be read at any place, got a stream")


def write_arrays(path, kind, arrays):
    """Write the dictionary `arrays` as a file of parameters of a `kind`, "Block" or "Stack"."""
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **{MARKER: f"fastblock.{kind}/1"}, **arrays)


def read_arrays(path, *kinds):
    """Return the kind, one of `kinds`, and the dictionary of arrays of a file of parameters."""
    formats = {f"fastblock.{kind}/1": kind for kind in kinds}
    expected = f"{os.fsdecode(path)}: expected a file of parameters in the format {' or '.join(formats)}, got "
    check_seekable(path)
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError(expected + "a single array (.npy)")
            if MARKER not in archive:
                raise ValueError(expected + "an .npz file that fastblock has not written")
            if len(set(archive.files)) < len(archive.files):
                raise ValueError(expected + "an .npz file in which two arrays have one name")
            found = str(archive[MARKER])
            if found not in formats:
                raise ValueError(expected + one_line(found))
            return formats[found], {name: archive[name] for name in archive if name != MARKER}
        except Exception as error:  # a damaged file can fail in every layer below: NumPy, zipfile, zlib, struct
            if isinstance(error, ValueError) and str(error).startswith(expected):
                raise
            raise ValueError(expected + f"a file that cannot be read ({one_line(error)})") from error
