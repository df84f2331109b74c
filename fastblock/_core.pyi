from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T", np.float32, np.float64)

def mix_positions(weights: NDArray[_T], x: NDArray[_T], *, out: NDArray[_T] | None = None) -> NDArray[_T]: ...
def bias_relu(x: NDArray[_T], bias: NDArray[_T], *, out: NDArray[_T] | None = None) -> NDArray[_T]: ...
def up_project(
    x: NDArray[_T], w1: NDArray[_T], b1: NDArray[_T] | None = None, *, out: NDArray[_T] | None = None
) -> NDArray[_T]: ...
def down_project(
    h: NDArray[_T], w2: NDArray[_T], b2: NDArray[_T] | None = None, *, out: NDArray[_T] | None = None
) -> NDArray[_T]: ...
def feed_forward(
    x: NDArray[_T],
    w1: NDArray[_T],
    b1: NDArray[_T] | None,
    w2: NDArray[_T],
    b2: NDArray[_T] | None,
    *,
    out: NDArray[_T] | None = None,
) -> NDArray[_T]: ...
def attention_weights(
    x: NDArray[_T],
    w_q: NDArray[_T],
    w_k: NDArray[_T],
    b_q: NDArray[_T] | None = None,
    b_k: NDArray[_T] | None = None,
    *,
    causal: bool = False,
    key_mask: NDArray[np.bool_] | None = None,
    out: NDArray[_T] | None = None,
) -> NDArray[_T]: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def _config() -> dict[str, Any]: ...

class PackedBlock:
    def __init__(
        self,
        w1: NDArray[Any],
        b1: NDArray[Any] | None,
        w2: NDArray[Any],
        b2: NDArray[Any] | None,
        *,
        w_q: NDArray[Any] | None = None,
        w_k: NDArray[Any] | None = None,
        b_q: NDArray[Any] | None = None,
        b_k: NDArray[Any] | None = None,
    ) -> None: ...
    def __call__(
        self,
        x: NDArray[_T],
        weights: NDArray[_T] | None = None,
        *,
        causal: bool = False,
        key_mask: NDArray[np.bool_] | None = None,
        out: NDArray[_T] | None = None,
    ) -> NDArray[_T]: ...
    def feed_forward(self, x: NDArray[_T], *, out: NDArray[_T] | None = None) -> NDArray[_T]: ...
    @property
    def w1(self) -> NDArray[Any]: ...
    @property
    def b1(self) -> NDArray[Any] | None: ...
    @property
    def w2(self) -> NDArray[Any]: ...
    @property
    def b2(self) -> NDArray[Any] | None: ...
    @property
    def w_q(self) -> NDArray[Any] | None: ...
    @property
    def w_k(self) -> NDArray[Any] | None: ...
    @property
    def b_q(self) -> NDArray[Any] | None: ...
    @property
    def b_k(self) -> NDArray[Any] | None: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def features(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def head_width(self) -> int | None: ...
