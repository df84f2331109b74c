"""An operation as an ONNX model, for all libraries that read one."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from . import expressions


class OnnxGraph:
    """The primitives as nodes of a graph: values are the names of nodes, arrays become constants.

    `model` is the serialized model, `output` the name of its result.
    """

    def __init__(self, case, data):
        self._dtype, self._nodes, self._constants = np.dtype(case.dtype), [], []
        self.output = getattr(expressions, case.operation)(self, *case.inputs, **case.split(data)[1])
        kind = getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}[case.dtype])
        inputs = [helper.make_tensor_value_info(name, kind, data[name].shape) for name in case.inputs]
        output = helper.make_tensor_value_info(self.output, kind, case.output_shape)
        graph = helper.make_graph(self._nodes, case.operation, inputs, [output], self._constants)
        opset = helper.make_opsetid("", 17)
        self.model = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()

    def linear(self, x, w, bias):
        return self._node("Add", self._node("MatMul", x, w.T), bias)

    def relu(self, v):
        return self._node("Relu", v)

    def matmul(self, a, b):
        return self._node("MatMul", a, b)

    def scale(self, v, factor):
        return self._node("Mul", v, np.asarray(factor, self._dtype))

    def add(self, a, b):
        return self._node("Add", a, b)

    def softmax(self, v):
        return self._node("Softmax", v, axis=-1)

    def transposed(self, v):
        return self._node("Transpose", v, perm=[0, 2, 1])

    def _node(self, operator, *inputs, **attributes):
        output = f"v{len(self._nodes)}"
        inputs = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _constant(self, array):
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name
