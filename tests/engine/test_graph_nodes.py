"""What a step issues: numbers that a stray copy, fill or cast would change, and that the counter sees one."""

import pytest
import torch

from fastensdistill.config import TeachConfig
from fastensdistill.engine.graph_nodes import GraphNodes, count_step
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.kernels.batch_norm import batch_norm_apply
from fastensdistill.kernels.perturb_step import perturb_step
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.models import create_model
from tests.untyped import untyped

# Launches of PyTorch's own in every step of the paper: the slots of the drawn pair, the logits of teachers and of
# branches as pairs, their gradients together, the number of batches, the scalars
PAPER = {"index_select": 1, "stack": 4, "add_": 1}
CASES = {
    "wrn28_1": ({}, 246, 5, PAPER),
    "resnet32": ({}, 292, 5, PAPER),
    "resnet18": ({}, 209, 5, PAPER),  # BatchNorms that keep the unbiased variance; six joint launches are two kernels
    "batch ensemble": ({"student": "batch-ensemble", "perturbation": "none"}, 188, 2, {"add_": 1, "stack": 1}),
    "in parts": ({"micro_batches": 2}, 484, 10, {"index_select": 2, "stack": 13, "mean": 2, "add_": 2, "div": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_nodes_of_a_step(case):
    settings, triton, extension, names = CASES[case]
    model = case if case.startswith("resnet") else "wrn28_1"
    nodes = count_step(model, **untyped(settings))
    assert nodes.pytorch == names
    assert nodes.extension.total() == extension
    assert nodes.triton.total() - nodes.triton["add_rows_kernel"] == triton  # how sums are split is the tiles' choice
    kinds = f"{nodes.triton.total()} Triton, {sum(names.values())} PyTorch, {extension} extension"
    assert str(nodes) == f"{nodes.total} graph nodes: {kinds}"


def test_a_head_per_branch_is_packed_with_the_rest():
    """Not layer by layer: what is left of PyTorch does not grow with the network."""
    small, large = (count_step(model, 2, 2, student="hydra").pytorch for model in ("wrn28_1", "resnet32"))
    assert small == large
    assert small.total() == 18


def test_nodes_of_teachers():
    with torch.device("meta"):
        networks = [create_model("wrn28_1", 100) for _ in range(3)]
        config = TeachConfig(members=3, precision="bf16")
        step = FusedTeachStep(networks, config, image_shape=(3, 32, 32))
    with torch.no_grad(), assume_arch(90):
        step.build((8, 3, 32, 32))
        with GraphNodes() as nodes:
            step.body()
    assert nodes.pytorch.total() == 9  # cross-entropy and its gradient, the number of batches
    assert nodes.triton["unfold_kernel"] == nodes.triton["sgd_kernel"] == nodes.triton["pack_kernel"] == 1
    assert nodes.extension.total() == 0


def test_what_counts():
    """Copies, fills and the launches inside of ops; neither views nor allocations."""
    with torch.device("meta"), GraphNodes() as nodes:
        x = torch.empty(2, 3, 4, 4, 8, dtype=torch.bfloat16)
        x[0].copy_(x[1])
        x.permute(0, 1, 4, 2, 3).contiguous()
        x.float()
        rows = torch.ones(1, 8)
        batch_norm_apply(x, rows, rows)
        perturb_step(x[0].float(), x.float(), 1.0)
    assert nodes.pytorch == {"copy_": 1, "clone": 1, "_to_copy": 3, "ones": 1}
    assert nodes.triton == {"batch_norm_apply_kernel": 1}
    assert nodes.extension == {"perturb_step": 1}
    assert nodes.total == 8
