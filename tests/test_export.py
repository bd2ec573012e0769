"""Exports: what is reloaded gives the network's logits, and an export that does not is not kept."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fastensdistill import export as module
from fastensdistill.errors import InputError
from fastensdistill.export import export_network
from fastensdistill.method.student import LatentBE
from fastensdistill.weights import load_network
from tests.compare import check_close
from tests.test_student import scatter, tiny

IMAGES = torch.rand(5, 3, 8, 8)


def network():
    return scatter(LatentBE(tiny(), 2)).average().eval()


def test_every_format_gives_the_same_logits_at_any_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx is an extra")
    pytest.importorskip("onnxscript", reason="onnx is an extra")
    net = network()
    done = export_network(net, tmp_path, images=IMAGES, formats=("safetensors", "torch", "onnx"), card={"data": "x"})
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
    with pytest.raises(InputError, match="at least 2"):
        export_network(network(), tmp_path, images=IMAGES[:1])


def test_one_format_may_be_a_name_and_the_exporters_warnings_are_not_the_users(tmp_path, recwarn):
    network = scatter(tiny()).eval()
    (done,) = export_network(network, tmp_path, images=torch.rand(4, 3, 8, 8), formats="torch")
    assert (done.format, done.path.name) == ("torch", "network.pt2")
    assert not [str(w.message) for w in recwarn]


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
