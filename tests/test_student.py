"""Students: effective weights, the average, gradients and decay of the factors, any network."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import DenseNet
from torchvision.models.resnet import Bottleneck, ResNet

from fastensdistill.config import DistillConfig
from fastensdistill.engine.optimizer import Optimizer
from fastensdistill.errors import InputError
from fastensdistill.method.student import (
    STUDENTS,
    BatchEnsemble,
    Hydra,
    LatentBE,
    RankOneLayer,
    Single,
    reestimate_batch_norm,
)
from fastensdistill.models import create_model
from tests.compare import check_close
from tests.networks import scatter, tiny
from tests.untyped import present, untyped


class Odd(nn.Module):
    """Grouped and depthwise convolutions with biases, a layer used twice, a linear layer inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=4)
        self.depthwise = nn.Conv2d(12, 24, 3, groups=12, padding=2, dilation=2)
        self.again = nn.Conv2d(24, 24, 1)
        self.bn = nn.BatchNorm2d(24)
        self.head = nn.Sequential(nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, x):
        x = self.depthwise(self.grouped(self.stem(x)).relu())
        x = self.bn(self.again(self.again(x).relu()))
        return self.head(x.mean((2, 3)))


def torchvision_model(name):
    return create_model(name, 5)


def like_vgg():
    """Of VGG's layers, without its hundred million weights."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(7),
        nn.Flatten(), nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


NETWORKS = {
    "preresnet": (tiny, 8),
    "resnet": (lambda: create_model("resnet", 5, blocks=(1, 1), in_planes=4), 9),
    "odd layers": (Odd, 12),
    "resnet18": (lambda: torchvision_model("resnet18"), 32),
    "bottlenecks": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16), 32),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), 32),
    "like VGG": (like_vgg, 32),
    "densenet": (lambda: DenseNet(8, (2, 2), 16, num_classes=5), 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_branch_is_the_network_with_its_own_weights(name):
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    network = build().double()
    student = scatter(LatentBE(network, 2)).double().eval()
    assert not any(isinstance(m, RankOneLayer) for m in network.modules()), "the wrapped network was changed"
    assert len(student.layers()) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    student.checked.add((3, size, size))  # which compares the same once more, and these are large
    with torch.no_grad():
        both = student(x)
        for k in range(2):
            check_close(f"branch {k}", both[k], student.branch(k)(x), 1e-12)
        check_close("chosen branches", student(x, branches=[1, 0]), both.flip(0), 1e-12)
        average = student.average().eval()
        assert type(average) is type(network)
        mean = LatentBE(network, 1).double().eval()
        mean.load_state_dict({
            k: v.mean(0, keepdim=True) if "delta_" in k else v for k, v in student.state_dict().items()
        })  # fmt: skip
        check_close("average", average(x), mean(x)[0], 1e-12)


def test_timm_network_with_its_own_convolution_class():
    pytest.importorskip("timm", reason="timm is an extra")
    network = create_model("timm/tf_efficientnet_lite0", 5).double()  # Conv2dSame has a forward of its own
    student = scatter(LatentBE(network, 2)).double().eval()
    x = torch.rand(1, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        check_close("branch 1", student(x, branches=[1])[0], student.branch(1)(x), 1e-11)


def test_mixtures_of_factors():
    """Average and branches among them, points between and beyond; each from its own merged weights. A copy."""
    student = scatter(LatentBE(Odd(), 3)).double()
    before = copy.deepcopy(student.state_dict())
    rows = torch.tensor([[1, 1, 1], [0, 3, 0], [1.5, 0, 1.5], [4, -2, 1]], dtype=torch.float64) / 3
    mixed, x = student.mixed(rows), torch.rand(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        found = mixed(x)
        check_close("average", found[0], student.average()(x), 1e-12)
        check_close("branch 1", found[1], student.branch(1)(x), 1e-12)
        for p, row in enumerate(rows):
            one = LatentBE(Odd(), 1).double().eval()
            one.load_state_dict({
                k: (row[:, None] * v).sum(0, keepdim=True) if "delta_" in k else v for k, v in before.items()
            })  # fmt: skip
            check_close(f"point {p}", found[p], one(x)[0], 1e-12)
        for tensor in mixed.state_dict().values():
            tensor.fill_(7)
    assert not any(m.training for m in mixed.modules())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    halves, sums = torch.ones(1, 2) / 2, "rows that sum to one"
    refused = [(halves, r"\(1, 2\): expected \(points, 3\)"), (halves[0], r"shape \(2,\)")]
    refused += [(halves[:0], r"shape \(0, 2\)"), (torch.ones(2, 3), sums), (rows * torch.nan, sums)]
    for wrong, said in refused:
        with pytest.raises(InputError, match=said):
            student.mixed(wrong)
    with pytest.raises(InputError, match="a single student has no factors to mix"):
        Single(tiny()).mixed(torch.ones(1, 1))


def test_product_of_means_and_mean_of_products_differ_and_are_what_they_say():
    student = scatter(LatentBE(tiny(), 3)).double()
    layer = untyped(student).module.groups[0][0].conv1
    w, r, s = layer.layer.weight, layer.r, layer.s
    outer = lambda s, r: s[:, None, None, None] * w * r[None, :, None, None]  # noqa: E731
    with torch.no_grad():
        product = untyped(student.average()).groups[0][0].conv1.weight
        mean = untyped(student.average_effective_weights()).groups[0][0].conv1.weight
        check_close("product of means", product, outer(s.mean(0), r.mean(0)), 1e-14)
        check_close("mean of products", mean, sum(outer(s[k], r[k]) for k in range(3)) / 3, 1e-14)
    assert (product - mean).abs().max() > 1e-3


def test_batch_norm_sees_all_branches_together():
    torch.manual_seed(0)
    student = LatentBE(tiny(), 3).double().train()
    seen = []
    untyped(student).module.bn.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].detach()))
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    student(scatter(student) and x)
    assert seen[0].shape[0] == 12
    running = untyped(student).module.bn.running_mean.clone()
    student(x)
    expected = 0.9 * running + 0.1 * seen[1].mean((0, 2, 3))
    check_close("running mean", untyped(student).module.bn.running_mean, expected, 1e-12)


def test_equal_branches_at_the_start():
    student = LatentBE(tiny(), 3).eval()
    x = torch.rand(2, 3, 8, 8)
    logits = student(x)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], student.average()(x))


def test_factors_step_with_k_fold_gradient_and_are_pulled_towards_one():
    """grad r_k = K·∂L/∂r_k + λ(r_k − 1), the rest ∂L/∂p + λp, one learning rate, Nesterov (docs/method.md, Loss)."""
    torch.manual_seed(0)
    lam, lr, momentum, k = 0.03, 0.2, 0.8, 3
    student = scatter(LatentBE(tiny(), k)).double()
    optimizer = Optimizer(student, DistillConfig(weight_decay=lam, learning_rate=lr, momentum=momentum))
    expected = {n: p.detach().clone() for n, p in student.named_parameters()}
    buffers: dict[str, torch.Tensor] = {}
    for step in range(3):
        x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
        optimizer.zero_grad()
        student(x).square().mean().backward()
        for n, p in student.named_parameters():
            grad = present(p.grad) * (k if "delta_" in n else 1) + lam * expected[n]
            buffers[n] = grad if step == 0 else momentum * buffers[n] + grad
            expected[n] = expected[n] - lr * (grad + momentum * buffers[n])
        optimizer.step()
        for n, p in student.named_parameters():
            check_close(f"step {step} {n}", p, expected[n], 1e-12)


def test_penalty_counts_factor_deviations_once_for_all_branches():
    student = scatter(LatentBE(tiny(), 4)).double()
    expected = torch.zeros((), dtype=torch.float64)
    for n, p in student.named_parameters():
        expected = expected + p.square().sum() / 2 / (4 if "delta_" in n else 1)
    check_close("penalty", student.penalty(), expected, 1e-13)


def test_hydra_shares_the_body_and_has_heads_of_its_own():
    torch.manual_seed(0)
    network = tiny().double().eval()
    hydra = Hydra(network, 3).eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    logits = hydra(x)
    check_close("head 0 is the network's", logits[0], network(x), 1e-13)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    check_close("chosen heads", hydra(x, branches=[2]), logits[2:], 1e-13)
    calls = []
    untyped(hydra).module.stem.register_forward_hook(lambda *_: calls.append(1))
    hydra(x)
    assert len(calls) == 1
    assert hydra.deployed() is hydra


def test_hydra_refuses_a_network_that_does_not_end_in_a_linear_layer():
    with pytest.raises(InputError, match="ends in a Linear"):
        Hydra(nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2)


def test_what_is_deployed():
    assert isinstance(LatentBE(tiny(), 2).deployed(), type(tiny()))
    batch_ensemble = BatchEnsemble(tiny(), 2)
    assert batch_ensemble.deployed() is batch_ensemble
    single = Single(tiny())
    assert single.deployed() is single.module
    check_close("one branch", single.eval()(torch.ones(1, 3, 8, 8))[0], single.module(torch.ones(1, 3, 8, 8)), 0.0)


def test_reestimated_batch_norm_is_the_mean_over_batches_and_leaves_the_rest():
    torch.manual_seed(0)
    network = untyped(scatter(tiny()).train())
    network.groups[0].eval()
    momentum, weights = network.bn.momentum, copy.deepcopy(dict(network.named_parameters()))
    batches = [torch.rand(6, 3, 8, 8) for _ in range(3)]
    stem = [network.stem(network.normalize(b)) for b in batches]
    reestimate_batch_norm(network, batches)
    first = network.groups[0][0].bn1  # sees the stem's output, which BatchNorm does not change
    check_close("mean", first.running_mean, torch.stack([z.mean((0, 2, 3)) for z in stem]).mean(0), 1e-5)
    variance = torch.stack([z.var((0, 2, 3), unbiased=False) for z in stem]).mean(0)
    check_close("variance", first.running_var, variance, 1e-5)
    assert network.bn.momentum == momentum
    assert network.training
    assert not network.groups[0].training
    assert all(torch.equal(p, weights[n]) for n, p in network.named_parameters())
    with pytest.raises(InputError, match="at least one batch"):
        reestimate_batch_norm(network, [])


@pytest.mark.parametrize("kind", ["batch-ensemble", "latent-be", "hydra"])
@pytest.mark.parametrize("branches", [0, -1, 2.0])
def test_branches_must_be_a_positive_integer(kind, branches):
    with pytest.raises(InputError, match="branches="):
        STUDENTS[kind](tiny(), branches)


def test_refusals():
    with pytest.raises(InputError, match="no Conv2d or Linear"):
        LatentBE(nn.Flatten(), 2)
    with pytest.raises(InputError, match="MultiheadAttention"):
        LatentBE(nn.Sequential(nn.MultiheadAttention(8, 2)), 2)
    with pytest.raises(InputError, match="from 0 to 1"):
        LatentBE(tiny(), 2)(torch.rand(1, 3, 8, 8), branches=[2])
    with pytest.raises(InputError, match=r"branches=\[\]"):
        LatentBE(tiny(), 2)(torch.rand(1, 3, 8, 8), branches=[])


def test_the_average_is_ready_to_be_used_while_the_student_trains():
    """In training mode its first use would change its running statistics, and its answers."""
    student = scatter(LatentBE(tiny(), 2)).train()
    network = student.average()
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(network(x)[:2], network(x[:2])), "an image's logits depend on the others in its batch"
    assert not student.average_effective_weights().training
    assert student.training
