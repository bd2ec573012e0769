"""What a network says about itself."""

from __future__ import annotations

from fastensdistill.network.nodes import Add, Dropout, Input, Linear, Network, ReLU

IMAGE = (4, 3, 3)
NODES = (
    Input("input", (), IMAGE),
    ReLU("relu", ("input",), IMAGE),
    Dropout("a", ("relu",), IMAGE, 0.1, "value"),
    Dropout("b", ("a",), IMAGE, 0.2, "image", scaled=False),
    Add("add", ("b", "relu"), IMAGE),
    Linear("head", ("add",), (2, 1, 1), IMAGE, bias=True),
)


def test_a_network_in_evaluation_has_no_dropout():
    network = Network(NODES, "head")
    add = Add("add", ("relu", "relu"), IMAGE)
    assert network.evaluated == Network((*NODES[:2], add, NODES[5]), "head")
    assert network.evaluated is network.evaluated
    assert network.evaluated.evaluated is network.evaluated


def test_dropout_at_the_end():
    assert Network((*NODES[:2], NODES[2]), "a").evaluated == Network(NODES[:2], "relu")
