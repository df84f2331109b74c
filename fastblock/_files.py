"""Files of parameters and results: written whole or not at all, and read without pickle.

A file of parameters is an uncompressed .npz archive. Its array `fastblock_format` says what the file holds,
"fastblock.Block/1" or "fastblock.Stack/1"; the others are the raw parameters.
"""

import errno
import os
import secrets
from contextlib import contextmanager, suppress

import numpy as np

MARKER = "fastblock_format"


@contextmanager
def atomic_write(path):
    """Open a new binary file that takes the place of `path` once the ``with`` block has succeeded.

    After any failure, an interrupt included, `path` is what it was, and nothing else is left behind.
    """
    path = os.fsdecode(path)
    target = os.path.realpath(path)  # a symbolic link stays one
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
    if os.path.exists(target) and not os.path.isfile(target):  # replacing /dev/null would be a catastrophe
        raise OSError(errno.EINVAL, "Not a regular file", path)
    temporary = os.path.join(os.path.dirname(target), f".fastblock-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
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


def one_line(text):
    """The text of an error or a name from a file, which can have several lines, for use within a sentence."""
    return " ".join(str(text).splitlines())


def write_arrays(path, kind, arrays):
    """Write the dictionary `arrays` as a file of parameters of a `kind`, "Block" or "Stack"."""
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **{MARKER: f"fastblock.{kind}/1"}, **arrays)


def read_arrays(path, *kinds):
    """Return the kind, one of `kinds`, and the dictionary of arrays of a file of parameters."""
    formats = {f"fastblock.{kind}/1": kind for kind in kinds}
    expected = f"{os.fsdecode(path)}: expected a file of parameters in the format {' or '.join(formats)}, got "
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
