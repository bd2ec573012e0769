"""Weights of layers with channel groups and of what PyTorch computes: packed, trained, frozen, restored."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig
from fastensdistill.engine.common import state_of
from fastensdistill.engine.flat_update import FlatUpdate
from fastensdistill.engine.optimizer import positions
from fastensdistill.engine.packed import TrainedWeights, pack
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.trained import TrainedPass
from fastensdistill.errors import InputError
from fastensdistill.kernels.adamw import adamw_kernel
from fastensdistill.kernels.branch_rows import branch_rows_kernel
from fastensdistill.kernels.clip_factors import clip_factors_kernel, squares_kernel
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.kernels.pack import pack_grouped_kernel, pack_kernel
from fastensdistill.kernels.sgd import sgd_kernel
from fastensdistill.kernels.unfold import unfold_factors_kernel, unfold_kernel
from fastensdistill.method.student import BatchEnsemble
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import Group, Part
from fastensdistill.network.nodes import Function, Network
from fastensdistill.network.plan import branch_groups, teach_groups
from tests.compare import check_close
from tests.engine import general
from tests.engine.cases import scattered
from tests.engine.general import SIDE, General
from tests.engine.launched import launched
from tests.network.models import moved
from tests.untyped import present

K, B = 2, 2
# Triton's interpreter, of a loop whose bounds are loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def student(norm: bool = False, dtype: torch.dtype = torch.float64) -> BatchEnsemble:
    torch.manual_seed(0)
    made = scattered(BatchEnsemble(moved(General(norm), 3), K)).to(dtype)
    assert isinstance(made, BatchEnsemble)
    return made


def trained(module: nn.Module, network: Network, dtype: torch.dtype) -> TrainedPass:
    """Its pass without launches, memory of gradients full of NaN."""
    part = Part("training", network, tuple(branch_groups(K)), B)
    parameters = FlatParameters([module], network, ranked=True)
    made = TrainedPass(part, replace(part, launches=[]), parameters, dtype, Execution())
    made.layer_gradients.fill_(torch.nan)
    parameters.gradient.fill_(torch.nan)
    return made


def step(run: TrainedPass, images: Tensor, d: Tensor) -> Tensor:
    """Logits of the branches, and the gradients and momentum of an update by those of d."""
    network, index = run.parameters.network, run.in_order
    run.refresh()
    values = general.forward(network, run.weights, index, images)
    tensors = {name: tensor[0] for name, tensor in run.weights.tensors.items()}
    logits = torch.stack([general.last(network, value, tensors) for value in values["three"]])
    general.backward(network, run.weights, values, d, dict(run.gradients))
    run.finish()
    return logits


@pytest.mark.parametrize(
    ("dtype", "kernels", "tolerance"),
    [(torch.float64, contextlib.nullcontext, 1e-11), (torch.float32, use_kernels, 2e-5)],
    ids=["references", "kernels"],
)
def test_a_step_is_autograds(dtype, kernels, tolerance):
    """dW, dr, ds, db and the gradient of what the branches share, then the update and its momentum."""
    own, other = student(dtype=dtype), student()
    images = torch.rand(B, 3, SIDE, SIDE, dtype=torch.float64)
    d = torch.randn(K, B, 6 * 4 * 7, dtype=torch.float64)
    expected = other(images)
    expected.backward(d)
    run = trained(own.module, general.network(), dtype)
    flat = run.parameters
    rule = FlatUpdate([own], flat, DistillConfig(weight_decay=5e-4))
    with kernels():
        logits = step(run, images.permute(0, 2, 3, 1)[None].contiguous().to(dtype), d.to(dtype))
    check_close("logits", logits, expected, tolerance)
    wanted = dict(other.module.named_parameters())
    for name, path in flat.paths.items():
        check_close(f"gradient of {path}", flat.view(flat.gradient, name)[0], present(wanted[path].grad), tolerance)
    for name, (start, count) in flat.factors.items():
        actual = run.factor_gradients[:, start : start + count]
        check_close(f"gradient of {name}", actual, present(wanted[name].grad), tolerance)
    optimizer = torch.optim.SGD(other.parameter_groups(5e-4), lr=0.1, momentum=0.9, nesterov=True)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    optimizer.step()
    with kernels():
        rule(torch.tensor(0.1, dtype=dtype), run.factor_gradients)
    momenta = rule.state_of(0)
    names = {id(p): name for name, p in own.module.named_parameters()}
    for i, parameter in enumerate(positions(own)):
        name = names[id(parameter)]
        check_close(name, parameter, wanted[name], tolerance)
        moved = optimizer.state[wanted[name]]["momentum_buffer"]
        check_close(f"momentum of {name}", momenta[f"momentum.{i}"], moved, tolerance)
    assert len(momenta) == len(wanted)


def evaluated(norm: bool, dtype: torch.dtype, first: int = 0) -> tuple[BatchEnsemble, TrainedWeights]:
    own = student(norm, dtype)
    network = general.network(norm)
    part = Part("evaluation", network, tuple(Group(str(k)) for k in range(K)), B)
    return own, TrainedWeights(part, FlatParameters([own.module], network, ranked=True), dtype, first)


@pytest.mark.parametrize("kernels", [contextlib.nullcontext, use_kernels], ids=["references", "kernels"])
def test_slots_in_evaluation_are_the_plain_networks(kernels):
    """With a BatchNorm in the weights of a grouped convolution; slots of others stay as they are."""
    dtype = torch.float64 if kernels is contextlib.nullcontext else torch.float32
    own, weights = evaluated(norm=True, dtype=dtype, first=1)
    stranger = moved(General(norm=True), 9).to(dtype).eval()
    weights.write(0, state_of(stranger))
    states = [state_of(stranger), *fold_branches(state_of(own.module), K)]
    expected = pack(weights.part, states, dtype, "cpu")
    with kernels():
        weights.refresh()
    assert weights.layers["pairs"].forward.shape == (1 + K, 3, 3, 10)
    assert expected.tensors.keys() == weights.tensors.keys() == {"scale", "order", "table"}
    assert weights.tensors["order"].dtype == torch.int64
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, weights.tensors[name]), name
    for name, layer in expected.layers.items():
        for kind in ("forward", "gradient", "bias"):
            if getattr(layer, kind) is not None:
                check_close(f"{name} {kind}", getattr(weights.layers[name], kind), getattr(layer, kind), tolerance)
    images = torch.rand(B, 3, SIDE, SIDE, dtype=dtype)
    index = torch.tensor([2, 0, 1], dtype=torch.int32)
    networks = [own.branch(1), stranger, own.branch(0)]
    x = images.permute(0, 2, 3, 1)[None].contiguous()
    with torch.no_grad():
        values = general.forward(general.network(norm=True), weights, index, x)["three"]
        for g, (slot, network) in enumerate(zip(index, networks, strict=True)):
            tensors = {name: tensor[slot] for name, tensor in weights.tensors.items()}
            logits = general.last(general.network(), values[g], tensors)
            check_close(f"group {g}", logits, network(images), 1e-11 if dtype == torch.float64 else 1e-4)


def test_launches():
    """However many parameters PyTorch computes with, they are written where the biases are."""
    _, weights = evaluated(norm=True, dtype=torch.float32)
    assert launched(weights.refresh) == ([branch_rows_kernel, pack_kernel, pack_grouped_kernel], [])
    own = student(dtype=torch.float32)
    run = trained(own.module, general.network(), torch.float32)
    assert launched(run.refresh) == ([branch_rows_kernel, pack_kernel, pack_grouped_kernel], [])
    rate = torch.tensor(0.1)

    def update(rule: FlatUpdate) -> None:
        run.finish()
        rule(rate, run.factor_gradients)

    unfold = [unfold_kernel, unfold_kernel, unfold_factors_kernel]
    rule = FlatUpdate([own], run.parameters, DistillConfig())
    assert launched(lambda: update(rule)) == ([*unfold, sgd_kernel, sgd_kernel], [])
    config = DistillConfig(optimizer="adamw", clip_norm=1.0, ema_decay=0.9, decay_norm_and_bias=False)
    rule = FlatUpdate([own], run.parameters, config)
    norms, more = [squares_kernel, squares_kernel, clip_factors_kernel], [adamw_kernel, adamw_kernel]
    assert launched(lambda: update(rule)) == ([*unfold, *norms, *more], ["copy_", "add_"])


def test_in_training_they_are_the_parameters_themselves():
    run = trained(student().module, general.network(), torch.float64)
    scale, flat = run.weights.tensors["scale"], run.parameters
    assert scale.shape == (1, 6, 1, 1)
    assert scale.data_ptr() == flat.view(flat.values, "scale").data_ptr()
    target = run.gradients["scale.grad"]
    assert target.data_ptr() == flat.view(flat.gradient, "scale").data_ptr()


def test_copies_have_their_own():
    networks = [moved(General(), seed).double() for seed in range(3)]
    networks[2].get_buffer("order").copy_(torch.arange(6))
    groups, _ = teach_groups(3)["forward"]
    flat = FlatParameters(networks, general.network(), ranked=False)
    weights = TrainedWeights(Part("", general.network(), tuple(groups), B), flat, torch.float64)
    weights.refresh()
    index, images = torch.arange(3, dtype=torch.int32), torch.rand(B, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        x = images.permute(0, 2, 3, 1)[None].contiguous()
        values = general.forward(general.network(), weights, index, x)["three"]
        for i, network in enumerate(networks):
            own = {name: tensor[i] for name, tensor in weights.tensors.items()}
            check_close(f"copy {i}", general.last(general.network(), values[i], own), network(images), 1e-11)


def test_frozen_ones_stay_and_are_thawed():
    own = student()
    frozen = ("scale", "depth.layer.weight", "pairs.delta_r")
    for name in frozen:
        own.module.get_parameter(name).requires_grad_(False)
    run = trained(own.module, general.network(), torch.float64)
    rule = FlatUpdate([own], run.parameters, DistillConfig(weight_decay=5e-4))
    images, d = torch.rand(1, B, SIDE, SIDE, 3, dtype=torch.float64), torch.randn(K, B, 168, dtype=torch.float64)
    for thawed in (False, True):
        before = copy.deepcopy(own.module.state_dict())
        step(run, images, d)
        rule(torch.tensor(0.1, dtype=torch.float64), run.factor_gradients)
        moved_now = {name for name, p in own.module.named_parameters() if not torch.equal(p, before[name])}
        assert moved_now == {name for name, _ in own.module.named_parameters() if thawed or name not in frozen}
        own.module.requires_grad_(True)
        assert run.parameters.follow() != thawed
        rule.follow()


def test_states_go_there_and_back():
    """A student's state dict is read from what is trained, and written to it; a state dict lacks what is not saved."""
    own, weights = evaluated(norm=True, dtype=torch.float64)
    saved = copy.deepcopy(own.state_dict())
    assert {"module.scale", "module.table"} <= saved.keys()
    assert "module.order" not in saved
    weights.refresh()
    before = weights.values.clone(), weights.packed.clone()
    weights.parameters.values.mul_(2)
    assert not torch.equal(own.state_dict()["module.scale"], saved["module.scale"])
    own.load_state_dict(saved)
    weights.refresh()
    for after, value in zip((weights.values, weights.packed), before, strict=True):
        assert torch.equal(after, value)
    plain = General(norm=True).double()
    with pytest.raises(KeyError, match="order"):
        pack(weights.part, [plain.state_dict()], torch.float64, "cpu")
    slots = pack(weights.part, [state_of(plain)], torch.float64, "cpu")
    slots.write(0, plain.state_dict())  # of the same network, whose order is known
    assert torch.equal(slots.tensors["order"][0], plain.order)


def test_what_several_nodes_compute_with_is_there_once():
    network = general.network()
    tail = network.by_name["tail"]
    assert isinstance(tail, Function)
    twice = Network((*network.nodes, replace(tail, name="again", inputs=("tail",))), "again")
    flat = FlatParameters([student().module], twice, ranked=True)
    assert flat.layout.plain == 6
    layer = replace(tail, trained=("depth.weight",), tensors=((6, 1, 3, 3), *tail.tensors[1:]))
    unclear = Network((*network.nodes[:-1], layer), "tail")
    module = General().double()
    del module.scale
    with pytest.raises(InputError, match=r"'depth\.weight' is a layer's"):
        FlatParameters.check(module, unclear, ranked=False)
    with pytest.raises(InputError, match="'scale' is in none of the layers"):
        FlatParameters.check(student().module, Network(network.nodes[:-1], "three"), ranked=True)
