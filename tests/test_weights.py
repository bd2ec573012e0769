"""Files: what comes back is what was saved, foreign state dicts load, damaged and dangerous ones are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.evaluate.comparison import count_parameters
from fastensdistill.files import write_atomically
from fastensdistill.method.student import STUDENTS, LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model
from fastensdistill.weights import load_network, load_teachers, read_tensors, save_network, save_tensors
from tests.compare import check_close
from tests.networks import scatter, tiny
from tests.untyped import untyped

X = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("kind", STUDENTS)
def test_students_come_back(kind, tmp_path):
    student = scatter(STUDENTS[kind](tiny(), 2)).eval()
    save_network(tmp_path / "s.safetensors", student)
    again = load_network(tmp_path / "s.safetensors")
    assert type(again) is type(student)
    assert not again.training
    assert torch.equal(again(X), student(X))


def test_paths_may_be_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = scatter(tiny()).eval()
    save_network("t.safetensors", network)
    assert torch.equal(load_teachers(None, ["t.safetensors"])(X)[0], network(X))


def test_teachers_of_different_architecture_and_normalisation(tmp_path):
    one = scatter(tiny(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))).eval()
    two = scatter(create_model("resnet", 5, blocks=(1,), in_planes=8, mean=(0.9,) * 3)).eval()
    save_network(tmp_path / "a.safetensors", one)
    save_network(tmp_path / "b.safetensors", two)
    teachers = load_teachers(files=[tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    check_close("both", teachers(X), torch.stack([one(X), two(X)]), 0.0)
    check_close("as modules", load_teachers([one, two])(X, members=[1]), two(X)[None], 0.0)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_foreign_state_dicts_and_the_prefixes_of_wrappers(prefix, suffix, tmp_path):
    network = scatter(tiny(classes=7)).eval()
    state = {prefix + k: v for k, v in network.state_dict().items()}
    path = tmp_path / f"t{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    teachers = load_teachers("preresnet", [path], blocks=(1, 1), in_planes=4)
    check_close("logits", teachers(X)[0], network(X), 0.0)


def test_a_plain_torchvision_state_dict_gets_the_normalisation_it_is_given(tmp_path):
    network = torchvision.models.resnet18(num_classes=6).eval()
    torch.save(network.state_dict(), tmp_path / "r.pth")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    loaded = load_network(tmp_path / "r.pth", "resnet18", mean=mean, std=std)
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    check_close("logits", loaded(x), network(by_hand), 1e-6)


def test_a_module_of_the_users_own_is_filled(tmp_path):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.b(self.a(x).mean((2, 3)))

    mine = Mine().eval()
    save_network(tmp_path / "m.safetensors", mine)
    fresh = Mine()
    assert torch.equal(load_network(tmp_path / "m.safetensors", fresh)(X), mine(X))
    assert not torch.equal(fresh(X), mine(X)), "the given module was changed"
    with pytest.raises(InputError, match="pass model="):
        load_network(tmp_path / "m.safetensors")


def test_average_shares_nothing_with_the_student(tmp_path):
    student = scatter(LatentBE(tiny(), 2))
    average = student.average()
    before = student.state_dict()["module.stem.layer.weight"].clone()
    with torch.no_grad():
        for p in average.parameters():
            p.zero_()
    assert torch.equal(student.state_dict()["module.stem.layer.weight"], before)
    assert count_parameters(average) == count_parameters(tiny())


def damaged(path, how):
    save_network(path, scatter(tiny()))
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello" * 100}[how])


@pytest.mark.parametrize(
    ("how", "words"), {"truncated": "is truncated", "empty": "is empty", "text": "holds no weights"}.items()
)
@pytest.mark.parametrize("name", ["t.safetensors", "t.pt"])
def test_damaged_files(how, words, name, tmp_path):
    damaged(tmp_path / name, how)
    with pytest.raises(InputError, match=rf"{name} {words}"):
        load_network(tmp_path / name)


def test_refusals(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_network(path)
    save_network(path, tiny())
    with pytest.raises(InputError, match="does not fit"):
        load_network(path, create_model("resnet", 5))
    with pytest.raises(InputError, match=r"holds preresnet, num_classes=5, .*: not resnet18"):
        load_network(path, "resnet18")
    with pytest.raises(InputError, match="has shape"):
        load_network(path, tiny(classes=6))
    with pytest.raises(InputError, match="2 models for 1 files"):
        load_teachers(["wrn28_1", "wrn28_4"], [path])
    with pytest.raises(InputError, match="are names"):
        load_teachers("wrn28_1")
    broken = tiny()
    untyped(broken).classifier.bias.data[0] = float("nan")
    save_network(path, broken)
    with pytest.raises(InputError, match="not finite"):
        load_network(path)
    (tmp_path / "list.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        load_network(tmp_path / "list.pt", "wrn28_1")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


WRAPPED = {
    "under-net": lambda state: {"net": state, "acc": 9.0},
    "a-lightning-module": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_state_dicts_as_training_scripts_leave_them(wrap, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(wrap(network.state_dict()), tmp_path / "t.ckpt")
    loaded = load_network(tmp_path / "t.ckpt", "resnet18", mean=(0.0,) * 3, std=(1.0,) * 3)
    x = torch.rand(2, 3, 32, 32)
    check_close("logits", loaded(x), network(x), 0.0)


def test_a_network_whose_own_names_look_like_a_wrapper_keeps_them(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

    network = Own()
    torch.save(network.state_dict(), tmp_path / "t.pt")
    assert torch.equal(untyped(load_network(tmp_path / "t.pt", Own())).net.weight, untyped(network).net.weight)


def test_teachers_from_one_path_or_from_the_folder_that_teach_wrote(tmp_path):
    networks = [scatter(tiny()).eval() for _ in range(11)]
    for i, network in enumerate(networks):
        save_network(tmp_path / f"teacher-{i}.safetensors", network)
    check_close("all", load_teachers(files=[tmp_path])(X), torch.stack([n(X) for n in networks]), 0.0)
    check_close("one", load_teachers(files=str(tmp_path / "teacher-10.safetensors"))(X)[0], networks[10](X), 0.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no teacher-\*.safetensors"):
        load_teachers(files=tmp_path / "empty")


def test_what_does_not_fit_is_named_as_the_user_named_it(tmp_path):
    torch.save(torchvision.models.mobilenet_v2(num_classes=5).state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match="does not fit resnet18"):
        load_network(tmp_path / "t.pt", "resnet18", num_classes=5)
    save_network(tmp_path / "own.safetensors", nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"only the class torch\.nn\.modules\.linear\.Linear"):
        load_network(tmp_path / "own.safetensors")


@pytest.mark.parametrize(
    ("given", "words"), [(tiny(), "one PreResNet"), (["t.pt"], "teacher 0 is a str")], ids=["module", "names"]
)
def test_teachers_that_are_no_list_of_networks(given, words):
    with pytest.raises(InputError, match=words):
        Teachers(given)


def test_what_is_said_of_a_file_that_says_it_itself_must_agree(tmp_path):
    path = tmp_path / "t.safetensors"
    save_network(path, scatter(tiny()))
    x = load_network(path)(X)
    shape = {"blocks": (1, 1), "in_planes": 4}
    agreeing = {"mean": (0.5,) * 3, "std": torch.full((3, 1, 1), 0.25), "num_classes": 5, **shape}
    check_close("agreeing", load_network(path, "preresnet", **agreeing)(X), x, 0.0)
    for said, words in {
        "mean": r"says mean=\(0\.5, 0\.5, 0\.5\) itself",
        "num_classes": "not preresnet, num_classes=6",
        "in_planes": "not preresnet, in_planes=8",
    }.items():
        other = {"mean": {"mean": (0.4,) * 3, "std": (0.25,) * 3}, "num_classes": {"num_classes": 6},
                 "in_planes": {"in_planes": 8}}[said]  # fmt: skip
        with pytest.raises(InputError, match=words):
            load_network(path, "preresnet" if said != "mean" else None, **untyped(other))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


MEAN = (0.9, 0.8, 0.7)


@pytest.mark.parametrize(
    "mean",
    [MEAN, np.array(MEAN), torch.tensor(MEAN).view(3, 1, 1), [np.float32(m) for m in MEAN]],
    ids=["tuple", "array", "tensor", "list"],
)
@pytest.mark.parametrize("std", [(0.1,) * 3, 0.1], ids=["tuple", "number"])
def test_a_module_comes_behind_the_normalisation_that_is_given(mean, std, tmp_path):
    network = scatter(Own()).eval()
    torch.save(network.state_dict(), tmp_path / "t.pt")
    loaded = load_teachers(network, [tmp_path / "t.pt"], mean=mean, std=std)
    expected = network((X - torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)) / 0.1)
    check_close("logits", loaded(X)[0], expected, 1e-6)
    save_network(tmp_path / "again.safetensors", loaded.networks[0])
    check_close("saved again", load_network(tmp_path / "again.safetensors", Own())(X), expected, 1e-6)
    Own().load_state_dict(load_file(tmp_path / "again.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "0-to-255": ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "divide them by 255"),
        "std-negative": ({"mean": (0.5,) * 3, "std": (-0.25,) * 3}, "std above 0"),
        "std-zero": ({"mean": (0.5,) * 3, "std": (0.25, 0, 0.25)}, "std above 0"),
        "lengths": ({"mean": (0.5,) * 3, "std": (0.25,)}, "one of each per channel"),
        "only-one": ({"mean": (0.5,) * 3}, "expected both, or neither"),
        "numbers": ({"mean": 0.5, "std": 0.25}, "one of each per channel"),
        "text": ({"mean": "imagenet", "std": (0.25,) * 3}, "mean='imagenet': expected one finite number"),
        "nan": ({"mean": (float("nan"),) * 3, "std": (0.25,) * 3}, "expected one finite number"),
        "square": ({"mean": np.ones((3, 3)), "std": (0.25,) * 3}, r"mean of shape \(3, 3\)"),
        "an-argument-of-names": ({"num_classes": 4}, "num_classes given with a Own"),
    }.values(),
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_normalisations_and_arguments_that_a_module_cannot_take(arguments, words, tmp_path):
    torch.save(Own().state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match=words):
        load_network(tmp_path / "t.pt", Own(), **arguments)


def test_a_network_that_normalises_itself_takes_no_second_normalisation(tmp_path):
    save_network(tmp_path / "t.pt", tiny())
    with pytest.raises(InputError, match="preresnet, which normalises its images itself"):
        load_network(tmp_path / "t.pt", tiny(), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_wrapped_network_is_saved_under_the_names_of_its_class(tmp_path):
    network = create_model("resnet18", 4).eval()
    save_network(tmp_path / "t.safetensors", nn.DataParallel(network))
    torchvision.models.resnet18(num_classes=4).load_state_dict(load_file(tmp_path / "t.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    check_close("logits", load_network(tmp_path / "t.safetensors")(x), network(x), 0.0)
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_files_of_the_first_format_load(tmp_path):
    network = scatter(create_model("resnet18", 4)).eval()
    card = {"model": "resnet18", "arguments": {"num_classes": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3}}
    network = load_network_of_card(network, card, tmp_path / "t.safetensors")
    x = torch.rand(2, 3, 32, 32)
    check_close("logits", load_network(tmp_path / "t.safetensors")(x), network(x), 0.0)


def load_network_of_card(network, card, path):
    network.normalize.mean.fill_(0.5)
    network.normalize.std.fill_(0.25)
    save_file(network.state_dict(), path, metadata={"format": "fastensdistill-1", "card": json.dumps(card)})
    return network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_network_of_another_precision_comes_back_in_it(dtype, tmp_path):
    network = scatter(tiny()).eval().to(dtype)
    save_network(tmp_path / "t.pt", network)
    loaded = load_network(tmp_path / "t.pt")
    assert torch.equal(loaded(X.to(dtype)), network(X.to(dtype)))


TENSORS = {
    "sparse": torch.eye(3).to_sparse(),
    "sparse-csr": torch.eye(3).to_sparse_csr(),
    "complex": torch.randn(2, 3, dtype=torch.complex64),
    "complex-double": torch.randn(2, dtype=torch.complex128).conj(),
    "transposed": torch.rand(2, 3).t(),
    "expanded": torch.rand(1, 3).expand(2, 3),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3),
    "bool": torch.tensor([True, False]),
    "half": torch.rand(2).half(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "part": torch.arange(6.0)[2:4],
}


def test_tensors_of_any_kind_come_back(tmp_path):
    shared = torch.arange(6.0)
    tensors = TENSORS | {"shared": shared, "a-part-of-it": shared[1:3], "the-same": shared, "turned": shared.flip(0)}
    save_tensors(tmp_path / "t", tensors, {})
    again, _ = read_tensors(tmp_path / "t")
    assert set(again) == set(tensors)
    for name, t in tensors.items():
        assert (again[name].dtype, again[name].layout) == (t.dtype, t.layout), name
        assert torch.equal(again[name].to_dense(), t.to_dense().resolve_conj()), name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, device="meta"), "on the meta device"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        ({"a": 1}, "a dict"),
    ],
    ids=["meta", "quantised", "extra-state"],
)
def test_what_has_no_values_to_save_is_named(value, words, tmp_path):
    with pytest.raises(InputError, match=f"'x' cannot be saved, it is {words}"):
        save_tensors(tmp_path / "t", {"x": value}, {})


def test_what_is_no_network_or_model_is_named(tmp_path):
    save_network(tmp_path / "t.pt", tiny())
    for call, words in (
        (lambda: untyped(save_network)(tmp_path / "u", "resnet18"), "to save is a str"),
        (lambda: load_network(tmp_path / "t.pt", torchvision.models.resnet18), "model is resnet18: expected a model's"),
        (lambda: load_network(tmp_path), "is a folder"),
        (lambda: load_network("a" * 5000), "cannot be read: File name too long"),
        (lambda: untyped(load_network)(None), "is a NoneType: expected a path"),
        (lambda: load_network("~/no such file"), f"no such file: {Path.home()}"),
        (lambda: load_teachers([tiny()], mean=(0.5,) * 3), "mean given without files"),
    ):
        with pytest.raises(InputError, match=words):
            call()
