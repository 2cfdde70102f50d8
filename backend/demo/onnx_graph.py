"""Writes a small convolutional net as ONNX: a torch.fx trace, translated node by node.

torch's own exporter needs onnxscript; these nets use a dozen operations, and this way equal weights give equal bytes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

OPSET = 17
IR_VERSION = 8


class _Graph:
    """Collects ONNX nodes and weights under the names of the traced nodes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        """Kept in half precision, which halves the file; the runtime folds the cast away when it loads the model."""
        half = self.constant(f"{name}.half", tensor.detach().numpy().astype(np.float16))
        return self.add("Cast", [half], name, to=TensorProto.FLOAT)


def to_onnx(net: nn.Module, shape: tuple[int | str, int, int, int], outputs: Sequence[tuple[str, tuple[int | str, ...]]]) -> bytes:
    """Translates ``net`` in evaluation mode, batch norms folded into their convolutions.

    ``shape`` is the float32 input's (B, C, h, w), where B may be a name for any batch size; ``outputs`` are the names and shapes of what
    ``net`` returns, in order. Raises NotImplementedError for an operation that is not among those translated here.
    """
    traced = fx.symbolic_trace(folded(net))
    graph, names = _Graph(), {}
    results: list[str] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = "input"
        elif node.op == "output":
            returned = node.args[0]
            results = [names[value] for value in (returned if isinstance(returned, tuple) else (returned,))]
        else:
            module = traced.get_submodule(node.target) if node.op == "call_module" else None
            names[node] = _translate(graph, node, module, names)
    for (name, _), result in zip(outputs, results, strict=True):
        graph.add("Identity", [result], name)
    proto = helper.make_graph(
        graph.nodes,
        "miniature",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(size)) for name, size in outputs],
        graph.weights,
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="deephair")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def folded(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode in which every conv, batch norm, activation triple has its norm folded into the convolution."""
    net = copy.deepcopy(net).float().cpu().eval()
    for module in net.modules():
        if (
            isinstance(module, nn.Sequential)
            and len(module) > 1
            and isinstance(module[0], nn.Conv2d)
            and isinstance(module[1], nn.BatchNorm2d)
        ):
            module[0] = nn.utils.fusion.fuse_conv_bn_eval(module[0], module[1])
            module[1] = nn.Identity()
    return net


def _translate(graph: _Graph, node: fx.Node, module: nn.Module | None, names: dict[fx.Node, str]) -> str:
    inputs = [names[value] for value in node.args if isinstance(value, fx.Node)]
    if isinstance(module, nn.Conv2d):
        return _conv(graph, node.name, inputs[0], module)
    if isinstance(module, nn.Linear):
        weights = [graph.weight(f"{node.name}.{key}", value) for key, value in (("weight", module.weight), ("bias", module.bias))]
        return graph.add("Gemm", [inputs[0], *weights], node.name, transB=1)
    if isinstance(module, nn.SiLU):
        gate = graph.add("Sigmoid", inputs, f"{node.name}.gate")
        return graph.add("Mul", [inputs[0], gate], node.name)
    if isinstance(module, nn.Identity):
        return inputs[0]
    translate = _FUNCTIONS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if translate is None:
        raise NotImplementedError(f"no ONNX translation for {node.op} {node.target} ({type(module).__name__}); add it in {__name__}")
    return translate(graph, node.name, inputs)


def _conv(graph: _Graph, name: str, source: str, conv: nn.Conv2d) -> str:
    if conv.bias is None:
        raise NotImplementedError("a convolution without bias is only translated together with the batch norm behind it")
    weights = [graph.weight(f"{name}.weight", conv.weight), graph.weight(f"{name}.bias", conv.bias)]
    (kernel, _), (stride, _), (padding, _) = conv.kernel_size, conv.stride, conv.padding  # type: ignore[misc]
    return graph.add(
        "Conv",
        [source, *weights],
        name,
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[int(padding)] * 4,
        group=conv.groups,
    )


def _double(graph: _Graph, name: str, inputs: list[str]) -> str:
    scales = graph.constant(f"{name}.scales", np.array([1, 1, 2, 2], dtype=np.float32))
    return graph.add(
        "Resize", [inputs[0], "", scales], name, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


_FUNCTIONS: dict[Any, Callable[[_Graph, str, list[str]], str]] = {
    operator.add: lambda graph, name, inputs: graph.add("Add", inputs, name),
    torch.flatten: lambda graph, name, inputs: graph.add("Flatten", inputs, name, axis=1),
    nn.functional.interpolate: _double,
}
