"""`Block` and `Stack`: they own parameters, check them against each other, and keep them in files.

No arithmetic happens here: `_core.PackedBlock` holds the packed parameters, and it and `_core.PackedStack` are called
directly, without a Python frame in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias, overload

import numpy as np

from ._core import PackedBlock, PackedStack
from ._files import read_arrays, write_arrays
from ._process import one_line

if TYPE_CHECKING:
    _Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

PARAMETERS = ("w1", "b1", "w2", "b2", "w_q", "w_k", "b_q", "b_k")


class Saved:
    """What can be kept in a file: a `Block` or a `Stack`."""

    _kind: str  # in the file

    def save(self, path: _Path) -> None:
        """Write all parameters to `path`, an .npz file without pickle, whole or not at all.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            No suffix is added.

        Raises
        ------
        OSError
            The file cannot be written; what was there before still is.

        Examples
        --------
        >>> block = fastblock.Block(np.eye(2), None, np.eye(2), None)
        >>> block.save("block.npz")
        >>> fastblock.Stack([block, block]).save("stack.npz")
        """
        write_arrays(path, self._kind, self._arrays())

    @classmethod
    def load(cls, path: _Path) -> Self:
        """Read what `save` has written.

        Parameters
        ----------
        path : str, bytes or os.PathLike

        Returns
        -------
        Block or Stack
            Of the class that it was asked of, with the same parameters, bit for bit.

        Raises
        ------
        ValueError
            The file is damaged, or something else than what was asked for.
        OSError
            The file cannot be read.

        Examples
        --------
        >>> fastblock.Block(np.eye(2), None, np.eye(2), None).save("block.npz")
        >>> fastblock.Block.load("block.npz")
        Block(features=2, hidden=2, head_width=None, dtype=float64)
        """
        return _from_file(path, cls, read_arrays(path, cls._kind)[1])

    def _arrays(self) -> dict[str, Any]:
        raise NotImplementedError


class Block(PackedBlock, Saved):
    """One transformer block, with its parameters packed for the CPU once.

    ::

        y = relu((A x) w1ᵀ + b1) w2ᵀ + b2        A = softmax((x w_qᵀ + b_q)(x w_kᵀ + b_k)ᵀ / sqrt(E))

    The parameters are copied: later changes to the caller's arrays do not matter. All arrays have one dtype,
    float32 or float64. Weights are stored (out, in), as in `torch.nn.Linear`. A w2 of 2 MiB and more is kept twice: in
    panels, and in rows, of which few positions read only those that ReLU has not made superfluous.

    A block is called as ``block(x, weights=None, *, causal=False, key_mask=None, out=None)``. It takes x (..., P, D)
    and returns an array of that shape: `out` if it is given, which may overlap x. The positions are mixed with
    `weights` (..., P, P), or without them by the block's own query-key module, where ``causal=True`` lets a position
    attend to itself and those before it only, and key_mask (..., P), of bool, is True where a key is kept.

    Parameters
    ----------
    w1 : ndarray, shape (F, D)
    b1 : ndarray, shape (F,), or None
    w2 : ndarray, shape (D, F)
    b2 : ndarray, shape (D,), or None
    w_q, w_k : ndarray, shape (E, D), optional
        The query-key module, both or neither. A block without it needs `weights` in every call.
    b_q, b_k : ndarray, shape (E,), optional

    Attributes
    ----------
    w1, b1, w2, b2, w_q, w_k, b_q, b_k : ndarray or None
        Copies of the parameters, bit for bit.
    dtype : numpy.dtype
    features, hidden : int
        D and F.
    head_width : int or None
        E, or None without a query-key module.

    Raises
    ------
    ValueError
        A shape does not fit the others, in the parameters or in a call; a call has `weights` together with `causal` or
        `key_mask`, or has none and the block no query-key module; `out` is read-only.
    TypeError
        An argument is not an ndarray of float32 or float64, or dtypes differ.
    MemoryError
        Packed parameters or results do not fit into memory; `out` is as it was.
    KeyboardInterrupt
        Or whatever else a signal's handler raises: a long call in the main thread looks for signals every 30 ms or so.
        What `out` holds is undefined then.

    See Also
    --------
    fastblock.reference.block : the definition, in plain NumPy
    Stack : blocks one after another

    References
    ----------
    A. Vaswani et al., "Attention is all you need", 2017, sections 3.2.1 and 3.3.

    Examples
    --------
    >>> w1 = np.array([[1, 0], [0, 1], [-1, -1]], dtype=np.float32)
    >>> w2 = np.array([[1, 0, 1], [0, 1, 0]], dtype=np.float32)
    >>> block = fastblock.Block(w1, None, w2, None)
    >>> block
    Block(features=2, hidden=3, head_width=None, dtype=float32)
    >>> x = np.array([[1, 2], [3, 4]], dtype=np.float32)
    >>> weights = np.array([[1, 1], [0, 1]], dtype=np.float32)  # x1 := x1 + x2, x2 := x2
    >>> block(x, weights)
    array([[4., 6.],
           [3., 4.]], dtype=float32)
    """

    _kind = "Block"

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(features={self.features}, hidden={self.hidden}, "
            f"head_width={self.head_width}, dtype={self.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), self._packed), vars(self) or None

    def _arrays(self) -> dict[str, Any]:
        return {name: array for name in PARAMETERS if (array := getattr(self, name)) is not None}

    @classmethod
    def _restored(cls, arrays: dict[str, Any]) -> Self:
        return cls(**{**dict.fromkeys(PARAMETERS), **arrays})


class Stack(PackedStack, Saved, Sequence[Block]):
    """Blocks one after another: the output of one is the input of the next.

    Every block has parameters of its own; features and dtype are the same in all. A stack is a sequence of its
    blocks, a slice of it is a stack.

    Parameters
    ----------
    blocks : iterable of Block
        At least one.

    Raises
    ------
    ValueError
        There is no block, or blocks differ in features or dtype.
    TypeError
        An item is not a `Block`.

    Examples
    --------
    >>> identity = np.eye(2, dtype=np.float32)
    >>> double = fastblock.Block(2 * identity, None, identity, None)
    >>> stack = fastblock.Stack([double, double, double])
    >>> stack(np.ones((1, 2), dtype=np.float32), np.ones((1, 1), dtype=np.float32))
    array([[8., 8.]], dtype=float32)
    """

    _kind = "Stack"

    def __init__(self, blocks: Iterable[Block]) -> None:
        if self._blocks:
            raise RuntimeError("a stack cannot be initialised twice: make a new one")
        if not hasattr(type(blocks), "__iter__") and not hasattr(type(blocks), "__getitem__"):
            raise TypeError(f"blocks: expected an iterable of Block, got {type(blocks).__name__}")
        blocks = tuple(blocks)
        if not blocks:
            raise ValueError("blocks: expected at least one block, got none")
        for index, block in enumerate(blocks):
            if not isinstance(block, Block):
                raise TypeError(f"blocks[{index}]: expected a Block, got {type(block).__name__}")
            for name in ("dtype", "features"):
                first, this = getattr(blocks[0], name), getattr(block, name)
                if this != first:
                    error = TypeError if name == "dtype" else ValueError
                    raise error(f"blocks[{index}]: expected {name} {first} (as blocks[0]), got {this}")
        self._blocks = blocks

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_stack, (type(self), self._made()), self.__getstate__()

    @property
    def dtype(self) -> np.dtype[np.float32] | np.dtype[np.float64]:
        """The dtype of all parameters, inputs and outputs."""
        return self._made()[0].dtype

    @property
    def features(self) -> int:
        """D, the number of features of a position."""
        return self._made()[0].features

    def __len__(self) -> int:
        return len(self._made())

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Block | Self:
        return type(self)(self._made()[index]) if isinstance(index, slice) else self._made()[index]

    def __repr__(self) -> str:
        blocks = "".join(f"    {block!r},\n" for block in self._made())
        return f"{type(self).__name__}([\n{blocks}])"

    def _arrays(self) -> dict[str, Any]:
        return {f"{index}.{name}": array for index, block in enumerate(self) for name, array in block._arrays().items()}

    @classmethod
    def _restored(cls, arrays: dict[str, Any]) -> Self:
        blocks: dict[int, dict[str, Any]] = {}
        for name, array in arrays.items():
            number, _, name = name.partition(".")
            if not number.isdecimal() or number != str(int(number)):  # int() takes "00", "+0" and "0_0" for 0
                raise ValueError(f"expected the index of a block in the name of each array, got {number!r}")
            blocks.setdefault(int(number), {})[name] = array
        return cls(Block._restored(blocks[index]) for index in range(len(blocks)))


def load(path: _Path) -> Block | Stack:
    """Read a `Block` or a `Stack`, whichever the file holds."""
    kind, arrays = read_arrays(path, "Block", "Stack")
    return _from_file(path, Block if kind == "Block" else Stack, arrays)


def _unpickle(cls, packed):
    """A block of a class whose __init__ may take other arguments; pickle and copy bring its attributes."""
    block = PackedBlock.__new__(cls)
    block._adopt(packed)
    return block


def _unpickle_stack(cls, blocks):
    stack = PackedStack.__new__(cls)
    stack._blocks = blocks
    return stack


def _from_file(path, cls, arrays):
    try:
        return cls._restored(arrays)
    except (TypeError, ValueError, KeyError) as error:
        sentence = f"the parameters in this file do not fit together ({one_line(error)})"
        raise ValueError(f"{os.fsdecode(path)}: {sentence}") from error
