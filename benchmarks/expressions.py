"""The operations as expressions over seven primitives, `ops`, written once for all peers.

relu, scale, add and softmax work in place where the library can: their first argument is a temporary array.
"""

from functools import partial


def of(case, ops):
    """The expression of a case; its inputs come first, in order, then parameters by name."""
    return partial(globals()[case.operation], ops)


def mix_positions(ops, weights, x):
    return ops.matmul(weights, x)


def up_project(ops, x, w1, b1):
    return ops.relu(ops.linear(x, w1, b1))


def down_project(ops, h, w2, b2):
    return ops.linear(h, w2, b2)


def feed_forward(ops, x, w1, b1, w2, b2):
    return down_project(ops, up_project(ops, x, w1, b1), w2, b2)


def attention_weights(ops, x, w_q, w_k, b_q, b_k, mask=None):
    """`mask` is -inf where a key is hidden, else 0. Scaling the queries is cheaper than scaling the scores."""
    queries = ops.scale(ops.linear(x, w_q, b_q), w_q.shape[0] ** -0.5)
    scores = ops.matmul(queries, ops.transposed(ops.linear(x, w_k, b_k)))
    return ops.softmax(scores if mask is None else ops.add(scores, mask))


def block(ops, x, weights=None, mask=None, *, w1, b1, w2, b2, **projections):
    if projections:
        weights = attention_weights(ops, x, mask=mask, **projections)
    return feed_forward(ops, mix_positions(ops, weights, x), w1, b1, w2, b2)
