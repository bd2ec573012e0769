"""The recorded operations of a module, read one after the other into typed nodes."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx, nn

from fastensdistill.network.constants import Constant
from fastensdistill.network.expression import Call, Own
from fastensdistill.network.launch import INPUT
from fastensdistill.network.nodes import Affine, Input, Linear, Logits, Network, Node, Shape
from fastensdistill.network.read_functions import read_function
from fastensdistill.network.read_layers import read_layer
from fastensdistill.network.recording import Recorder
from fastensdistill.network.values import Values
from fastensdistill.network.views import DEVICE

MADE = "_tensor_constant"  # so torch.fx calls what is no attribute of the module
OTHER = "computes with a tensor that is neither a parameter nor a buffer of the module"


class Reader(Values):
    """Walks the recorded graph once."""

    def __init__(self, module: nn.Module, recorder: Recorder, input_size: Shape, training: bool, trains: bool):
        super().__init__(module, recorder, training, trains)
        self.input_size = input_size

    def read(self, graph: fx.Graph) -> Network:
        """The whole graph. Raises InputError, naming the module and the operation, for what cannot be planned."""
        *_, last = graph.nodes
        self.live = {last}
        for op in reversed(graph.nodes):
            if op in self.live:
                self.live.update(op.all_input_nodes)
        output = ""
        for op in graph.nodes:
            self.at(op)
            if op.op == "placeholder":
                self.image(op)
                continue
            if op not in self.live:
                continue
            self.fresh(op)
            if op.op == "output":
                output = self.end(op.args[0])
            elif op.op == "get_attr":
                self.attribute(op)
            elif op.op == "call_module":
                read_layer(self, op, self.module.get_submodule(str(op.target)))
            elif isinstance(op.meta.get("values", (Tensor,))[0], int):
                continue  # a number of images
            else:
                read_function(self, op)
            if "error" in op.meta:
                raise self.refuse(op.meta["error"])
        network = Network(self.reachable(output), output)
        self.check_whole(network)
        return network

    def image(self, op: fx.Node) -> None:
        """The argument of the module."""
        self.put(op, Input(INPUT, (), self.input_size), "image")

    def fresh(self, op: fx.Node) -> None:
        """Refuse an operation that reads what another one has overwritten."""
        if (overwriter := op.meta.get("stale")) is not None:
            reader = self.base
            self.at(overwriter)
            raise self.refuse(f"overwrites in place what {reader!r} reads afterwards")

    def attribute(self, op: fx.Node) -> None:
        """A tensor that the module has, or that its code has made."""
        name = str(op.target)
        if name in self.parameters or name in self.recorder.names.values():
            self.held[op] = Own(name)
            return
        value = self.recorder.constant(name)
        fixed = isinstance(value, Tensor) and not value.requires_grad
        if not fixed or (value.is_meta and self.recorder.device.type != "meta"):
            raise self.refuse(OTHER)
        if value.numel() == 1 and not value.is_meta:
            self.held[op] = value.item()
        elif name.startswith(MADE):
            self.held[op] = Call(Constant.of(value), (DEVICE,))
        else:
            raise self.refuse(OTHER)

    def end(self, result: object) -> str:
        """The name of the node that gives the logits."""
        if not self.fits(result) or len(self.shape(result)) != 2:  # type: ignore[arg-type]
            raise self.refuse("does not return one tensor of shape (batch, classes)")
        ref = self.vector(result)
        node = self.nodes[ref.name]
        if isinstance(node, Linear):
            return ref.name
        name = self.free_name("logits")
        self.nodes[name] = Logits(name, (ref.name,), node.shape)
        return name

    def reachable(self, output: str) -> tuple[Node, ...]:
        """The nodes the output depends on."""
        used = {output}
        for node in reversed(self.nodes.values()):
            if node.name in used:
                used.update(node.inputs)
        return tuple(node for node in self.nodes.values() if node.name in used)

    def check_whole(self, network: Network) -> None:
        """What only the whole network shows: normalisation first, and every parameter in one place."""
        for node in network.nodes:
            self.where, self.operation = node.name, type(node).__name__
            if isinstance(node, Affine) and node.inputs != (INPUT,):
                raise self.refuse("normalisation must stand behind the image")
        used = Counter(name for node in network.nodes for name in node.parameters)
        twice = next((name for name, count in used.items() if count > 1), None)
        if twice and self.trains:
            raise self.refuse(f"{twice!r} is used by more than one operation of its plan")
