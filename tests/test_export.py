"""Exports: what is reloaded gives the network's logits, and an export that does not is not kept."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastensdistill import export as module
from fastensdistill.errors import InputError
from fastensdistill.export import export_network
from fastensdistill.method.student import Hydra, LatentBE, Single
from fastensdistill.models import Normalized, create_model
from fastensdistill.weights import load_network, load_teachers
from tests.compare import check_close
from tests.networks import scatter, tiny
from tests.untyped import untyped

IMAGES = torch.rand(5, 3, 8, 8)


def network():
    return scatter(LatentBE(tiny(), 2)).average().eval()


def test_a_network_whose_weights_lie_channels_last_as_training_leaves_them(tmp_path):
    net = create_model("preresnet", 5, blocks=(1,), in_planes=4).eval()
    net = untyped(net).to(memory_format=torch.channels_last)
    assert [e.error for e in export_network(net, tmp_path, images=IMAGES, formats="safetensors")] == [0.0]
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)  # the caller's stays


def test_every_format_gives_the_same_logits_at_any_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx is an extra")
    pytest.importorskip("onnxscript", reason="onnx is an extra")
    net = network()
    done = export_network(
        net,
        tmp_path,
        images=IMAGES,
        formats=("safetensors", "torch", "onnx"),
        card={"data": "x", "classes": ["a", "b", "c", "d", "e"]},
    )
    assert [e.format for e in done] == ["safetensors", "torch", "onnx"]
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        check_close("safetensors", load_network(tmp_path / "network.safetensors")(x), expected, 0.0)
        check_close("torch", torch.export.load(tmp_path / "network.pt2").module()(x), expected, 1e-6)
    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"))
    onnx = session.run(None, {"images": np.asarray(x)})[0]
    check_close("onnx", torch.from_numpy(onnx), expected, 1e-5)
    card = json.loads((tmp_path / "network.json").read_text())
    assert card["architecture"] == "preresnet"
    assert card["input"]["mean"] == [0.5, 0.5, 0.5]
    assert card["parameters"] == sum(p.numel() for p in net.parameters())
    assert card["data"] == "x"
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == ["a", "b", "c", "d", "e"]
    assert json.loads(said["mean"]) == [0.5, 0.5, 0.5]
    assert json.loads(said["card"])["architecture"] == "preresnet"
    names = {"network.safetensors", "network.pt2", "network.onnx", "network.json"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_an_export_with_other_logits_is_not_kept(tmp_path, monkeypatch):
    write, _, suffix = module._WAYS["torch"]
    monkeypatch.setitem(module._WAYS, "torch", (write, lambda p, n, x: n(x) + 1e-2, suffix))
    with pytest.raises(InputError, match="other logits"):
        export_network(network(), tmp_path, images=IMAGES, formats=("safetensors", "torch"))
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_the_users_own(tmp_path):
    mine = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    (exported,) = export_network(mine, tmp_path, images=IMAGES, formats=("safetensors",))
    assert exported.error == 0
    assert json.loads((tmp_path / "network.json").read_text())["architecture"] == "Sequential"


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="did you mean 'onnx'"):
        export_network(network(), tmp_path, images=IMAGES, formats=("onx",))
    with pytest.raises(InputError, match=r"average\(\)"):
        export_network(LatentBE(tiny(), 2), tmp_path, images=IMAGES)
    for student, words in ((Single(tiny()), "single .*export its module"), (Hydra(tiny(), 2), "it is an ensemble")):
        with pytest.raises(InputError, match=words):
            export_network(student, tmp_path, images=IMAGES)
    with torch.device("meta"):
        empty = own()
    for given, words in (
        (nn.DataParallel(LatentBE(tiny(), 2)), r"average\(\)"),
        (LatentBE(tiny(), 2).module, "layers of a student with branches"),
        (nn.Sequential(LatentBE(tiny(), 2)), "layers of a student with branches"),
        (load_teachers([network(), network()]), "2 teachers are not one network"),
        ("network.safetensors", "is a str"),
        (empty, "on the meta device"),
        (nn.Sequential(nn.Conv2d(7, 2, 1)), "Sequential does not take images"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), r"returns shape \(5, 2, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=words):
            untyped(export_network)(given, tmp_path, images=IMAGES)
    for more, words in (
        ({"images": IMAGES[:1]}, "at least 2"),
        ({"images": (IMAGES * 255).byte()}, r"are torch\.uint8"),
        ({"images": IMAGES.tolist()}, "are list"),
        ({"formats": ()}, "no export formats given: expected any of safetensors, torch, onnx"),
        ({"formats": None}, "no export formats given"),
        ({"formats": [3]}, "unknown export format '3'"),
        ({"name": "a/b"}, "name='a/b'"),
    ):
        with pytest.raises(InputError, match=words):
            untyped(export_network)(network(), tmp_path, **{"images": IMAGES, **more})
    assert not list(tmp_path.iterdir())


def test_one_format_may_be_a_name_and_the_exporters_warnings_are_not_the_users(tmp_path, recwarn):
    network = scatter(tiny()).eval()
    (done,) = export_network(network, tmp_path, images=torch.rand(4, 3, 8, 8), formats="torch")
    assert (done.format, done.path.name) == ("torch", "network.pt2")
    assert not [str(w.message) for w in recwarn]


def own(**more):
    return nn.Sequential(nn.Conv2d(3, 4, 3, **more), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def compiled_inside():
    net = own()
    net[0] = torch.compile(net[0], backend="eager")
    return net


WRAPPED = {
    "compiled": lambda: torch.compile(own(), backend="eager"),
    "data-parallel": lambda: nn.DataParallel(own()),
    "compiled-data-parallel": lambda: torch.compile(nn.DataParallel(own()), backend="eager"),
    "averaged": lambda: AveragedModel(own()),
    "a-layer-compiled": compiled_inside,
    "normalised": lambda: Normalized(own(), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_what_is_wrapped_is_exported_under_the_names_of_its_class(make, tmp_path):
    net = scatter(make()).train()
    net.requires_grad_(False)
    formats = ("safetensors", "torch", "safetensors") if isinstance(net, Normalized) else ("safetensors",)
    done = export_network(net, tmp_path, images=IMAGES, formats=formats)
    assert [e.format for e in done] == list(dict.fromkeys(formats))
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())
    mine = own().eval()
    mine.load_state_dict(load_file(tmp_path / "network.safetensors"))
    card = json.loads((tmp_path / "network.json").read_text())
    assert card["class"] == "torch.nn.modules.container.Sequential"
    x = IMAGES
    if isinstance(net, Normalized):
        mean, std = (torch.tensor(card["input"][k]).view(3, 1, 1) for k in ("mean", "std"))
        x = (x - mean) / std
        assert "for (image - mean) / std" in card["input"]["normalisation"]
        again = load_network(tmp_path / "network.safetensors", own())
        check_close("loaded", again(IMAGES), net.eval()(IMAGES), 0.0)
    check_close("logits", mine(x), net.eval()(IMAGES), 1e-6)
    with safe_open(tmp_path / "network.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_programs_take_float32_images_whatever_the_networks_precision(dtype, tmp_path):
    net = scatter(own()).eval().to(dtype)
    export_network(net, tmp_path, images=IMAGES)
    logits = torch.export.load(tmp_path / "network.pt2").module()(IMAGES)
    assert logits.dtype == torch.float32
    check_close("program", logits, net(IMAGES.to(dtype)).float(), 0.0)
    check_close("weights", load_network(tmp_path / "network.safetensors", own().to(dtype))(IMAGES.to(dtype)).float(),
                logits, 0.0)  # fmt: skip
    assert json.loads((tmp_path / "network.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert next(net.parameters()).dtype == dtype


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 3)

    def forward(self, x):
        x -= 0.5
        return self.layer(x)


def test_a_network_of_vectors_that_writes_into_its_input(tmp_path):
    net, vectors = Writing().eval(), torch.rand(4, 20)
    before = vectors.clone()
    export_network(net, tmp_path, images=vectors)
    assert torch.equal(vectors, before)
    check_close(
        "logits", torch.export.load(tmp_path / "network.pt2").module()(before.clone()), net(before.clone()), 1e-6
    )


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))


def test_what_cannot_be_exported_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(InputError, match="the torch export could not be made"):
        export_network(Branching(), tmp_path, images=images, formats=("safetensors", "torch"))

    def full(*_arguments, **_more):
        raise RuntimeError("PytorchStreamWriter failed writing file data.pkl: file write failed\nframe #0: ...")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(InputError, match=r"file write failed$"):
        export_network(scatter(tiny()).eval(), tmp_path, images=images, formats=("safetensors", "torch"))
    assert not list(tmp_path.iterdir())


class Returning(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.conv, self.output = nn.Conv2d(3, 5, 3), output

    def forward(self, x):
        x -= 0.5
        features = self.conv(x)
        return self.output(features.mean((2, 3)), features)


OUTPUTS = {
    "logits": lambda z, f: z,
    "logits and features": lambda z, f: (z, f),
    "a mapping": lambda z, f: {"features": f, "logits": z},
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_programs_return_the_logits_and_leave_the_images(output, tmp_path):
    network, kept = Returning(output), IMAGES.clone()
    expected = network.conv(IMAGES - 0.5).mean((2, 3)).detach()
    export_network(network, tmp_path, images=IMAGES)
    logits = torch.export.load(tmp_path / "network.pt2").module()(IMAGES)
    check_close("logits", logits.detach(), expected, 1e-5)
    assert torch.equal(IMAGES, kept)


def test_what_returns_no_logits_is_not_exported(tmp_path):
    with pytest.raises(InputError, match="returns a mapping of 'features', 'value'"):
        export_network(Returning(lambda z, f: {"features": f, "value": z}), tmp_path, images=IMAGES)
    with pytest.raises(InputError, match="RecursiveScriptModule"):
        export_network(torch.jit.script(nn.Conv2d(3, 5, 3)), tmp_path, images=IMAGES)
    assert not list(tmp_path.iterdir())
