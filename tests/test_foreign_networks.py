"""Networks that others wrote: what they return, what they do to images, and that they are left as they were."""

import collections
import copy
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.errors import InputError
from fastensdistill.evaluate.predict import predict
from fastensdistill.method.calls import call
from fastensdistill.method.inspection import check_network
from fastensdistill.method.outputs import logits_of
from fastensdistill.method.student import STUDENTS, Hydra, LatentBE, Single
from fastensdistill.method.teachers import Teachers
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.teach import TeachTrainer
from fastensdistill.weights import load_network
from tests.compare import check_close
from tests.runs import dataset
from tests.untyped import untyped

CLASSES, SHAPE, CPU = 4, (3, 8, 8), torch.device("cpu")


class Net(nn.Module):
    """A small network; ``before`` and ``after`` are what somebody does to its images and its logits."""

    def __init__(self, before=None, after=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(6, CLASSES)
        self.before, self.after = before or (lambda x: x), after or (lambda z: z)

    def forward(self, x):
        return self.after(self.head(self.body(self.before(x)).flatten(1)))


class WithView(Net):
    """As LeNet and VGG are often written: no view of channels last."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, CLASSES)

    def forward(self, x):
        return self.head(self.conv(x).relu().view(-1, 6 * 36))


def images(n=5):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))


X = images(8)


def check(network, **options):
    return check_network(network, "teacher 1", SHAPE, [CLASSES], CPU, **options)


def config(**settings):
    settings = {"perturbation": "none", "student": "single", **settings}
    return DistillConfig(epochs=1, batch_size=8, device="cpu", **settings)


Pair = collections.namedtuple("Pair", ["features", "logits"])
OUTPUTS = {
    "a tensor": lambda z: z,
    "logits and features": lambda z: (z, z.repeat(1, 3)),
    "a list with a dictionary": lambda z: [z, {}],
    "a nested tuple": lambda z: ((z,), None),
    "a namedtuple": lambda z: Pair(z.repeat(1, 3), z),
    "an object": lambda z: types.SimpleNamespace(logits=z, hidden_states=None),
    "an object's output": lambda z: types.SimpleNamespace(output=z),
    "a mapping": lambda z: {"features": z.repeat(1, 3), "logits": z},
    "a segmentation model's out": lambda z: collections.OrderedDict(out=z, aux=z),
    "a mapping of one": lambda z: {"class": z},
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_logits_are_found(wrap):
    x, plain, network = images(), Net().eval(), Net(after=wrap).eval()
    assert check(network) == []
    assert torch.equal(Teachers([network])(x)[0], plain(x))
    for kind, make in STUDENTS.items():
        logits = make(network, 1 if kind == "single" else 2).eval()(x)
        check_close("it", logits[0], plain(x), 1e-6)
    assert torch.equal(predict(network, x)[0], plain(x).softmax(-1))


NO_LOGITS = {
    "nothing": (lambda z: None, "returns a NoneType"),
    "an empty tuple": (lambda z: (), "returns a tuple"),
    "other names": (lambda z: {"a": z, "b": z}, "mapping of 'a', 'b'"),
    "two heads": (lambda z: (z, 2 * z), "2 tensors of shape"),
    "classes": (lambda z: z.argmax(1), "returns torch.int64"),
    "a value for each image": (lambda z: z.sum(1), r"returns \(.*5,?\) for 5 images"),
    "maps": (lambda z: z[..., None, None], r"returns \(.*5, 4, 1, 1\) for 5 images"),
    "fewer classes": (lambda z: z[:, :3], "returns 3 values per image; the data has 4 classes"),
    "NaN": (lambda z: z * torch.nan, "not finite"),
    "softmax": (lambda z: z.softmax(1), "returns probabilities"),
    "softmax over the batch": (lambda z: z.softmax(0), "probabilities over the images"),
    "log-softmax over the batch": (lambda z: z.log_softmax(0), "log-probabilities over the images"),
    "sigmoid": (torch.sigmoid, "probabilities of a sigmoid"),
}


@pytest.mark.parametrize(("wrap", "words"), NO_LOGITS.values(), ids=NO_LOGITS)
def test_what_is_no_logits_is_refused(wrap, words):
    for network, expected in ((Net(after=wrap), [CLASSES]), (Single(Net(after=wrap)), [1, CLASSES])):
        with pytest.raises(InputError, match=words):
            check_network(network, "teacher 1", SHAPE, expected, CPU)


def test_probabilities_are_not_softmaxed_again():
    with pytest.raises(InputError, match="probabilities"):
        predict(Net(after=lambda z: z.softmax(1)), images())
    with pytest.raises(InputError, match="sigmoid"):
        predict(Net(after=torch.sigmoid), images())
    log_p = predict(Net(after=lambda z: z.log_softmax(1)), images())  # which are logits
    check_close("it", log_p, predict(Net(), images()), 1e-6)


def test_auxiliary_heads_of_training_are_left_out_and_said():
    class Auxiliary(Net):
        def forward(self, x):
            z = super().forward(x)
            return (z, 2 * z) if self.training else z

    (line,) = check(Auxiliary(), trained=True)
    assert "auxiliary outputs in training" in line
    network = Auxiliary().train()
    assert torch.equal(call(network, images()), Net().train()(images()))


class Strange(Exception):
    pass


ERRORS = [KeyError("x"), IndexError("far"), AttributeError("no"), Strange(), TypeError("a\nb")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_its_own_exceptions_name_the_network(error):
    def fail(x):
        raise error

    with pytest.raises(InputError, match=rf"teacher 1 \(Net\) does not take images.*{type(error).__name__}") as caught:
        check(Net(before=fail))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def subtract(x):
    x -= 0.5
    return x


WRITERS = {
    "in place": subtract,
    "a ReLU in place": lambda x: F.relu(x, inplace=True) - 0.5,
    "behind autograd's back": lambda x: (x.data.mul_(2), x)[1],
}


@pytest.mark.parametrize("before", WRITERS.values(), ids=WRITERS)
def test_images_stay_as_they_are(before):
    x = images() - 0.1
    kept = x.clone()
    network, other = Net(before=before).eval(), Net(seed=1).eval()
    expected = torch.stack([network(x.clone()), other(kept)])
    teachers = Teachers([network, other])
    for _ in range(2):  # the first call learns it
        assert torch.equal(teachers(x), expected)
        assert torch.equal(Single(network)(x)[0], expected[0])
        assert torch.equal(x, kept)
    assert check(network, ascended="tdiv") == []
    x = images()
    predict(network, x)
    assert torch.equal(x, images())


@pytest.mark.parametrize("form", ["no_grad", "inference_mode", "detached"])
def test_no_gradient_is_refused_only_where_one_is_needed(form):
    class Closed(Net):
        def forward(self, x):
            if form == "detached":
                return super().forward(x).detach()
            with getattr(torch, form)():
                return super().forward(x)

    assert check(Closed()) == []
    with pytest.raises(InputError, match="'tdiv-sdiv' needs the gradient of teacher 1"):
        check(Closed(), ascended="tdiv-sdiv")
    with pytest.raises(InputError, match="cannot be trained"):
        check(Closed(), trained=True)
    trainer = DistillTrainer(Single(Net()), [Closed(), Closed(seed=1)], dataset(16), config(), quiet=True)
    loss = trainer.distil(torch.rand(8, *SHAPE), torch.arange(8) % CLASSES)["loss"]
    assert bool(torch.isfinite(loss))


def test_a_log_softmax_is_each_heads_own():
    network = Net(after=lambda z: F.log_softmax(z, dim=1)).eval()
    assert torch.equal(Hydra(network, 3).eval()(images())[0], network(images()))


def state_of(network):
    flags = [(p.requires_grad, p.dtype, p.device, p.stride()) for p in network.parameters()]
    return copy.deepcopy(network.state_dict()), flags, [m.training for m in network.modules()]


def check_untouched(network, before):
    now = state_of(network)
    assert before[1:] == now[1:]
    assert all(torch.equal(v, now[0][k]) for k, v in before[0].items())


def test_teachers_are_left_as_they_were():
    given = [Net(seed=i).train() for i in range(2)]
    given[0].head.requires_grad_(False)
    before = [state_of(network) for network in given]
    student = LatentBE(Net(seed=5), 2)
    trainer = DistillTrainer(student, given, dataset(16), config(student="latent-be", perturbation="tdiv"), quiet=True)
    trainer.fit()
    for network, then in zip(given, before, strict=True):
        check_untouched(network, then)
    teachers = Teachers(given)
    held, own = teachers.networks[0].parameters(), given[0].parameters()
    assert [p.requires_grad for p in held] == [p.requires_grad for p in own]
    x = images().requires_grad_()
    teachers(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in teachers.parameters())


@pytest.mark.parametrize("how", ["a list", "Teachers", "the Teachers' own"])
def test_a_network_learns_from_itself_as_it_was(how):
    network = Net()
    teachers = [network] if how == "a list" else Teachers([network])
    learner = untyped(teachers).networks[0] if how == "the Teachers' own" else network
    before = copy.deepcopy(learner.state_dict())
    student = Single(learner)
    with torch.no_grad():
        untyped(student).module.head.bias.add_(0)
    trainer = DistillTrainer(student, teachers, dataset(16), config(alpha=0.5), quiet=True).fit()
    assert not torch.equal(learner.state_dict()["head.weight"], before["head.weight"])
    held = trainer.teachers.networks[0].state_dict()
    assert all(torch.equal(value, held[name]) for name, value in before.items())


def test_frozen_networks_and_layers():
    frozen = Net().requires_grad_(False)
    with pytest.raises(InputError, match=r"no parameter of Net requires|requires no gradients for any"):
        DistillTrainer(Single(frozen), [Net(seed=1)], dataset(16), config(), quiet=True)
    with pytest.raises(InputError, match=r"no parameter of Net requires|requires no gradients for any"):
        TeachStep([frozen], TeachConfig(members=1))
    network = Net()
    network.body[0].requires_grad_(False)
    before = untyped(network).body[0].weight.clone(), network.head.weight.clone()
    TeachTrainer([network], dataset(16), TeachConfig(members=1, epochs=1, batch_size=8, device="cpu"), quiet=True).fit()
    assert torch.equal(untyped(network).body[0].weight, before[0])
    assert not torch.equal(network.head.weight, before[1])
    assert not network.body[0].weight.requires_grad


def test_a_layer_that_stays_in_evaluation_mode_does():
    class Still(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    network = Net()
    network.body[1] = Still(6)
    TeachTrainer([network], dataset(16), TeachConfig(members=1, epochs=1, batch_size=8, device="cpu"), quiet=True).fit()
    assert torch.equal(untyped(network).body[1].running_mean, torch.zeros(6))
    assert int(untyped(network).body[1].num_batches_tracked) == 0


def test_a_view_trains_as_in_pytorch():
    network, plain = WithView(), WithView()
    settings = TeachConfig(members=1, epochs=1, batch_size=8, device="cpu", warmup_epochs=0.5)
    trainer = TeachTrainer([network], dataset(16), settings, quiet=True)
    alone = TeachStep([plain], settings)
    for step in (trainer.teach, alone):
        step.set_learning_rate(0.1)
    for i in range(2):
        x, labels = images(8) * (0.5 + 0.5 * i), torch.arange(8) % CLASSES
        alone([(x, labels)])
        trainer.teach([(x.to(memory_format=torch.channels_last), labels)])
    for (name, p), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert p.is_contiguous(), name
        assert torch.equal(p, other), name
    assert torch.equal(predict(network, dataset(16).test), predict(plain, dataset(16).test))
    student = LatentBE(WithView(seed=1), 2)
    DistillTrainer(student, [network], dataset(16), config(student="latent-be"), quiet=True).fit()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, capsys):
    network = Net().to(dtype)
    p = predict(network, images())
    assert p.dtype == torch.float32
    check_close("it", p, predict(Net(), images()), 2e-2)
    with pytest.raises(InputError, match=f"of {dtype}; expected torch.float32"):
        DistillTrainer(Single(network), [Net(seed=1)], dataset(16), config(), quiet=True)
    trainer = DistillTrainer(Single(Net(seed=1)), [network], dataset(16), config())
    assert f"teacher 0 (Net) is of {dtype}" in capsys.readouterr().err
    assert next(trainer.teachers.parameters()).dtype == torch.float32
    assert next(network.parameters()).dtype == dtype


def test_one_image_of_a_network_that_squeezes():
    class Squeezing(Net):
        def forward(self, x):
            return self.head(self.body(x).squeeze())

    network = Squeezing()
    p = predict(network, images(5), batch_size=untyped(np.int64(2)))
    check_close("it", p, predict(Net(), images(5)), 1e-6)


def test_a_batch_size_of_its_own_is_refused():
    with pytest.raises(InputError, match=r"teacher 1.*5 at once"):
        check(Net(before=lambda x: x.view(100, *SHAPE)))


def lazy():
    return nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten(), nn.LazyLinear(CLASSES))


def on_meta():
    with torch.device("meta"):
        return Net()


@pytest.mark.parametrize(("make", "words"), [(lazy, "lazy layer"), (on_meta, "meta device")])
def test_parameters_without_values(make, words):
    with pytest.raises(InputError, match=words):
        TeachTrainer([make()], dataset(16), quiet=True)
    with pytest.raises(InputError, match=words):
        DistillTrainer(Single(Net()), [Net(), make()], dataset(16), config(), quiet=True)
    with pytest.raises(InputError, match=words):
        DistillTrainer(Single(make()), [Net()], dataset(16), config(), quiet=True)
    with pytest.raises(InputError, match=words):
        predict(make(), images())


def exported(network):
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(network.eval(), (images(),), dynamic_shapes=shapes).module()


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "scripted": lambda network: torch.jit.trace(network.eval(), images(2)),
    "torch.fx": torch.fx.symbolic_trace,
    "exported": exported,
    "moved by a hook": lambda n: (n.register_forward_pre_hook(lambda m, given: (given[0].float(),)), n)[1],
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_teachers(wrap):
    plain = nn.Sequential(Net().body, nn.Flatten(), Net().head).eval()
    network = wrap(copy.deepcopy(plain))
    teachers = Teachers([network])
    teachers.check(SHAPE, CLASSES)
    check_close("it", teachers(images())[0], plain(images()), 1e-5)
    check_close("it", predict(network, images())[0], plain(images()).softmax(-1), 1e-5)


def test_a_wrapper_is_trained_through(capsys):
    network = Net()
    settings = TeachConfig(members=1, epochs=1, batch_size=8, device="cpu")
    trainer = TeachTrainer([nn.DataParallel(network)], dataset(16), settings, quiet=True)
    assert trainer.networks["teacher-0"] is network


# ---- arguments

SEQUENCES = {
    "a list": list,
    "a tuple": tuple,
    "an iterator": iter,
    "a ModuleList": nn.ModuleList,
    "a mapping": lambda nets: {str(i): net for i, net in enumerate(nets)},
    "a ModuleDict": lambda nets: nn.ModuleDict({str(i): net for i, net in enumerate(nets)}),
    "Teachers": Teachers,
    "students of one branch": lambda nets: [Single(net) for net in nets],
}


@pytest.mark.parametrize("give", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences_of_teachers(give):
    nets = [Net(seed=i).eval() for i in range(2)]
    assert torch.equal(Teachers(give(nets))(images()), torch.stack([net(images()) for net in nets]))


def test_networks_that_only_look_equal_are_two():
    class Scaled(Net):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return self.scale * super().forward(x)

    assert len(Teachers([Scaled(1.0), Scaled(2.0)])) == 2
    assert len(Teachers([Scaled(torch.ones(1)), Scaled(torch.zeros(1))])) == 2


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


class Silent(Net):
    """``train`` and ``eval`` overridden as many do, without ``return self``."""

    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        super().eval()


@pytest.mark.parametrize("kind", ["latent-be", "hydra", "single"])
def test_a_train_that_returns_nothing(kind):
    student = untyped(STUDENTS[kind])(Silent(), np.int64(2))
    step = ReferenceStep(student, [Silent(seed=1), Net(seed=2)], config(), num_classes=CLASSES)
    step(X, torch.arange(8) % CLASSES)
    assert student.module.body[1].num_batches_tracked == 1
    one = student.deployed() if kind == "latent-be" else student.module if kind == "single" else student.branch(1)
    assert isinstance(one, Silent)
    p = predict(one, X)[0]
    Silent.eval(one)
    check_close("in evaluation mode", p, one(X).softmax(-1), 1e-6)


def one_network():
    return Net()


NO_TEACHERS = {
    "none": (lambda: [], "at least one"),
    "one network": (Net, "one Net"),
    "a Sequential": (lambda: nn.Sequential(Net(), Net()), "one Sequential"),
    "a path": (lambda: "t.safetensors", "'t.safetensors'.*load_teachers"),
    "paths": (lambda: ["t.pt"], "teacher 0 is a str"),
    "a number": (lambda: 3, "a int"),
    "a class": (lambda: [Net], "the class Net"),
    "a function": (lambda: [one_network], "teacher 0 is a function"),
    "a student": (lambda: [Net(), LatentBE(Net(), 2)], "teacher 1 is a latent-be student"),
    "Teachers within": (lambda: [Teachers([Net()])], "teacher 0 is a Teachers"),
    "one twice": (lambda: [Net()] * 2, "0 and 1 are one network"),
    "equal ones": (lambda: [Net(seed=1), Net(), Net()], "1 and 2 are equal"),
    "one in a wrapper": (lambda: (lambda n: [n, nn.DataParallel(n)])(Net()), "0 and 1 are one network"),
}


@pytest.mark.parametrize(("make", "words"), NO_TEACHERS.values(), ids=NO_TEACHERS)
def test_what_is_no_teachers_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        Teachers(make())


distil, teach, reference, teach_step, fused, measure = map(
    untyped, (DistillTrainer, TeachTrainer, ReferenceStep, TeachStep, FusedStep, predict)
)
ARGUMENTS = {
    "a name": (lambda: distil("latent-be", [Net()], dataset(16)), "student is the name 'latent-be'"),
    "no student": (lambda: distil(Net(), [Net()], dataset(16)), "student is a Net; wrap it: LatentBE"),
    "swapped": (lambda: distil([Net()], Single(Net()), dataset(16)), "in this order"),
    "swapped Teachers": (
        lambda: distil(Teachers([Net()]), Single(Net()), dataset(16)),
        "in this order",
    ),
    "a dictionary": (
        lambda: distil(Single(Net()), [Net()], dataset(16), {"epochs": 1}),
        "DistillConfig",
    ),
    "the other config": (
        lambda: teach([Net()], dataset(16), DistillConfig()),
        "expected a TeachConfig",
    ),
    "arrays": (lambda: teach([Net()], (images(), images())), "data is a tuple"),
    "a loader": (lambda: teach([Net()], torch.utils.data.DataLoader(untyped([1]))), "data is a DataLoader"),
    "one network": (lambda: teach(Net(), dataset(16)), r"networks are a Net; expected a sequence"),
    "names": (lambda: teach(["resnet18"], dataset(16)), "network 0 is the name 'resnet18'"),
    "a count": (lambda: teach(4, dataset(16)), "networks are a int"),
    "none": (lambda: teach([], dataset(16)), "no networks"),
    "one twice": (lambda: teach([Net()] * 2, dataset(16)), "0 and 1 are one network"),
    "an augmentation": (lambda: teach([Net()], dataset(16), augment=True), "augment is a bool"),
    "members": (lambda: Teachers([Net()])(images(), members=[1]), "members=.*from 0 to 0"),
    "a step's network": (
        lambda: reference(Net(), [Net()], config(), num_classes=CLASSES),
        "wrap it: LatentBE",
    ),
    "a student in a wrapper": (
        lambda: reference(nn.DataParallel(LatentBE(Net(), 2)), [Net()], config(), num_classes=CLASSES),
        "around a LatentBE",
    ),
    "a step's config": (
        lambda: reference(Single(Net()), [Net()], TeachConfig(), num_classes=4),
        "DistillConfig",
    ),
    "a step's classes": (
        lambda: reference(Single(Net()), [Net()], config(), num_classes="4"),
        "num_classes='4'",
    ),
    "other classes": (
        lambda: reference(Single(Net()), [Net(seed=1)], config(), num_classes=7)(X, torch.arange(8) % CLASSES),
        "student: 4 logits per image; expected num_classes=7",
    ),
    "a step's Sequential": (
        lambda: teach_step(nn.Sequential(Net()), TeachConfig()),
        "networks are a Sequential",
    ),
    "a step's student": (lambda: teach_step([Single(Net())], TeachConfig()), "network 0 is a Single"),
    "a lazy layer": (lambda: teach_step([nn.LazyLinear(4)], TeachConfig()), "no shape yet"),
    "a fused step's network": (lambda: fused(Net(), [Net()], config()), "wrap it: LatentBE"),
    "a script": (lambda: LatentBE(torch.jit.script(Plain()), 2), "no Conv2d or Linear"),
    "a whole data set": (lambda: measure(Net(), dataset(16)), "expected a split of it"),
    "a folder": (lambda: teach([Net()], dataset(16), out=3), "out is a int"),
}


@pytest.mark.parametrize(("make", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_trainers(make, words):
    with pytest.raises(InputError, match=words):
        make()


IMAGES = {
    "channels last": (X.permute(0, 2, 3, 1), r"images.permute\(0, 3, 1, 2\)"),
    "one": (X[0], r"images\[None\]"),
    "bytes": ((255 * X).byte(), "images / 255"),
    "0 to 255": (255 * X, "from 0.* to 25.*divide"),
    "normalised": ((X - 0.5) / 0.25, "from -.*normalises"),
    "NaN": (torch.where(X > 0.99, torch.nan, X), "NaN"),
    "infinite": (torch.where(X > 0.99, torch.inf, X), "infinite"),
    "grey": (X[:, :1], "does not take images of shape"),
    "a list": (list(X), "images are a list"),
    "an array": (X.numpy(), "images are a ndarray"),
    "none": (X[:0], "at least one|no images"),
}


@pytest.mark.parametrize(("x", "words"), IMAGES.values(), ids=IMAGES)
def test_images_that_are_refused(x, words):
    with pytest.raises(InputError, match=words):
        predict(Net(), x)
    labels = torch.arange(len(x)) % CLASSES
    step = ReferenceStep(Single(Net()), Teachers([Net(seed=1)]), config(), num_classes=CLASSES)
    with pytest.raises(InputError, match=words):
        step(x, labels)
    with pytest.raises(InputError, match=words):
        TeachStep([Net()], TeachConfig(members=1))([(x, labels)])


LABELS = {
    "one-hot": (torch.eye(CLASSES).long().repeat(2, 1), r"labels.argmax\(1\)"),
    "short": (torch.arange(8).int() % CLASSES, r"labels.long\(\)"),
    "from one": (torch.arange(8) % CLASSES + 1, "labels hold 4; expected classes from 0 to 3"),
    "left out": (torch.full((8,), -100), "labels hold -100"),
}


@pytest.mark.parametrize(("labels", "words"), LABELS.values(), ids=LABELS)
def test_labels_that_are_refused(labels, words):
    step = ReferenceStep(Single(Net()), Teachers([Net(seed=1)]), config(), num_classes=CLASSES)
    with pytest.raises(InputError, match=words):
        step(X, labels)
    with pytest.raises(InputError, match=words):
        TeachStep([Net()], TeachConfig(members=1))([(X, labels)])


def test_values_are_looked_at_once():
    step = ReferenceStep(Single(Net()), [Net(seed=1)], config(), num_classes=CLASSES)
    labels = torch.arange(8) % CLASSES
    step(X, labels)
    step(255 * X, labels)  # what a look would refuse
    with pytest.raises(InputError, match=r"expected torch.float32, as the network is"):
        step(X.double(), labels)


def test_outputs_without_a_name():
    with pytest.raises(InputError, match="the network returns a str"):
        logits_of("logits")


class Expanded(Net):
    """A buffer that repeats one number in memory, and two that overlap."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        numbers = torch.arange(9.0)
        self.register_buffer("one", torch.tensor([0.25]).expand(6))
        self.register_buffer("low", numbers[:6])
        self.register_buffer("high", numbers[3:])

    def forward(self, x):
        return self.head(self.body(x).flatten(1) * self.one + self.low - self.high)


@pytest.mark.parametrize("wrap", [lambda network: LatentBE(network, 2), Single], ids=["latent-be", "single"])
def test_buffers_that_share_memory_go_through_a_run(wrap, tmp_path):
    plain = config(student=wrap(Net()).kind)
    student, teachers = wrap(Expanded()), [Net(seed=i) for i in (1, 2)]
    trainer = DistillTrainer(student, teachers, dataset(16), plain, out=tmp_path, quiet=True).fit()
    saved = load_network(tmp_path / "network.safetensors", Expanded(seed=3))
    check_close("one", saved.get_buffer("one"), torch.full((6,), 0.25), 0.0)
    check_close("high", saved.get_buffer("high"), torch.arange(3.0, 9.0), 0.0)
    again = wrap(Expanded(seed=4))
    DistillTrainer(again, teachers, dataset(16), plain, out=tmp_path, resume=True, quiet=True).fit()
    for name, value in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert trainer.kept


def test_a_teacher_without_gradients_in_the_fused_engine():
    """Where nothing ascends the images, no gradient of a teacher is needed."""

    class Blind(Net):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    losses = []
    for engine in (partial(ReferenceStep, num_classes=CLASSES), partial(FusedStep, image_shape=SHAPE)):
        step = engine(LatentBE(Net(), 2), [Blind(seed=1), Net(seed=2)], config(perturbation="none"))
        losses.append(step(X, torch.arange(8) % CLASSES)["loss"])
    check_close("loss", losses[1], losses[0], 1e-5)
