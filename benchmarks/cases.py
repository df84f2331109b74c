"""The one table of what is measured, the data of each case, and the bits that fastblock has to return for it."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from fastblock import reference, walkthrough

HEAD_WIDTH = 64  # of a block's query-key module; attention_weights alone is as wide as its input
ROWS_CHECKED = 4


@dataclass(frozen=True)
class Case:
    """`shape` reads "batch x positions x features -> width of the next layer"; first and last may be missing."""

    operation: str
    shape: str
    input: str = "Gaussian"  # ReLU makes about half of the hidden values zero; or "97% zeros", or "worked example"
    mask: str = ""  # or "causal", or "padding": sequences are a quarter as long as the array, up to as long
    dtype: str = "float32"
    many_threads: bool = False  # measured on all cores, too, not on one only
    plotted: bool = False

    @property
    def label(self):
        remarks = (self.input.replace("Gaussian", ""), self.mask, self.dtype.replace("float32", ""))
        return ", ".join(filter(None, (f"{self.operation} {self.shape}", *remarks)))

    @cached_property
    def sizes(self):
        """(leading dimensions, positions, features, width of the next layer or 0)"""
        left, _, right = self.shape.partition(" -> ")
        *lead, positions, features = map(int, left.split(" x "))
        return tuple(lead), positions, features, int(right or 0)

    @property
    def head_width(self):
        """Of the query-key module; 0 without one."""
        if self.operation == "attention_weights":
            return self.sizes[2]
        return HEAD_WIDTH if self.operation == "block" and self.input != "worked example" else 0

    @property
    def output_shape(self):
        lead, positions, features, width = self.sizes
        own = {"attention_weights": positions, "up_project": width, "down_project": width}
        return *lead, positions, own.get(self.operation, features)

    @property
    def flops(self):
        """Floating-point operations of the whole matrix products, also of what may be skipped."""
        lead, positions, features, width = self.sizes
        attention = 4 * positions * features * self.head_width + 2 * positions**2 * self.head_width
        mixing = 2 * positions**2 * features if self.operation in ("mix_positions", "block") else 0
        layers = (1 if self.operation.endswith("_project") else 2) * 2 * positions * features * width
        return int(np.prod(lead, initial=1)) * (attention + mixing + layers)

    def data(self):
        """(what changes from call to call, parameters, which may be packed in advance): arguments in order, by name.

        A mask is the matrix that is added to the scores.
        """
        rng = np.random.default_rng(0)
        lead, positions, features, width = self.sizes
        x = rng.standard_normal((*lead, positions, features))
        inputs, parameters = {"x": x}, {}
        if self.operation == "mix_positions":
            weights = rng.random((*lead, positions, positions)) + 0.01
            weights = np.tril(weights) if self.mask else weights
            inputs = {"weights": weights / weights.sum(-1, keepdims=True), "x": x}
        for name in "qk" if self.head_width else "":
            parameters[f"w_{name}"] = rng.standard_normal((self.head_width, features)) / np.sqrt(features)
            parameters[f"b_{name}"] = rng.standard_normal(self.head_width) / 8
        if self.mask == "causal" and self.head_width:
            parameters["mask"] = np.triu(np.full((positions, positions), -np.inf), 1)
        elif self.mask == "padding":
            lengths = np.linspace(positions / 4, positions, lead[0]).astype(int)
            parameters["mask"] = np.where(np.arange(positions) < lengths[:, None, None], 0, -np.inf)
        w1, b1 = rng.standard_normal((width, features)) / np.sqrt(features), rng.standard_normal(width) / 8
        if self.input == "97% zeros":
            b1 -= round(np.quantile(x @ w1.T + b1, 0.97), 3)  # whatever last bits the BLAS of a process has
        if self.operation == "down_project":
            inputs, parameters = {"h": np.maximum(x, 0)}, {"w2": w1, "b2": b1}
        elif width:
            parameters |= {"w1": w1, "b1": b1}
        if self.operation in ("feed_forward", "block"):
            parameters["w2"] = rng.standard_normal((features, width)) / np.sqrt(width)
            parameters["b2"] = rng.standard_normal(features) / 8
        if self.input == "worked example":
            inputs, parameters = {"x": walkthrough.X, "weights": walkthrough.A}, walkthrough.BLOCKS[0]
        return tuple({n: np.array(a, self.dtype, order="C") for n, a in part.items()} for part in (inputs, parameters))

    @property
    def rows(self):
        """Index of what is checked of a result: rows of its last sequence, as the reference takes hours for all.

        A row does not depend on its neighbours, so that even few are compared bit for bit.
        """
        lead, positions, *_ = self.sizes
        return *(-1 for _ in lead), np.unique(np.linspace(0, positions - 1, ROWS_CHECKED).astype(int))

    @cache
    def expected(self):
        """The bits of these rows."""
        *last, rows = self.rows
        inputs, parameters = self.data()
        inputs = {name: array[tuple(last)] for name, array in inputs.items()}
        mask = fastblock_mask(self, parameters.pop("mask", None))
        if self.mask == "padding":
            mask["key_mask"] = mask["key_mask"][-1]
        projections = {name: parameters.pop(name) for name in ("w_q", "w_k", "b_q", "b_k") if name in parameters}
        if projections:
            inputs["weights"] = reference.attention_weights(**inputs, **projections, **mask)
            if self.operation == "attention_weights":
                return inputs["weights"][rows]
        if "weights" in inputs:
            inputs = {"x": reference.mix_positions(inputs["weights"][rows], inputs["x"])}
            if self.operation == "mix_positions":
                return inputs["x"]
            return reference.feed_forward(**inputs, **parameters)
        return getattr(reference, self.operation)(*(array[rows] for array in inputs.values()), **parameters)


def fastblock_mask(case, mask):
    """The keywords by which fastblock is told what others add to the scores."""
    if mask is None:
        return {}
    return {"causal": True} if case.mask == "causal" else {"key_mask": mask[:, 0] == 0}


_ONE, _ALL, _PLOT = False, True, True
# fmt: off
CASES = tuple(
    Case(*row)
    for row in [
        # operation            shape                    input             mask       dtype      threads plotted
        ("block",             "5 x 3 -> 4",            "worked example", "",        "float32", _ONE, _PLOT),
        ("block",             "8 x 16 x 256 -> 1024",  "Gaussian",       "causal",  "float32", _ONE),
        ("block",             "8 x 128 x 384 -> 1536", "Gaussian",       "padding", "float32", _ALL),
        ("block",             "512 x 768 -> 3072",     "Gaussian",       "causal",  "float32", _ALL, _PLOT),
        ("feed_forward",      "1 x 768 -> 3072",       "Gaussian",       "",        "float32", _ALL, _PLOT),
        ("feed_forward",      "1 x 768 -> 3072",       "97% zeros",      "",        "float32", _ALL),
        ("feed_forward",      "8 x 768 -> 3072",       "Gaussian",       "",        "float32", _ALL, _PLOT),
        ("feed_forward",      "8 x 768 -> 3072",       "97% zeros",      "",        "float32", _ALL),
        ("feed_forward",      "128 x 768 -> 3072",     "Gaussian",       "",        "float32", _ALL, _PLOT),
        ("feed_forward",      "128 x 768 -> 3072",     "97% zeros",      "",        "float32", _ALL, _PLOT),
        ("feed_forward",      "2048 x 768 -> 3072",    "Gaussian",       "",        "float32", _ALL),
        ("feed_forward",      "2048 x 768 -> 3072",    "97% zeros",      "",        "float32", _ALL),
        ("feed_forward",      "16 x 64 -> 256",        "Gaussian",       "",        "float32", _ONE, _PLOT),
        ("feed_forward",      "128 x 384 -> 1536",     "Gaussian",       "",        "float32", _ALL),
        ("feed_forward",      "128 x 384 -> 1536",     "97% zeros",      "",        "float32", _ALL),
        ("feed_forward",      "16 x 64 -> 256",        "Gaussian",       "",        "float64", _ONE),
        ("feed_forward",      "128 x 768 -> 3072",     "Gaussian",       "",        "float64", _ONE),
        ("up_project",        "8 x 768 -> 3072",       "Gaussian",       "",        "float32", _ONE),
        ("up_project",        "128 x 768 -> 3072",     "Gaussian",       "",        "float32", _ONE),
        ("up_project",        "128 x 768 -> 3072",     "Gaussian",       "",        "float64", _ONE),
        ("down_project",      "128 x 3072 -> 768",     "Gaussian",       "",        "float32", _ONE),
        ("mix_positions",     "12 x 128 x 64",         "Gaussian",       "",        "float32", _ALL),
        ("mix_positions",     "12 x 128 x 64",         "Gaussian",       "causal",  "float32", _ALL),
        ("mix_positions",     "512 x 768",             "Gaussian",       "",        "float32", _ALL, _PLOT),
        ("mix_positions",     "512 x 768",             "Gaussian",       "causal",  "float32", _ALL, _PLOT),
        ("mix_positions",     "2048 x 64",             "Gaussian",       "",        "float32", _ONE),
        ("mix_positions",     "2048 x 64",             "Gaussian",       "causal",  "float32", _ONE),
        ("mix_positions",     "512 x 768",             "Gaussian",       "",        "float64", _ONE),
        ("attention_weights", "12 x 128 x 64",         "Gaussian",       "",        "float32", _ALL),
        ("attention_weights", "12 x 128 x 64",         "Gaussian",       "causal",  "float32", _ALL),
        ("attention_weights", "12 x 512 x 64",         "Gaussian",       "",        "float32", _ALL, _PLOT),
        ("attention_weights", "12 x 512 x 64",         "Gaussian",       "causal",  "float32", _ALL, _PLOT),
        ("attention_weights", "12 x 2048 x 64",        "Gaussian",       "",        "float32", _ALL),
        ("attention_weights", "12 x 2048 x 64",        "Gaussian",       "causal",  "float32", _ALL),
        ("attention_weights", "12 x 128 x 64",         "Gaussian",       "",        "float64", _ONE),
    ]
)
# fmt: on
