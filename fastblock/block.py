"""`Block` and `Stack`: they own parameters, check them against each other, and keep them in files.

No arithmetic happens here: `_core.PackedBlock` holds the packed parameters and is called directly, without a
Python frame in between.
"""

import os
from collections.abc import Sequence

from ._core import PackedBlock
from ._files import read_arrays, write_arrays

PARAMETERS = ("w1", "b1", "w2", "b2", "w_q", "w_k", "b_q", "b_k")


class Block(PackedBlock):
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
        Packed parameters or results do not fit into memory.

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

    def __repr__(self):
        return (
            f"{type(self).__name__}(features={self.features}, hidden={self.hidden}, "
            f"head_width={self.head_width}, dtype={self.dtype})"
        )

    def __reduce__(self):
        return _restore, (type(self), _parameters(self)), vars(self) or None

    def save(self, path):
        """Write the parameters to `path`, an .npz file without pickle, whole or not at all."""
        write_arrays(path, "Block", _parameters(self))

    @classmethod
    def load(cls, path):
        """Read a block that `save` has written.

        Raises
        ------
        ValueError
            The file is damaged, or something else than a saved block.
        OSError
            The file cannot be read.
        """
        _, arrays = read_arrays(path, "Block")
        return _from_file(path, _restore, cls, arrays)


class Stack(Sequence):
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

    def __init__(self, blocks):
        self._blocks = tuple(blocks)
        if not self._blocks:
            raise ValueError("blocks: expected at least one block, got none")
        for index, block in enumerate(self._blocks):
            if not isinstance(block, Block):
                raise TypeError(f"blocks[{index}]: expected a Block, got {type(block).__name__}")
            for name in ("dtype", "features"):
                first, this = getattr(self._blocks[0], name), getattr(block, name)
                if this != first:
                    error = TypeError if name == "dtype" else ValueError
                    raise error(f"blocks[{index}]: expected {name} {first} (as blocks[0]), got {this}")

    def __call__(self, x, weights=None, *, causal=False, key_mask=None, out=None):
        """Feed `x` through all blocks.

        Parameters
        ----------
        x : ndarray, shape (..., P, D)
        weights : ndarray, shape (..., P, P), or list or tuple of ndarray or None, optional
            The attention weights: one array for every block, or one for each, where None stands for the
            block's own query-key module.
        causal, key_mask
            As in a call of a `Block`.
        out : ndarray, shape (..., P, D), optional
            Where the result goes. It may overlap `x` or `weights`.

        Returns
        -------
        ndarray, shape (..., P, D)
            `out` if it was given.

        Raises
        ------
        ValueError
            The number of weights is not the number of blocks, or as in a call of a `Block`.
        """
        if isinstance(weights, (list, tuple)):
            if len(weights) != len(self):
                raise ValueError(f"weights: expected one for each of the {len(self)} blocks, got {len(weights)}")
        else:
            weights = [weights] * len(self)
        spare = None  # the input of the block before, free to become the output of the block after
        last = len(self) - 1
        for index, block in enumerate(self._blocks):
            try:
                target = spare if out is None or index < last else out
                y = block(x, weights[index], causal=causal, key_mask=key_mask, out=target)
            except Exception as error:
                error.add_note(f"in block {index} of the stack")
                raise
            spare, x = x if index else None, y
        return x

    @property
    def dtype(self):
        """The dtype of all parameters, inputs and outputs."""
        return self._blocks[0].dtype

    @property
    def features(self):
        """D, the number of features of a position."""
        return self._blocks[0].features

    def __len__(self):
        return len(self._blocks)

    def __getitem__(self, index):
        return type(self)(self._blocks[index]) if isinstance(index, slice) else self._blocks[index]

    def __repr__(self):
        blocks = "".join(f"    {block!r},\n" for block in self._blocks)
        return f"{type(self).__name__}([\n{blocks}])"

    def save(self, path):
        """Write the parameters of all blocks to `path`, an .npz file without pickle, whole or not at all."""
        write_arrays(
            path,
            "Stack",
            {f"{index}.{name}": array for index, block in enumerate(self) for name, array in _parameters(block).items()},
        )

    @classmethod
    def load(cls, path):
        """Read a stack that `save` has written; errors are those of `Block.load`."""
        _, arrays = read_arrays(path, "Stack")
        return _from_file(path, _restore_stack, cls, arrays)


def load(path):
    """Read a `Block` or a `Stack`, whichever the file holds."""
    kind, arrays = read_arrays(path, "Block", "Stack")
    return _from_file(path, *((_restore, Block) if kind == "Block" else (_restore_stack, Stack)), arrays)


def _parameters(block):
    return {name: array for name in PARAMETERS if (array := getattr(block, name)) is not None}


def _restore(cls, parameters):
    return cls(**{**dict.fromkeys(PARAMETERS), **parameters})


def _restore_stack(cls, arrays):
    parameters = {}
    for name, array in arrays.items():
        index, _, name = name.partition(".")
        parameters.setdefault(int(index), {})[name] = array
    return cls(_restore(Block, parameters[index]) for index in range(len(parameters)))


def _from_file(path, restore, cls, arrays):
    try:
        return restore(cls, arrays)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)}: the parameters in this file do not fit together ({error})") from error
