"""Networks of other people's making as students: right branch by branch, or refused by name."""

import copy
import functools
import pickle
import random
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from fastensdistill.config import DistillConfig
from fastensdistill.engine.optimizer import Optimizer
from fastensdistill.errors import InputError
from fastensdistill.method.branch_check import check_branches
from fastensdistill.method.copying import copy_network
from fastensdistill.method.student import BatchEnsemble, Hydra, LatentBE, reestimate_batch_norm
from tests.compare import check_close
from tests.untyped import present, untyped

X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a mean and a head; ``forward`` is what a test changes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def features(self, x):
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def move(student, equal=False):
    """Factors off one, other ones in each branch or the same in all."""
    with torch.no_grad():
        for i, layer in enumerate(student.layers()):
            for factor in (layer.delta_r, layer.delta_s):
                drawn = torch.rand(factor.shape, generator=torch.Generator().manual_seed(i)) - 0.3
                factor.copy_(drawn[:1].expand_as(drawn) if equal else drawn)
    return student


def check_student(network, branches=3, tolerance=1e-5):
    """Every branch is its merged network, in which nothing of the student is left, and equal ones are the average."""
    student = move(LatentBE(network, branches)).eval()
    check_branches(student, X.shape[1:])
    with torch.no_grad():
        together = student(X)
        for k in range(branches):
            check_close(f"branch {k}", together[k], student.branch(k)(X), tolerance)
            check_close(f"branch {k} alone", student(X, branches=[k])[0], together[k], tolerance)
        assert (together[0] - together[1]).abs().max() > 1e-3, "the factors change nothing"
        move(student, equal=True)
        for training in (False, True):
            average = student.train(training).average()
            check_close("average of equal branches", average(X), student.eval()(X)[0], tolerance)
    return average


def changed(change):
    network = Net()
    change(network)
    return network


class Half(nn.Module):
    """A parametrisation without an inverse."""

    def forward(self, weight):
        return weight / 2


def pruned_twice(network):
    prune.random_unstructured(network.conv, "weight", 0.3)
    prune.l1_unstructured(network.conv, "weight", 0.3)
    prune.random_unstructured(network.conv, "bias", 0.3)


COMPUTED = {
    "weight_norm": (lambda n: parametrizations.weight_norm(n.conv), True),
    "weight_norm of a linear layer": (lambda n: parametrizations.weight_norm(n.head), True),
    "spectral_norm": (lambda n: parametrizations.spectral_norm(n.conv), False),
    "orthogonal": (lambda n: parametrizations.orthogonal(n.head), False),
    "a parametrisation without an inverse": (
        lambda n: parametrize.register_parametrization(n.head, "weight", Half()), False
    ),
    "parametrised weight and bias": (
        lambda n: [parametrize.register_parametrization(n.head, name, Half()) for name in ("weight", "bias")], False
    ),
    "weight_norm by a hook": (lambda n: weight_norm(n.conv), True),
    "spectral_norm by a hook": (lambda n: spectral_norm(n.head), False),
    "pruned": (lambda n: prune.l1_unstructured(n.conv, "weight", 0.5), True),
    "structured": (lambda n: prune.ln_structured(n.head, "weight", 0.5, 2, 0), True),
    "pruned twice, bias too": (pruned_twice, True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights(name):
    """The weight that is computed is the one that has branches; the average keeps the keys where it can."""
    change, keeps = COMPUTED[name]
    torch.manual_seed(0)
    network = changed(change)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = network.eval()(X)
    average = check_student(network)
    assert (set(average.state_dict()) == set(before)) == keeps
    if keeps:
        again = changed(change)
        again.load_state_dict(average.state_dict(), strict=True)
        check_close("loaded into the class that was wrapped", again.eval()(X), average(X), 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(network(X), expected), "the network that was given was changed"


def test_a_pruned_weight_stays_pruned():
    network = changed(lambda n: prune.l1_unstructured(n.conv, "weight", 0.5))
    average = check_student(network)
    assert int((average.conv.weight == 0).sum()) == int((network.conv.weight == 0).sum()) > 0


def test_computed_weights_are_trained():
    network = changed(lambda n: weight_norm(n.conv))
    student = LatentBE(network, 2)
    optimizer = Optimizer(student, DistillConfig(learning_rate=0.5))
    logits = student(X)
    logits.square().mean().backward()
    optimizer.step()
    assert (student(X) - logits).abs().max() > 1e-3
    check_close("after a step", student.eval()(X)[0], student.branch(0)(X), 1e-5)


class Keyword(Net):
    def forward(self, x):
        return self.head(input=self.conv(input=x).mean((2, 3)))


class Reads(Net):
    """Attributes and what a weight tells without its values."""

    def forward(self, x):
        assert isinstance(self.conv, nn.Conv2d)
        assert self.conv.kernel_size == (3, 3)
        assert self.conv.padding_mode == "zeros"
        w, b = self.head.weight, self.head.bias
        assert (w.shape, w.ndim, w.size(0), b.numel(), w.requires_grad) == ((4, 8), 2, 4, 4, True)
        h = self.conv(x.to(self.conv.weight.dtype).to(self.conv.weight.device)).mean((2, 3))
        return self.head(h.view(-1, self.head.in_features)) + torch.zeros_like(b) + w.new_ones(4)


class Listed(Net):
    """A layer that is in a list, a tuple, a dictionary and a partial beside being registered."""

    def __init__(self):
        super().__init__()
        self.order, self.table = [self.conv, (self.head,)], {"head": self.head}
        self.part = functools.partial(self.head)

    def forward(self, x):
        assert self.order[0] is self.conv
        h = self.order[0](x)
        return (
            untyped(self.order[1])[0](h.mean((2, 3))) + self.table["head"](h.amax((2, 3))) + self.part(h.amin((2, 3)))
        )


class Twice(Net):
    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.also = self.again

    def forward(self, x):
        return self.head(self.also(self.again(self.conv(x)).relu()).mean((2, 3)))


class Containers(Net):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.named = nn.ModuleDict({"a": nn.Conv2d(8, 8, 1), "b": nn.Identity()})
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(8))])
        self.none = None
        self.register_module("nothing", None)

    def forward(self, x):
        h = self.features(x) * self.scales[0] + self.named["b"](self.named["a"](self.conv(x))).mean((2, 3))
        return sum(head(h) for head in self.heads)


class Windows(Net):
    """Four quarters of an image in the batch, image by image: branches stay apart."""

    def forward(self, x):
        h = self.conv(x).unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.head(h.mean((2, 3))).unflatten(0, (-1, 4)).mean(1)


class Same(nn.Conv2d):
    """A subclass with a forward, an attribute and a counter of its own."""

    calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return super().forward(x * scale) + self.gain

    @property
    def gain(self):
        return 0.5


class Subclass(Net):
    def __init__(self):
        super().__init__()
        self.conv = Same(3, 8, 3)

    def forward(self, x):
        return self.head(self.conv(x, scale=2.0).mean((2, 3))) * self.conv.gain


class Dropped(Net):
    def forward(self, x):
        h = F.dropout(self.features(x), 0.5, self.training)
        if self.training:
            h = h * torch.rand(len(h), 1).add(0.9).floor()
        return self.head(h) if not self.training or random.random() < 2 else h


class WithNorm(Net):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout2d(0.5)

    def features(self, x):
        return self.drop(self.norm(self.conv(x))).relu().mean((2, 3))


class Others(Net):
    """Layers of other kinds, which all branches share."""

    def __init__(self):
        super().__init__()
        self.up, self.line = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv1d(8, 8, 3, padding=1)
        self.pair, self.table = nn.Bilinear(8, 8, 8), nn.Embedding(4, 8)

    def forward(self, x):
        h = self.line(self.up(self.conv(x)).flatten(2)).mean(2)
        return self.head(self.pair(h, h + self.table.weight.mean(0)))


RIGHT = {
    kind.__name__: kind
    for kind in (Net, Keyword, Reads, Listed, Twice, Containers, Windows, Subclass, Dropped, WithNorm, Others)
} | {
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
    "replaced forward": lambda: changed(padded),
    "a method as forward": lambda: changed(lambda n: setattr(n.head, "forward", doubled.__get__(n.head))),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "data parallel": lambda: nn.DataParallel(Net()),
}  # fmt: skip


def padded(network):
    network.conv.before = network.conv.forward
    network.conv.forward = functools.partial(lambda layer, x: F.pad(layer.before(x), (1, 0)), network.conv)


def doubled(self, x):
    return 2 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    torch.manual_seed(0)
    average = check_student(RIGHT[name]())
    assert not any("RankOne" in type(m).__name__ for m in average.modules())


class Cosine(Net):
    def forward(self, x):
        return F.linear(F.normalize(self.features(x)), F.normalize(self.head.weight))


class Keeps(Net):
    def __init__(self):
        super().__init__()
        self.used = [self.head.weight]

    def forward(self, x):
        return F.linear(self.features(x), self.used[0])


class Closure(Net):
    def __init__(self):
        super().__init__()
        self.decide = lambda h: self.head(h)

    def forward(self, x):
        return self.decide(self.features(x))


class Tokens(Net):
    def forward(self, x):
        return self.head(self.conv(x).flatten(2).permute(2, 0, 1)).mean(0)


class TokensInside(Net):
    """As many tokens as images of all branches, so that shapes alone do not show it."""

    def forward(self, x):
        h = F.adaptive_avg_pool2d(self.conv(x), (1, len(x))).flatten(2).permute(2, 0, 1)
        return self.head(h).mean(0)


class Crops(Net):
    def forward(self, x):
        return self.head(self.conv(torch.cat([x, x.flip(3)])).mean((2, 3))).unflatten(0, (2, -1)).mean(0)


class Table(Net):
    def __init__(self):
        super().__init__()
        self.bias_of = nn.Linear(2, 8)
        self.register_buffer("positions", torch.rand(7, 2))

    def forward(self, x):
        return self.head(self.features(x) + self.bias_of(self.positions).mean(0))


class BatchMean(Net):
    def forward(self, x):
        h = self.features(x)
        return self.head(h - h.mean(0))


class OverBatch(Net):
    """Attention over the images of a batch, in training only."""

    def forward(self, x):
        h = self.features(x)
        return self.head((h @ h.T).softmax(-1) @ h if self.training else h)


class AfterHead(Net):
    def forward(self, x):
        return super().forward(x).softmax(0)


class Crosses(Net):
    """Parameters that a layer shares with something else."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 8)
        self.table.weight = self.head.weight


class Scripted(nn.Conv2d):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.original = self.weight
        del self._parameters["weight"]
        self.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.original * 2))


def by_memory():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 4))
    network[1].weight.data = network[0].weight.data
    return network


def one_bias():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 4))
    network[1].bias = network[0].bias
    return network


def masked_gradient(network):
    network.conv.weight.register_hook(lambda g: g * 0)


REFUSED = {
    "a weight in forward": (Cosine, "head.weight is computed with"),
    "a weight in a list": (Keeps, "'head.weight'"),
    "a function that holds the network": (Closure, "decide"),
    "a hook that holds a layer": (
        lambda: changed(lambda n: n.conv.register_forward_hook(lambda m, i, o, kept=n.head: o)), "_forward_hooks"
    ),
    "tokens first": (Tokens, "layer 'head'.*64"),
    "tokens first, as many as images": (TokensInside, "layer 'head'"),
    "crops stacked": (Crops, "layer 'conv'.*evaluation|evaluation.*layer 'conv'"),
    "a table": (Table, r"layer 'bias_of' got an input of shape \(7, 2\)"),
    "a batch's own mean": (BatchMean, "evaluation mode layer 'head'"),
    "attention over the batch in training": (OverBatch, "training mode layer 'head'"),
    "images mixed after the head": (AfterHead, "other logits"),
    "attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "MultiheadAttention '0'"),
    "a parameter of two kinds": (Crosses, "'head.weight' and 'table.weight' are one parameter"),
    "one memory": (by_memory, "'0.weight' and '1.weight' share their memory"),
    "one bias": (one_bias, "'0.bias' and '1.bias' are one bias"),
    "an unknown way to compute a weight": (lambda: nn.Sequential(Scripted(3, 4, 3)), "layer '0'.*no weight that"),
    "a gradient hook": (lambda: changed(masked_gradient), "'conv.weight' has a gradient hook"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(4)), "lazy layer '0'"),
    "a student": (lambda: LatentBE(Net(), 2), "has branches already"),
    "a student's network": (lambda: LatentBE(Net(), 2).module, "has branches already"),
    "no module": (lambda: torch.relu, "nn.Module"),
    "a lock": (lambda: changed(lambda n: setattr(n.head, "guard", threading.Lock())), "attribute head.guard is a lock"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    build, words = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(InputError, match=words) as found:
        LatentBE(build(), 2)(X)
    assert "\n" not in str(found.value)


def test_a_refused_network_stays_refused():
    student = LatentBE(Tokens(), 2)
    for _ in range(2):
        with pytest.raises(InputError, match="layer 'head'"):
            student(X)


def test_layers_that_share_a_weight_share_their_factors():
    def tied():
        network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 4))
        network[1].weight = network[0].weight
        return network

    average = check_student(tied())
    assert average[0].weight is average[1].weight
    student = LatentBE(tied(), 2)
    one, other, _ = student.layers()
    assert one.delta_s is other.delta_s
    groups = student.parameter_groups(0.1)
    assert len(groups[1]["params"]) == 4, "the shared factors are updated once"
    again = tied()
    again.load_state_dict(average.state_dict(), strict=True)
    check_close("loaded into the class that was wrapped", again(X), average(X), 1e-6)


def test_hooks_of_a_layer_run_once_for_each_branch_and_may_change_its_output():
    network, seen = Net(), []

    def doubled(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        return output * 2

    network.conv.register_forward_hook(doubled)
    network.head.register_forward_pre_hook(lambda _m, inputs: (inputs[0] + 1,))
    student = move(LatentBE(network, 2)).eval()
    together = student(X)
    assert seen == [(3, 8, 8, 8)] * 2, "the check before the first call runs no hooks"
    check_close("branch", together[1], student.branch(1)(X), 1e-5)
    check_student(network)


def test_features_kept_in_forward_are_not_carried_along():
    class Features(Net):
        def forward(self, x):
            self.kept = [self.conv(x)]
            return self.head(self.kept[0].mean((2, 3)))

    network = Features()
    network(X)
    kept = network.kept[0]
    student = LatentBE(network, 2)
    student(X).sum().backward()
    average = student.average()
    assert average.kept == [None]
    assert network.kept[0] is kept
    check_close("average", average(X), student.eval()(X)[0], 1e-6)
    copied = copy_network(network)
    assert torch.equal(copied.kept[0], kept)
    assert copied.kept[0].is_leaf


def test_a_layer_that_is_frozen_keeps_its_factors():
    network = Net()
    network.conv.requires_grad_(False)
    student = LatentBE(network, 2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = Optimizer(student, DistillConfig(learning_rate=0.5, weight_decay=0.1))
    student(X).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"module.head.layer.weight", "module.head.layer.bias", "module.head.delta_r", "module.head.delta_s"}
    assert all(p.requires_grad == name.startswith("head") for name, p in network.named_parameters())


def test_students_are_copied_and_pickled():
    student = move(LatentBE(Net(), 2)).eval()
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(other(X), student(X))
        assert isinstance(other.module.conv, nn.Conv2d)
        assert other.module.conv.delta_r is not student.module.conv.delta_r


def test_the_check_disturbs_nothing():
    student = move(LatentBE(WithNorm(), 2)).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(5)
    state, python = torch.get_rng_state(), random.getstate()
    check_branches(student, (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_a_student_compiles_and_is_traced():
    student = move(LatentBE(Net(), 2)).eval()
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    check_close("compiled", compiled(X), student(X), 1e-6)
    check_close("traced", torch.jit.trace(student, X)(X), student(X), 1e-6)


class TestHydra:
    @pytest.mark.parametrize("kind", [Net, Keyword, WithNorm])
    def test_heads(self, kind):
        hydra = Hydra(kind(), 3).eval()
        check_branches(hydra, (3, 8, 8))
        logits = hydra(X)
        for k in range(3):
            check_close(f"head {k}", logits[k], hydra.branch(k)(X), 1e-6)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("change", [parametrizations.weight_norm, weight_norm, parametrizations.spectral_norm])
    def test_heads_with_computed_weights_start_apart(self, change):
        network = Net()
        change(network.head)
        logits = Hydra(network, 2).eval()(X)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        check_close("head 0", logits[0], network.eval()(X), 1e-6)

    def test_refused(self):
        with pytest.raises(InputError, match=r"head\.weight is computed with"):
            Hydra(Cosine(), 2)(X)
        with pytest.raises(InputError, match="one parameter"):
            Hydra(Crosses(), 2)


def test_reestimation_without_batches_loses_nothing():
    network = WithNorm()
    network(X)
    mean = present(network.norm.running_mean).clone()
    with pytest.raises(InputError, match="at least one batch"):
        reestimate_batch_norm(network, [])
    assert torch.equal(present(network.norm.running_mean), mean)
    assert network.norm.momentum == 0.1


def test_batch_ensembles_are_checked_too():
    with pytest.raises(InputError, match="layer 'head'"):
        BatchEnsemble(Tokens(), 2)(X)
