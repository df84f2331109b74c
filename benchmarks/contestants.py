"""How each library is set up: every one in the way its own documentation calls fast, with all it can do in advance.

Parameters are constants of the model, packed and compiled before the clock starts; inputs are where the library wants
them; outputs go to memory that exists already, where the library can. Where there are several reasonable ways, all are
tried and the fastest stands for the library. A contestant lives in a process whose environment and affinity limit it to
`threads` threads (see `measure`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import expressions
from .calls import SAMPLE_SECONDS, Call, fastest


def in_memory_orders(parameters):
    """(way, parameters) for each combination of memory orders of the weights: one of them suits the library best."""
    weights = [name for name in parameters if name.startswith("w")]
    for orders in product("CF", repeat=len(weights)):
        order_of = dict(zip(weights, orders, strict=True))
        ordered = {name: np.asarray(parameters[name], order=order) for name, order in order_of.items()}
        yield ", ".join(f"{name} in {order} order" for name, order in order_of.items()), parameters | ordered


class Contestant:
    """A library in its own process. `prepare` turns a case and its data into a `Call`."""

    name: str
    packages: tuple[str, ...]

    def __init__(self, threads):
        self.threads = threads

    def facts(self):
        return {package: version(package) for package in self.packages}

    def context(self):
        """What holds while calls are made."""
        return nullcontext()

    def prepare(self, case, data):
        raise NotImplementedError


class Fastblock(Contestant):
    name = "fastblock"
    packages = ()

    def __init__(self, threads):
        super().__init__(threads)
        import fastblock

        self.library = fastblock

    def facts(self):
        return self.library.show_config(mode="dicts")

    def prepare(self, case, data):
        return getattr(self, case.operation)(**data)

    def mix_positions(self, weights, x):
        return Call(self.library.mix_positions, (weights, x), {"out": np.empty_like(x)})

    def bias_relu(self, x, bias):
        return Call(self.library.bias_relu, (x, bias), {"out": np.empty_like(x)})

    def up_project(self, x, w1, b1):
        block = self.library.Block(w1, b1, w1.T, None)
        return Call(block.up_project, (x,), {"out": np.empty((len(x), len(w1)), x.dtype)})

    def down_project(self, h, w2, b2):
        block = self.library.Block(w2.T, None, w2, b2)
        return Call(block.down_project, (h,), {"out": np.empty((len(h), len(w2)), h.dtype)})

    def feed_forward(self, x, w1, b1, w2, b2):
        return Call(self.library.Block(w1, b1, w2, b2).feed_forward, (x,), {"out": np.empty_like(x)})

    def block(self, weights, x, w1, b1, w2, b2):
        return Call(self.library.Block(w1, b1, w2, b2), (x, weights))

    def attention_weights(self, x, w_q, w_k, b_q, b_k, mask=None):
        out = np.empty((*x.shape[:-1], x.shape[-2]), x.dtype)
        keywords = {"b_q": b_q, "b_k": b_k, "causal": mask is not None, "out": out}
        return Call(self.library.attention_weights, (x, w_q, w_k), keywords)


class NumPy(Contestant):
    """Tuned: no temporary array, bias and ReLU in place, each weight matrix in the better of its two memory orders."""

    name = "numpy"
    packages = ("numpy",)

    def facts(self):
        try:
            from threadpoolctl import threadpool_info
        except ModuleNotFoundError:
            pools = "unknown without threadpoolctl"
        else:
            pools = [{k: v for k, v in pool.items() if k != "filepath"} for pool in threadpool_info()]
        return super().facts() | {"blas": pools}

    def prepare(self, case, data):
        inputs, parameters = case.split(data)
        operation = getattr(self, case.operation)
        return fastest(
            Call(operation(case, **inputs, **ordered), way=way) for way, ordered in in_memory_orders(parameters)
        )

    def read_memory(self, case, x):
        return partial(np.dot, x, x)

    def mix_positions(self, case, weights, x):
        return partial(np.matmul, weights, x, out=np.empty_like(x))

    def bias_relu(self, case, x, bias):
        return partial(_bias_relu, x, bias, np.empty_like(x))

    def up_project(self, case, x, w1, b1):
        h = np.empty((len(x), len(w1)), x.dtype)

        def run():
            np.matmul(x, w1.T, out=h)
            return _bias_relu(h, b1, h)

        return run

    def down_project(self, case, h, w2, b2):
        return partial(_linear, h, w2.T, b2, np.empty(case.output_shape, h.dtype))

    def feed_forward(self, case, x, w1, b1, w2, b2):
        h, y = np.empty((len(x), len(w1)), x.dtype), np.empty_like(x)

        def run():
            np.matmul(x, w1.T, out=h)
            _bias_relu(h, b1, h)
            return _linear(h, w2.T, b2, y)

        return run

    def block(self, case, weights, x, **parameters):
        z = np.empty_like(x)
        feed_forward = self.feed_forward(case, z, **parameters)

        def run():
            np.matmul(weights, x, out=z)
            return feed_forward()

        return run

    def attention_weights(self, case, x, w_q, w_k, b_q, b_k, mask=None):
        q, k = (np.empty((*x.shape[:-1], len(w_q)), x.dtype) for _ in range(2))
        scores = np.empty(case.output_shape, x.dtype)
        scale = x.dtype.type(len(w_q) ** -0.5)

        def run():
            _linear(x, w_q.T, b_q, q)
            _linear(x, w_k.T, b_k, k)
            np.multiply(q, scale, out=q)
            np.matmul(q, k.mT, out=scores)
            if mask is not None:
                np.add(scores, mask, out=scores)
            np.subtract(scores, scores.max(-1, keepdims=True), out=scores)
            np.exp(scores, out=scores)
            return np.multiply(scores, 1 / scores.sum(-1, keepdims=True), out=scores)

        return run


def _linear(x, w_transposed, bias, out):
    np.matmul(x, w_transposed, out=out)
    return np.add(out, bias, out=out)


def _bias_relu(x, bias, out):
    np.add(x, bias, out=out)
    return np.maximum(out, out.dtype.type(0), out=out)


class NumPyExpression(Contestant):
    """NumPy as one writes it down."""

    name = "numpy expression"
    packages = ("numpy",)

    def prepare(self, case, data):
        return getattr(self, case.operation)(**data)

    def mix_positions(self, weights, x):
        return Call(np.matmul, (weights, x))

    def block(self, weights, x, w1, b1, w2, b2):
        return Call(lambda: np.maximum(weights @ x @ w1.T + b1, 0) @ w2.T + b2)


class Torch(Contestant):
    """PyTorch, eager."""

    name = "torch"
    packages = ("torch",)

    def __init__(self, threads):
        super().__init__(threads)
        import torch

        self.library = torch
        torch.set_num_threads(threads)
        self.ops = SimpleNamespace(
            linear=torch.nn.functional.linear,
            relu=torch.relu_,
            matmul=torch.matmul,
            scale=torch.Tensor.mul_,
            add=torch.Tensor.add_,
            softmax=partial(torch.softmax, dim=-1),
            transposed=lambda v: v.mT,
        )

    def context(self):
        return self.library.inference_mode()

    def prepare(self, case, data):
        inputs, parameters = case.split(data)
        expression = partial(getattr(expressions, case.operation), self.ops)
        inputs = tuple(self._tensors(inputs).values())
        return fastest(
            Call(partial(expression, **self._tensors(ordered)), inputs, way=way)
            for way, ordered in in_memory_orders(parameters)
        )

    def _tensors(self, arrays):
        return {name: self.library.from_numpy(array) for name, array in arrays.items()}


class TorchCompiled(Torch):
    """PyTorch compiled, with frozen parameters."""

    name = "torch.compile"

    def prepare(self, case, data):
        torch = self.library
        torch._dynamo.reset()
        torch._inductor.config.freezing = True
        inputs, parameters = case.split(data)
        model = torch.nn.Module()
        for name, tensor in self._tensors(parameters).items():
            model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        expression = getattr(expressions, case.operation)
        model.forward = lambda *inputs: expression(self.ops, *inputs, **dict(model.named_parameters()))
        return Call(torch.compile(model, dynamic=False), tuple(self._tensors(inputs).values()))


class JAX(Contestant):
    name = "jax"
    packages = ("jax", "jaxlib")

    def __init__(self, threads):
        super().__init__(threads)
        import jax

        self.library = jax
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        numpy = jax.numpy
        self.ops = SimpleNamespace(
            linear=lambda x, w, bias: x @ w.T + bias,
            relu=jax.nn.relu,
            matmul=numpy.matmul,
            scale=numpy.multiply,
            add=numpy.add,
            softmax=jax.nn.softmax,
            transposed=numpy.matrix_transpose,
        )

    def prepare(self, case, data):
        put = self.library.device_put
        inputs, parameters = ({name: put(array) for name, array in part.items()} for part in case.split(data))
        expression = partial(getattr(expressions, case.operation), self.ops)
        with_constants = self.library.jit(partial(expression, **parameters))
        with_arguments = self.library.jit(expression)
        return fastest(
            (
                self._call(with_constants, *inputs.values(), way="parameters are constants"),
                self._call(with_arguments, *inputs.values(), *parameters.values(), way="parameters are arguments"),
            )
        )

    def _call(self, function, *arguments, way):
        return Call(lambda *arguments: function(*arguments).block_until_ready(), arguments, way=way)


class OnnxRuntime(Contestant):
    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")

    def __init__(self, threads):
        super().__init__(threads)
        import onnxruntime

        from .onnx_graph import OnnxGraph

        self.library, self.graph = onnxruntime, OnnxGraph
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    def prepare(self, case, data):
        """A call with arrays, or with memory bound to the session, which is better but for tiny ones."""
        graph = self.graph(case, data)
        session = self.library.InferenceSession(graph.model, self.options, providers=["CPUExecutionProvider"])
        inputs, _ = case.split(data)
        out = np.empty(case.output_shape, case.dtype)
        bound = session.io_binding()
        for name, array in inputs.items():
            bound.bind_cpu_input(name, array)
        bound.bind_output(graph.output, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
        return fastest(
            (
                Call(session.run, ([graph.output], inputs), read=lambda values: values[0], way="arrays"),
                Call(session.run_with_iobinding, (bound,), read=lambda _: out, way="bound memory"),
            )
        )


class OpenVINO(Contestant):
    name = "openvino"
    packages = ("openvino", "onnx")

    def __init__(self, threads):
        super().__init__(threads)
        import openvino

        from .onnx_graph import OnnxGraph

        self.library, self.graph = openvino, OnnxGraph
        self.core = openvino.Core()
        self.options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }

    def prepare(self, case, data):
        if case.dtype != "float32":
            raise NotImplementedError("computes float64 in float32")
        graph = self.graph(case, data)
        request = self.core.compile_model(self.core.read_model(graph.model), "CPU", self.options).create_infer_request()
        for name in case.inputs:
            request.set_tensor(name, self.library.Tensor(data[name], shared_memory=True))
        out = np.empty(case.output_shape, case.dtype)
        request.set_output_tensor(self.library.Tensor(out, shared_memory=True))

        def start_and_wait():
            request.start_async()
            request.wait()

        return fastest(
            (
                Call(request.infer, read=lambda _: out, way="infer", keep=data),
                Call(start_and_wait, read=lambda _: out, way="start and wait", keep=data),
            )
        )


class FmaPeak(Contestant):
    """The time that the floating-point operations of a case would take if the FMA units did nothing else."""

    name = "FMA peak"
    packages = ()

    def __init__(self, threads):
        super().__init__(threads)
        from fastblock import _core

        if not hasattr(_core, "_peak"):
            raise ModuleNotFoundError("this fastblock does not measure it")
        self.gflops_of_a_core = _core._peak

    def prepare(self, case, data):
        return TimeAtPeak(case, lambda: self.threads * self.gflops_of_a_core(np.dtype(case.dtype), SAMPLE_SECONDS))


@dataclass
class TimeAtPeak:
    """Sampled like a call, but computes nothing: the peak is measured anew each time."""

    case: Any
    gflops: Callable[[], float]
    way: str = ""

    def __call__(self):
        return None

    def sample(self):
        return self.case.flops / (1e9 * self.gflops())


PEERS = NumPy, Torch, TorchCompiled, OnnxRuntime, OpenVINO, JAX
CONTESTANTS = {contestant.name: contestant for contestant in (Fastblock, *PEERS, NumPyExpression, FmaPeak)}
