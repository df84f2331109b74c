"""How each library is set up: a generator of the calls that do a case, of which the fastest stands for the library.

Parameters are packed and compiled before the clock starts; outputs go to memory that exists already, where that is
possible. Libraries are imported by their own functions only, as each has a process of its own.
"""

import importlib
from contextlib import ExitStack
from functools import partial, partialmethod
from importlib.metadata import version
from itertools import product
from types import SimpleNamespace

import numpy as np

from . import expressions
from .cases import fastblock_mask
from .timing import Call

PEAK_SECONDS = 10e-3
UNTIL_THE_END = ExitStack()  # of the process


def fastblock(case, inputs, parameters, threads):
    """Layers are those of a block with packed weights; attention weights and mixing have nothing to pack."""
    import fastblock

    keywords = fastblock_mask(case, parameters.pop("mask", None)) | {"out": np.empty(case.output_shape, case.dtype)}
    if case.operation in ("mix_positions", "attention_weights"):
        yield Call(getattr(fastblock, case.operation), (*inputs.values(),), parameters | keywords)
        return
    if case.operation == "up_project":
        parameters |= {"w2": parameters["w1"].T, "b2": None}
    elif case.operation == "down_project":
        parameters |= {"w1": parameters["w2"].T, "b1": None}
    block = fastblock.Block(**parameters)
    yield Call(block if case.operation == "block" else getattr(block, case.operation), (*inputs.values(),), keywords)


def fma_peak(case, inputs, parameters, threads):
    """No call: the time that the operations would take if the FMA units did nothing else, measured anew each time."""
    from fastblock import _core

    peak = partial(_core._peak, np.dtype(case.dtype), PEAK_SECONDS)
    yield SimpleNamespace(sample=lambda: case.flops / (1e9 * threads * peak()), way="")


def in_memory_orders(parameters):
    """(way, parameters) for each combination of memory orders of the weights: one of them suits the library best."""
    weights = [name for name in ("w1", "w2") if name in parameters] or [n for n in ("w_q", "w_k") if n in parameters]
    for orders in product("CF", repeat=len(weights)):
        ordered = {name: np.asarray(parameters[name], order=order) for name, order in zip(weights, orders, strict=True)}
        yield ", ".join(map("{} in {} order".format, weights, orders)), parameters | ordered


def numpy(case, inputs, parameters, threads):
    """No temporary array: the expression is traced once, into calls that write to arrays that exist already."""
    for way, ordered in in_memory_orders(parameters):
        trace = NumPyTrace()
        out = expressions.of(case, trace)(**inputs, **ordered)
        yield Call(trace.run, read=lambda _, out=out: out, way=way)


class Traced:
    def linear(self, x, w, bias):
        return self.add(self.matmul(x, w.T), bias)


class NumPyTrace(Traced):
    def __init__(self):
        self._steps = []

    def run(self):
        for step in self._steps:
            step()

    def _do(self, function, *arguments, out, **keywords):
        self._steps.append(partial(function, *arguments, out=out, **keywords))
        return out

    def matmul(self, a, b):
        return self._do(np.matmul, a, b, out=np.matmul(a, b))

    def transposed(self, v):
        return v.mT

    def relu(self, v):
        return self._do(np.maximum, v, v.dtype.type(0), out=v)

    def scale(self, v, factor):
        return self._do(np.multiply, v, v.dtype.type(factor), out=v)

    def add(self, a, b):
        return self._do(np.add, a, b, out=a)

    def softmax(self, v):
        each = np.empty((*v.shape[:-1], 1), v.dtype)
        self._do(np.max, v, axis=-1, keepdims=True, out=each)
        self._do(np.subtract, v, each, out=v)
        self._do(np.exp, v, out=v)
        self._do(np.sum, v, axis=-1, keepdims=True, out=each)
        self._do(np.divide, v.dtype.type(1), each, out=each)
        return self._do(np.multiply, v, each, out=v)


def torch(case, inputs, parameters, threads):
    """Eager. Its fused attention was never faster where values are wider than keys, as in a block here."""
    import torch

    torch.set_num_threads(threads)
    UNTIL_THE_END.enter_context(torch.inference_mode())
    ops = SimpleNamespace(linear=torch.nn.functional.linear, matmul=torch.matmul, transposed=lambda v: v.mT)
    ops.relu, ops.scale, ops.add = torch.relu_, torch.Tensor.mul_, torch.Tensor.add_
    ops.softmax = partial(torch.softmax, dim=-1)

    def tensors(arrays):
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    for way, ordered in in_memory_orders(parameters):
        yield Call(partial(expressions.of(case, ops), **tensors(ordered)), (*tensors(inputs).values(),), way=way)


def jax(case, inputs, parameters, threads):
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    ops = SimpleNamespace(matmul=jax.numpy.matmul, transposed=jax.numpy.matrix_transpose, softmax=jax.nn.softmax)
    ops.relu, ops.scale, ops.add = jax.nn.relu, jax.numpy.multiply, jax.numpy.add
    ops.linear = lambda x, w, bias: x @ w.T + bias
    expression = expressions.of(case, ops)
    inputs, parameters = ({n: jax.device_put(array) for n, array in part.items()} for part in (inputs, parameters))
    with_constants = jax.jit(partial(expression, **parameters))
    with_arguments = jax.jit(lambda parameters, *inputs: expression(*inputs, **parameters))
    for way, function, first in (("constants", with_constants, ()), ("arguments", with_arguments, (parameters,))):
        run = partial(lambda function, *arguments: function(*arguments).block_until_ready(), function)
        yield Call(run, (*first, *inputs.values()), way=f"parameters are {way}")


def onnxruntime(case, inputs, parameters, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    graph = OnnxGraph(case, inputs, parameters)
    session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    out = np.empty(case.output_shape, case.dtype)
    bound = session.io_binding()
    for name, array in inputs.items():
        bound.bind_cpu_input(name, array)
    bound.bind_output(graph.output, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
    yield Call(session.run_with_iobinding, (bound,), read=lambda _: out)


def openvino(case, inputs, parameters, threads):
    import openvino

    if case.dtype != "float32":
        raise NotImplementedError("computes float64 in float32")
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    model = core.read_model(OnnxGraph(case, inputs, parameters).model)
    request = core.compile_model(model, "CPU", options).create_infer_request()
    out = np.empty(case.output_shape, case.dtype)
    for name, array in inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out, shared_memory=True))

    def start_and_wait():
        request.start_async()
        request.wait()

    yield Call(start_and_wait, read=lambda _: (inputs, out)[1])  # which keeps the memory that is known by address only


class OnnxGraph(Traced):
    """An expression as the serialized ONNX `model`: values are the names of nodes, arrays become constants."""

    def __init__(self, case, inputs, parameters):
        self.onnx, self.case, self.nodes, self.constants = importlib.import_module("onnx"), case, [], []
        helper = self.onnx.helper
        self.output = expressions.of(case, self)(*inputs, **parameters)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
        inputs = [helper.make_tensor_value_info(name, kind, array.shape) for name, array in inputs.items()]
        output = helper.make_tensor_value_info(self.output, kind, case.output_shape)
        graph = helper.make_graph(self.nodes, case.operation, inputs, [output], self.constants)
        opset = helper.make_opsetid("", 17)
        self.model = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()

    def _node(self, operator, *inputs, **attributes):
        output = f"v{len(self.nodes)}"
        inputs = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    matmul = partialmethod(_node, "MatMul")
    add = partialmethod(_node, "Add")
    relu = partialmethod(_node, "Relu")
    softmax = partialmethod(_node, "Softmax", axis=-1)

    def scale(self, v, factor):
        return self._node("Mul", v, np.asarray(factor, self.case.dtype))

    def transposed(self, v):
        return self._node("Transpose", v, perm=[0, 2, 1] if self.case.sizes[0] else [1, 0])


PEERS = {"numpy": numpy, "torch": torch, "onnxruntime": onnxruntime, "openvino": openvino, "jax": jax}
CONTESTANTS = {"fastblock": fastblock, "FMA peak": fma_peak} | PEERS


def facts(name):
    """What a report says about a contestant; ModuleNotFoundError if it is not installed."""
    if name == "FMA peak":
        return ""
    library = importlib.import_module(name)
    if name in ("onnxruntime", "openvino"):
        importlib.import_module("onnx")
    if name == "fastblock":
        config = library.show_config(mode="dicts")
        return f"fastblock {config['version']} ({config['isa']}, {config['compiler']})"
    return f"{name} {version(name)}"
