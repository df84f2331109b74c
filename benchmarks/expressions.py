"""The operations as expressions over six primitives, written once for all libraries.

`ops` has linear(x, w, bias), relu, matmul, scale, add and softmax, and transposed for the last two axes. Of the peers,
relu, scale and add work in place where the library can: the first argument is a temporary array.
"""

from types import SimpleNamespace

import numpy as np


def mix_positions(ops, weights, x):
    return ops.matmul(weights, x)


def bias_relu(ops, x, bias):
    """For NumPy only, which adds into a new array; others fuse or do this within up_project."""
    return ops.relu(ops.add(x, bias))


def up_project(ops, x, w1, b1):
    return ops.relu(ops.linear(x, w1, b1))


def down_project(ops, h, w2, b2):
    return ops.linear(h, w2, b2)


def feed_forward(ops, x, w1, b1, w2, b2):
    return down_project(ops, up_project(ops, x, w1, b1), w2, b2)


def block(ops, weights, x, w1, b1, w2, b2):
    return feed_forward(ops, mix_positions(ops, weights, x), w1, b1, w2, b2)


def attention_weights(ops, x, w_q, w_k, b_q, b_k, mask=None):
    """`mask` is -inf above the diagonal, else 0. Scaling the queries is cheaper than scaling the scores."""
    queries = ops.scale(ops.linear(x, w_q, b_q), w_q.shape[0] ** -0.5)
    scores = ops.matmul(queries, ops.transposed(ops.linear(x, w_k, b_k)))
    return ops.softmax(scores if mask is None else ops.add(scores, mask))


def _softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


NUMPY = SimpleNamespace(
    linear=lambda x, w, bias: x @ w.T + bias,
    relu=lambda v: np.maximum(v, 0),
    matmul=np.matmul,
    scale=lambda v, factor: v * v.dtype.type(factor),
    add=np.add,
    softmax=_softmax,
    transposed=np.matrix_transpose,
)
"""NumPy as one writes it down. In binary64 and beyond it is the truth that errors are measured against."""
