"""Files: what comes back is what was saved, foreign state dicts load, damaged and dangerous ones are refused."""

import os
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.evaluate.comparison import count_parameters
from fastensdistill.files import write_atomically
from fastensdistill.method.student import STUDENTS, LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model
from fastensdistill.weights import load_network, load_teachers, save_network
from tests.compare import check_close
from tests.test_student import scatter, tiny

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


def test_code_in_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"w": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(), 2))
    for path in (tmp_path / "zip.pt", tmp_path / "plain.pt"):
        with pytest.raises(InputError, match="without unpickling"):
            load_network(path, "wrn28_1")
    assert not (tmp_path / "owned").exists()


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


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
@pytest.mark.parametrize("name", ["t.safetensors", "t.pt"])
def test_damaged_files(how, name, tmp_path):
    damaged(tmp_path / name, how)
    with pytest.raises(InputError, match=r"t\.(safetensors is truncated|pt cannot be read)"):
        load_network(tmp_path / name, "wrn28_1", num_classes=5)


def test_refusals(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_network(path)
    save_network(path, tiny())
    with pytest.raises(InputError, match="does not fit"):
        load_network(path, create_model("resnet", 5))
    assert type(load_network(path, "resnet18")) is type(tiny()), "a file that says what it holds is believed"
    with pytest.raises(InputError, match="has shape"):
        load_network(path, tiny(classes=6))
    with pytest.raises(InputError, match="2 models for 1 files"):
        load_teachers(["wrn28_1", "wrn28_4"], [path])
    with pytest.raises(InputError, match="are names"):
        load_teachers("wrn28_1")
    broken = tiny()
    broken.classifier.bias.data[0] = float("nan")
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
    assert torch.equal(load_network(tmp_path / "t.pt", Own()).net.weight, network.net.weight)


def test_teachers_from_one_path_or_from_the_folder_that_teach_wrote(tmp_path):
    networks = [scatter(tiny()).eval() for _ in range(11)]
    for i, network in enumerate(networks):
        save_network(tmp_path / f"teacher-{i}.safetensors", network)
    check_close("all", load_teachers(files=[tmp_path])(X), torch.stack([n(X) for n in networks]), 0.0)
    check_close("one", load_teachers(files=str(tmp_path / "teacher-10.safetensors"))(X)[0], networks[10](X), 0.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no teacher-\*.safetensors"):
        load_teachers(files=tmp_path / "empty")


def test_files_that_are_no_state_dicts_are_refused_in_our_own_words(tmp_path):
    """PyTorch's own message advises to load the file in spite of what may be in it."""
    torch.save(tiny(), tmp_path / "module.pt")
    torch.save(tiny().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    words = {"module.pt": "other objects than tensors", "cut.pt": "truncated", "pickle.pt": "truncated or another"}
    for name, expected in words.items():
        with pytest.raises(InputError, match=expected) as error:
            load_network(tmp_path / name, "wrn28_1", num_classes=5)
        assert "weights_only" not in str(error.value)
        assert str(error.value).isprintable()


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
