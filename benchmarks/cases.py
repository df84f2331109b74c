"""What can be measured: an operation, its shape and its data, how much work it is, and what the right result is.

Letters as in the formulas: P positions, D features, F hidden units, E head width. All data are float64 Gaussians
rounded to the dtype, from one seed.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from fastblock import reference

from . import expressions

ROWS_CHECKED = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape. Cases are values: equal ones are the same row of every table."""

    operation: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("x",)  # the others are parameters, which a library may pack in advance
    positions: int
    features: int
    dtype: str = "float32"

    @property
    def shape(self):
        return f"{self.positions} x {self.features}"

    @property
    def label(self):
        return f"{self.operation} {self.shape}" + (", float64" if self.dtype == "float64" else "")

    @property
    def flops(self):
        """Floating-point operations when nothing is skipped."""
        raise NotImplementedError

    @property
    def output_shape(self):
        return self.positions, self.features

    def data(self):
        """The arguments of the operation, by name."""
        rng = np.random.default_rng(0)
        return {name: np.ascontiguousarray(array, self.dtype) for name, array in self._data(rng).items()}

    def split(self, data):
        """(inputs, parameters)"""
        inputs = {name: data[name] for name in self.inputs}
        return inputs, {name: array for name, array in data.items() if name not in inputs}

    @property
    def sample(self):
        """The index of the part of a result that is checked: here, a few rows.

        A result of fastblock does not depend on its neighbours, so a part can be compared with the reference bit for
        bit when the whole would take hours.
        """
        return np.unique(np.linspace(0, self.positions - 1, ROWS_CHECKED).astype(int))

    def data_of_sample(self, data):
        return data | {name: data[name][self.sample] for name in self.inputs}

    def reference(self, data):
        """The bits that fastblock has to return."""
        return getattr(reference, self.operation)(**data)

    def truth(self, data):
        """The result in a precision that makes its own error invisible, or None where NumPy has none."""
        wide = np.dtype(np.float64 if self.dtype == "float32" else np.longdouble)
        if np.finfo(wide).eps >= np.finfo(self.dtype).eps:
            return None
        expression = getattr(expressions, self.operation)
        return expression(expressions.NUMPY, **{name: array.astype(wide) for name, array in data.items()})

    @property
    def nbytes(self):
        """What has to be read and written once, if nothing is skipped and caches are large enough."""
        elements = sum(array.size for name, array in self.data().items() if name != "mask")
        return (elements + math.prod(self.output_shape)) * np.dtype(self.dtype).itemsize

    def facts(self):
        """The case as JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"operation": self.operation, "label": self.label, "flops": self.flops} | own


class BiasReLU(Case):
    operation = "bias_relu"

    @property
    def flops(self):
        return 2 * self.positions * self.features

    def _data(self, rng):
        return {"x": rng.standard_normal((self.positions, self.features)), "bias": rng.standard_normal(self.features)}


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """A layer, or two, of the feed-forward network."""

    hidden: int

    @property
    def shape(self):
        return f"{super().shape} -> {self.hidden}"

    @property
    def flops(self):
        return 2 * self.positions * self.features * self.hidden

    def _layer(self, rng, number, width_in, width_out):
        return {
            f"w{number}": rng.standard_normal((width_out, width_in)) / np.sqrt(width_in),
            f"b{number}": rng.standard_normal(width_out) / 8,
        }


class UpProject(LayerCase):
    operation = "up_project"

    @property
    def output_shape(self):
        return self.positions, self.hidden

    def _data(self, rng):
        x = rng.standard_normal((self.positions, self.features))
        return {"x": x, **self._layer(rng, 1, self.features, self.hidden)}


class DownProject(LayerCase):
    """Positive input: there is no zero to skip."""

    operation = "down_project"
    inputs = ("h",)

    @property
    def shape(self):
        return f"{self.positions} x {self.hidden} -> {self.features}"

    def _data(self, rng):
        h = np.abs(rng.standard_normal((self.positions, self.hidden)))
        return {"h": h, **self._layer(rng, 2, self.hidden, self.features)}


@dataclass(frozen=True, kw_only=True)
class FeedForward(LayerCase):
    """`zeros` is the share of hidden values that ReLU makes zero; None leaves the data Gaussian: about half."""

    operation = "feed_forward"
    zeros: float | None = None

    @property
    def label(self):
        return super().label + ("" if self.zeros is None else f", {self.zeros:.0%} zeros")

    @property
    def flops(self):
        return 2 * super().flops

    def _data(self, rng):
        x = rng.standard_normal((self.positions, self.features))
        up = self._layer(rng, 1, self.features, self.hidden)
        if self.zeros is not None:
            # a hair below the quantile, so that 0 % is none
            up["b1"] -= np.quantile(x @ up["w1"].T + up["b1"], self.zeros) - 1e-4
        return {"x": x, **up, **self._layer(rng, 2, self.hidden, self.features)}


@dataclass(frozen=True, kw_only=True)
class Block(LayerCase):
    """The whole block with given attention weights, small enough to be checked whole."""

    operation = "block"
    inputs = ("weights", "x")

    @property
    def flops(self):
        return 2 * self.positions**2 * self.features + 2 * super().flops

    @property
    def sample(self):
        return ...

    def _data(self, rng):
        return {
            "weights": _attention_weights(rng, (self.positions, self.positions)),
            "x": rng.standard_normal((self.positions, self.features)),
            **self._layer(rng, 1, self.features, self.hidden),
            **self._layer(rng, 2, self.hidden, self.features),
        }


@dataclass(frozen=True, kw_only=True)
class SequenceCase(Case):
    """An operation across positions, on one sequence or on `batch` independent ones."""

    batch: int | None = None
    causal: bool = False

    @property
    def shape(self):
        return " x ".join(map(str, (*self.lead, self.positions, self.features)))

    @property
    def label(self):
        return super().label + (", causal" if self.causal else "")

    @property
    def lead(self):
        return () if self.batch is None else (self.batch,)

    @property
    def output_shape(self):
        return *self.lead, self.positions, self.features

    @property
    def sample(self):
        """One sequence."""
        return ... if self.batch is None else slice(-1, None)


class MixPositions(SequenceCase):
    operation = "mix_positions"
    inputs = ("weights", "x")

    @property
    def flops(self):
        return 2 * (self.batch or 1) * self.positions**2 * self.features

    def _data(self, rng):
        weights = _attention_weights(rng, (*self.lead, self.positions, self.positions), self.causal)
        return {"weights": weights, "x": rng.standard_normal(self.output_shape)}


@dataclass(frozen=True, kw_only=True)
class AttentionWeights(SequenceCase):
    operation = "attention_weights"
    head_width: int

    @property
    def output_shape(self):
        return *self.lead, self.positions, self.positions

    @property
    def flops(self):
        projections = 4 * self.positions * self.features * self.head_width
        return (self.batch or 1) * (projections + 2 * self.positions**2 * self.head_width)

    def _data(self, rng):
        data = {
            "x": rng.standard_normal((*self.lead, self.positions, self.features)),
            "w_q": rng.standard_normal((self.head_width, self.features)) / np.sqrt(self.features),
            "w_k": rng.standard_normal((self.head_width, self.features)) / np.sqrt(self.features),
            "b_q": rng.standard_normal(self.head_width) / 8,
            "b_k": rng.standard_normal(self.head_width) / 8,
        }
        if self.causal:  # fastblock takes the word for it, the others this matrix
            data["mask"] = np.triu(np.full((self.positions, self.positions), -np.inf), 1)
        return data

    def reference(self, data):
        arguments = {name: array for name, array in data.items() if name != "mask"}
        return reference.attention_weights(**arguments, causal=self.causal)


@dataclass(frozen=True, kw_only=True)
class ReadMemory(Case):
    """No operation of a block: how fast one vector can be read, for the roof of the roofline."""

    operation = "read_memory"
    positions: int = 1

    @property
    def flops(self):
        return 2 * self.features

    @property
    def output_shape(self):
        return ()

    @property
    def sample(self):
        return ...

    def reference(self, data):
        return None

    def truth(self, data):
        return None

    def _data(self, rng):
        return {"x": rng.standard_normal(self.features)}


def _attention_weights(rng, shape, causal=False):
    weights = rng.random(shape) + 0.01
    if causal:
        weights = np.tril(weights)
    return weights / weights.sum(-1, keepdims=True)
