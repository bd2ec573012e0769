"""Files that others wrote: their weights are found wherever they stand, nothing in them runs, and a misfit is said."""

import argparse
import bz2
import collections
import datetime
import enum
import gzip
import io
import os
import pathlib
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from fastensdistill.errors import InputError
from fastensdistill.evaluate.runs import Foreign
from fastensdistill.foreign.formats import read_any
from fastensdistill.foreign.pickles import Stub
from fastensdistill.models import create_model
from fastensdistill.weights import load_network, save_network
from tests.compare import check_close
from tests.networks import scatter, tiny
from tests.untyped import untyped


class Small(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def network(classes=4):
    return scatter(Small(classes)).eval()


def check_loaded(path, expected, model=None):
    loaded = load_network(path, model or Small())
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


class Checkpoint(NamedTuple):
    model: dict
    epoch: int


class Colour(enum.Enum):
    RED = 1


OTHERS = {
    "namespace": argparse.Namespace(lr=0.1),
    "numpy-number": np.float64(93.1),
    "numpy-array": np.arange(6.0).reshape(2, 3),
    "numpy-objects": np.array([None, "a"], dtype=object),
    "path": pathlib.Path("/x"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "date": datetime.datetime(2026, 1, 1),
    "enum": Colour.RED,
    "set": {1, 2},
    "function": os.path.join,
    "class": Stub,
    "simple-namespace": types.SimpleNamespace(a=1),
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "size": torch.Size([1, 2]),
    "generator-state": torch.get_rng_state(),
    "sparse": torch.eye(3).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, momentum=0.9).state_dict(),
    "criterion": nn.CrossEntropyLoss(weight=torch.ones(4)),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_objects_beside_the_weights_are_passed_over(other, new, tmp_path):
    net = network()
    torch.save({"model": net.state_dict(), "other": other}, tmp_path / "t", _use_new_zipfile_serialization=new)
    check_loaded(tmp_path / "t", net)


def nested(key: str, state: Any) -> dict[str, Any]:
    return {"epoch": 3, key: state}


def nested_with(prefix: str, state: Any) -> dict[str, Any]:
    return {"state_dict": prefixed(prefix, state)}


NESTS: dict[str, Callable[[Any], Any]] = {
    **{key: partial(nested, key) for key in (
        "state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "state_dict_ema",
        "model_ema", "ema", "student", "teacher", "module", "params_ema", "G", "backbone_weights",
    )},
    "two-levels": lambda s: {"net": {"state_dict": s}, "optimizer": {"state": {0: {"momentum": torch.ones(2)}}}},
    "a-list": lambda s: [s, 3],
    "a-tuple-in-a-dict": lambda s: {"checkpoint": (3, {"model": s})},
    "defaultdict": lambda s: {"state_dict": collections.defaultdict(None, s)},
    **{prefix: partial(nested_with, prefix) for prefix in (
        "module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "resnet.", "_forward_module.", "network.",
        "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.backbone.", "_forward_module.model.module.",
        "0.", "student.net.",
    )},
    "infix": lambda s: {k.replace("conv.", "conv._orig_mod.").replace("fc.", "fc.module."): v for k, v in s.items()},
    "counters": lambda s: s | {"total_ops": torch.zeros(1), "conv.total_params": torch.ones(1), "n": torch.tensor(3)},
    "criterion": lambda s: {"state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(4)}},
    "criterion-beside": lambda s: s | {"criterion.weight": torch.ones(4), "train_acc.total": torch.ones(1)},
    "an-averages-own": lambda s: {"ema": prefixed("module.", s) | {"decay": torch.tensor(0.9), "n": torch.tensor(3)}},
    "named-tuple": lambda s: Checkpoint(s, 3),
    "names-in-bytes": lambda s: {k.encode(): v for k, v in s.items()},
    "half-with-the-counters": lambda s: {k: v.half().float() if "num" not in k else v.half() for k, v in s.items()},
    "no-counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "plain-beside-the-average": lambda s: {"model": s, "model_ema": {k: v * 0 for k, v in s.items()}},
    "average-first": lambda s: {"ema_state_dict": {k: v * 0 for k, v in s.items()}, "state_dict": s},
    "twice-the-same": lambda s: {"a": s, "b": {k: v.clone() for k, v in s.items()}},
    "momentum-of-the-same-names": lambda s: {"momentum": {k: v * 0 for k, v in s.items()}, "model": s},
}  # fmt: skip


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_weights_are_found_in_any_nest_and_under_any_prefix(nest, tmp_path):
    net = network().half().float()
    content = nest(net.state_dict())
    torch.save(content, tmp_path / "t.ckpt")
    loaded = load_network(tmp_path / "t.ckpt", Small())
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) or "num_batches" in name


def test_of_the_plain_weights_and_their_average_the_plain_ones_are_read_and_that_is_said(tmp_path, capsys):
    net, average = network(), AveragedModel(network())
    torch.save({"model_ema": average.state_dict(), "model": net.state_dict()}, tmp_path / "t.pt")
    check_loaded(tmp_path / "t.pt", net)
    said = capsys.readouterr().err
    assert "read the weights under model, not those under model_ema.module" in said
    assert said.count("\n") == 1
    torch.save({"a": net.state_dict(), "b": network().state_dict()}, tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"2 times, under a, b: save those that are meant"):
        load_network(tmp_path / "t.pt", Small())
    torch.save([net.state_dict(), network().state_dict()], tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"2 times, under 0, 1"):
        load_network(tmp_path / "t.pt", Small())


def whole(net, path):
    torch.save(net, path)


def whole_in_a_dict(net, path):
    torch.save({"epoch": 1, "model": net, "optimizer": torch.optim.SGD(net.parameters(), 0.1)}, path)


def before_1_6(net, path):
    torch.save(net, path, _use_new_zipfile_serialization=False)


def wrapped_whole(net, path):
    torch.save(nn.DataParallel(net), path)


def torchscript(net, path):
    torch.jit.script(net).save(path)


def traced(net, path):
    torch.jit.trace(net, torch.rand(1, 3, 8, 8)).save(path)


def plain_pickle(net, path):
    path.write_bytes(pickle.dumps({"state_dict": net.state_dict()}))


def pickled_arrays(net, path):
    path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in net.state_dict().items()}}, protocol=2))


def pickled_arrays_5(net, path):
    path.write_bytes(pickle.dumps({k: np.asfortranarray(v.numpy()) for k, v in net.state_dict().items()}, protocol=5))


def text_pickle(net, path):
    path.write_bytes(pickle.dumps({k: v.numpy() for k, v in net.state_dict().items()}, protocol=0))


def npz(net, path):
    with open(path, "wb") as file:
        np.savez(file, **{k: v.numpy() for k, v in net.state_dict().items()})


def safetensors(net, path):
    save_file(net.state_dict(), path)


def gzipped(net, path):
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    path.write_bytes(gzip.compress(buffer.getvalue()))


def bzipped_safetensors(net, path):
    save_file(net.state_dict(), path)
    path.write_bytes(bz2.compress(path.read_bytes()))


def parameters(net, path):
    torch.save({"net": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}}, path)


WRITERS = [
    whole, whole_in_a_dict, before_1_6, wrapped_whole, torchscript, traced, plain_pickle, pickled_arrays,
    pickled_arrays_5, text_pickle, npz, safetensors, gzipped, bzipped_safetensors, parameters,
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_a_format_is_known_by_its_content(write, suffix, tmp_path):
    net = network()
    write(net, tmp_path / f"t{suffix}")
    loaded = load_network(tmp_path / f"t{suffix}", Small())
    x = torch.rand(2, 3, 8, 8)
    check_close("logits", loaded(x), net(x), 0.0)


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


def saved(**more):
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer, **more)
    return buffer.getvalue()


NO_WEIGHTS = {
    "empty": (b"", "is empty"),
    "html": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "html-after-spaces": (b"\n\n <HTML><body>Quota exceeded", "is a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-LFS pointer"),
    "text": (b"hello" * 100, "holds no weights"),
    "json": (b'{"error": "Not found"}', "is JSON text"),
    "index": (b'{"weight_map": {"a": "model-1.safetensors"}}', "index of several files"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "single NumPy array"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "compressed with zstd"),
    "tar": (b"a" * 257 + b"ustar" + bytes(300), "is a tar archive"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x062.11.0", "is an ONNX model"),
    "zip-of-files": (archive(**{"a/readme.txt": b"x"}), "a zip archive of a/readme.txt"),
    "zeros": (bytes(1000), "holds no weights"),
    "cut-zip": (saved()[:1000], "is truncated"),
    "cut-before-1.6": (saved(_use_new_zipfile_serialization=False)[:-20], "is truncated or damaged"),
    "cut-pickle": (pickle.dumps({"a": list(range(500))})[:100], "is truncated or damaged"),
    "cut-gzip": (gzip.compress(saved())[:200], "is compressed, and truncated"),
    "pickle-of-no-tensors": (pickle.dumps({"a": 1, "b": [2]}), "holds no state dict"),
    "huge-length": (b"\x80\x02\x8e" + (2**60).to_bytes(8, "little"), "is truncated or damaged"),
}


@pytest.mark.parametrize(("data", "words"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_holds_no_weights_is_named(data, words, suffix, tmp_path):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as error:
        load_network(path, Small())
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


def test_a_damaged_byte_is_seen(tmp_path):
    data = bytearray(saved())
    data[len(data) // 3] ^= 255
    (tmp_path / "t.pt").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"damaged|truncated|does not fit"):
        load_network(tmp_path / "t.pt", Small())


class Evil:
    """Unpickled, calls ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evils(folder):
    owned = str(folder / "owned")
    return {
        "os.mkdir": Evil(os.mkdir, owned),
        "os.system": Evil(os.system, f"touch {owned}"),
        "eval": Evil(eval, f"open({owned!r}, 'w')"),
        "exec": Evil(exec, f"open({owned!r}, 'w')"),
        "getattr": Evil(getattr, "a", "upper"),
        "import": Evil(__import__, "antigravity"),
        "torch.load": Evil(torch.load, owned),
        "open": Evil(open, owned, "w"),
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("name", evils(pathlib.Path()))
def test_code_in_a_pickle_is_never_run_and_its_tensors_load(name, new, tmp_path):
    net = network()
    content = {"model": net.state_dict(), "evil": evils(tmp_path)[name]}
    torch.save(content, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    check_loaded(tmp_path / "t.pt", net)
    assert not (tmp_path / "owned").exists()
    assert "antigravity" not in sys.modules
    torch.save({"conv.weight": evils(tmp_path)[name]}, tmp_path / "t.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        load_network(tmp_path / "t.pt", Small())
    assert not (tmp_path / "owned").exists()


# Pickles written by hand: BUILD (b) sets state, REDUCE (R) calls, NEWOBJ (\x81) makes
BY_HAND = {
    "state-on-our-function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "slots-on-our-function": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x09\x00\x00\x00_functionK\x01s\x86b.",
    "state-on-our-mapping": b"\x80\x02ccollections\nOrderedDict\n}X\x06\x00\x00\x00updateK\x01sb.",
    "state-on-a-dtype": b"\x80\x02ctorch\nfloat32\n}X\x01\x00\x00\x00aK\x01sb.",
    "state-on-a-storage-type": b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.",
    "a-copyreg-extension": b"\x80\x02\x82\x01.",
    "another-persistent-id": b"\x80\x02X\x04\x00\x00\x00evilQ.",
    "a-function-of-torch": b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R.",
    "a-dotted-name": b"\x80\x04\x8c\x05torch\x8c\x0bload.__doc__\x93.",
    "endless": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("data", BY_HAND.values(), ids=BY_HAND)
def test_pickles_made_to_change_this_process_change_nothing(data, tmp_path):
    (tmp_path / "t.pt").write_bytes(data)
    with pytest.raises(InputError):
        load_network(tmp_path / "t.pt", Small())
    net = network()
    torch.save({"model": net.state_dict()}, tmp_path / "t.pt")
    check_loaded(tmp_path / "t.pt", net)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as file:
        files = {name: file.read(name) for name in file.namelist()}
    inside = next(name for name in files if name.endswith("data.pkl"))
    # (6, 3, 3, 3) becomes (7, 3, 3, 3)
    assert b"(K\x06K\x03K\x03K\x03t" in files[inside]
    files[inside] = files[inside].replace(b"(K\x06K\x03K\x03K\x03t", b"(K\x07K\x03K\x03K\x03t")
    (tmp_path / "t.pt").write_bytes(archive(**files))
    with pytest.raises(InputError, match="damaged"):
        load_network(tmp_path / "t.pt", Small())


def normed(norm):
    net = network()
    norm(net.conv)
    norm(net.fc)
    return net


BAKED = {
    "weight-norm": weight_norm,
    "weight-norm-of-another-dimension": lambda layer: weight_norm(layer, dim=1),
    "weight-norm-as-a-whole": lambda layer: weight_norm(layer, dim=untyped(None)),
    "weight-norm-parametrisation": parametrizations.weight_norm,
    "spectral-norm": spectral_norm,
    "spectral-norm-parametrisation": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned-bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
}


@pytest.mark.parametrize("norm", BAKED.values(), ids=BAKED)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_parametrisation_makes_are_computed(norm, tmp_path):
    net = normed(norm).eval()
    torch.save({"state_dict": prefixed("module.", net.state_dict())}, tmp_path / "t.pt")
    x = torch.rand(2, 3, 8, 8)
    check_close("plain", load_network(tmp_path / "t.pt", Small())(x), net(x), 1e-5)


def test_a_parametrisation_that_is_not_known_is_refused(tmp_path):
    net = network()
    parametrizations.orthogonal(net.fc)
    torch.save(net.state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"'fc.weight' is missing"):
        load_network(tmp_path / "t.pt", Small())
    assert parametrize.is_parametrized(net.fc)


def test_the_published_names_of_densenet(tmp_path):
    net = torchvision.models.densenet121(num_classes=5).eval()
    state = {k.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace(
        "conv2.", "conv.2."): v for k, v in net.state_dict().items() if "num_batches" not in k}  # fmt: skip
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "t.pth")
    loaded = load_network(tmp_path / "t.pth", "densenet121", mean=(0, 0, 0), std=(1, 1, 1))
    x = torch.rand(1, 3, 32, 32)
    check_close("logits", loaded(x), net(x), 0.0)


def misfit(net, how):
    state = dict(net.state_dict())
    if how == "half":
        return {k: v for i, (k, v) in enumerate(state.items()) if i % 2}, "4 are missing"
    if how == "another-layer":
        return state | {"fc2.weight": torch.ones(2, 2)}, "1 are unknown; 'fc2.weight' is unknown"
    if how == "classes":
        return network(7).state_dict(), r"has 7 classes, not 4"
    if how == "shape":
        return state | {"conv.weight": torch.ones(6, 3, 5, 5)}, r"conv.weight has shape \(6, 3, 5, 5\)"
    if how == "other-names":
        return {"layer.w": torch.ones(2)}, "none of its 8 tensors, such as 'bn.bias'; it has 'state_dict.layer.w'"
    if how == "integers":
        return state | {"fc.weight": torch.ones(4, 6, dtype=torch.int8)}, "'fc.weight' is torch.int8, expected"
    if how == "quantised":
        return state | {"fc.weight": torch.quantize_per_tensor(torch.ones(4, 6), 0.1, 0, torch.qint8)}, "a quantised"
    if how == "sparse":
        return state | {"fc.weight": torch.ones(4, 6).to_sparse()}, "'fc.weight' is a sparse tensor"
    if how == "meta":
        return state | {"fc.weight": torch.ones(4, 6, device="meta")}, "without values"
    assert how == "infinite"
    return state | {"fc.bias": torch.tensor([1.0, torch.inf, 0, 0])}, "not finite, in 'fc.bias'"


@pytest.mark.parametrize(
    "how",
    ["half", "another-layer", "classes", "shape", "other-names", "integers", "quantised", "sparse", "meta", "infinite"],
)
def test_what_does_not_fit_is_said_and_changes_nothing(how, tmp_path):
    state, words = misfit(network(), how)
    torch.save({"state_dict": state}, tmp_path / "t.pt")
    mine = Small()
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    with pytest.raises(InputError, match=words):
        load_network(tmp_path / "t.pt", mine)
    assert all(torch.equal(before[k], v) for k, v in mine.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_take_the_networks(dtype, tmp_path):
    net = network().to(dtype)
    torch.save(net.state_dict(), tmp_path / "t.pt")
    loaded = load_network(tmp_path / "t.pt", Small())
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype)), name
    small = Small().to(torch.float16)
    torch.save(Small().state_dict() | {"fc.bias": torch.full((4,), 1e30)}, tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"values that torch\.float16 cannot"):
        load_network(tmp_path / "t.pt", small)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("middle", untyped(self.table)[2:5])
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())


def test_modules_on_the_meta_device_are_filled_or_refused(tmp_path):
    net = network()
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, tmp_path / "t.pt")
    with torch.device("meta"):
        empty = Small()
    loaded = load_network(tmp_path / "t.pt", empty)
    x = torch.rand(2, 3, 8, 8)
    check_close("logits", loaded(x), net(x), 0.0)
    assert empty.conv.weight.is_meta
    with torch.device("meta"):
        empty.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(InputError, match=r"'scale' of Small is on the meta device"):
        load_network(tmp_path / "t.pt", empty)
    with torch.device("meta"):
        tied = Tied()
    save_network(tmp_path / "tied.pt", Tied())
    filled = load_network(tmp_path / "tied.pt", tied)
    assert untyped(filled).a.weight is untyped(filled).b.weight


def test_lazy_modules_are_refused_until_they_have_a_shape(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "t.pt")
    lazy = Small()
    lazy.conv, lazy.fc = nn.LazyConv2d(6, 3), nn.LazyLinear(4)
    with pytest.raises(InputError, match="lazy layer 'conv' has no shape yet"):
        load_network(tmp_path / "t.pt", lazy)
    lazy(torch.rand(1, 3, 8, 8))
    check_loaded(tmp_path / "t.pt", net, lazy)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_buffers_that_share_memory_come_back(suffix, tmp_path):
    net = Tied()
    net.wide = torch.full((1,), 3.0).expand(4)
    save_network(tmp_path / f"t{suffix}", net)
    loaded = load_network(tmp_path / f"t{suffix}", Tied())
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_any_of_torchvisions_classifiers_and_what_their_auxiliary_heads_leave(tmp_path, capsys):
    net = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False).eval()
    torch.save({"module." + k: v for k, v in net.state_dict().items()}, tmp_path / "t.pth")
    loaded = load_network(tmp_path / "t.pth", "googlenet")
    x = torch.rand(1, 3, 64, 64)
    check_close("logits", loaded(x), net((x - 0.5) / 0.5), 1e-6)
    assert "mean 0.500 0.500 0.500" in capsys.readouterr().err
    for name in ("squeezenet1_1", "regnet_y_400mf"):  # a head that is a convolution; not made on the meta device
        small = torchvision.models.get_model(name, num_classes=7).eval()
        torch.save(small.state_dict(), tmp_path / "t.pth")
        assert load_network(tmp_path / "t.pth", name)(x).shape == (1, 7)


def test_a_state_dict_of_ours_keeps_the_normalisation_it_holds(tmp_path):
    net = scatter(tiny(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))).eval()
    torch.save({"state_dict": prefixed("module.", net.state_dict())}, tmp_path / "t.pt")
    loaded = load_network(tmp_path / "t.pt", "preresnet", blocks=(1, 1), in_planes=4)
    x = torch.rand(2, 3, 8, 8)
    check_close("logits", loaded(x), net(x), 0.0)
    assert untyped(loaded).spec.arguments["mean"] == pytest.approx((0.1, 0.2, 0.3))
    with pytest.raises(InputError, match=r"itself: not mean=\(0\.9"):
        load_network(tmp_path / "t.pt", "preresnet", blocks=(1, 1), in_planes=4, mean=(0.9,) * 3, std=(0.4, 0.5, 0.6))
    bare = {k: v for k, v in net.state_dict().items() if not k.startswith("normalize")}
    torch.save(bare, tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"pass mean= and std=.*0\.485"):
        load_network(tmp_path / "t.pt", "preresnet", blocks=(1, 1), in_planes=4)


def test_timm_weights_keep_the_normalisation_that_timm_gives_them(tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=224).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    loaded = load_network(tmp_path / "model.safetensors", "timm/vit_tiny_patch16_224")
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    x = torch.rand(1, 3, 224, 224)
    check_close("logits", loaded(x), net((x - mean) / std), 1e-5)
    assert "published timm/vit_tiny_patch16_224 weights, mean 0.500 0.500 0.500" in capsys.readouterr().err
    for name, words in (("resnet1888", "unknown timm model"), ("resnet18.zzz", "Invalid pretrained tag")):
        with pytest.raises(InputError, match=words):
            create_model(f"timm/{name}", 5)


def test_a_network_of_ours_reads_nothing_else_into_a_stub():
    """A stub is inert whatever a pickle does with it."""
    stub = Stub(1, a=2)
    stub["a"] = 1
    stub.append(2)
    stub.extend([3])
    stub.__setstate__({"append": print})
    assert stub.items == {"a": 1, 1: 2, 2: 3}
    assert isinstance(stub("anything"), Stub)
    assert untyped(stub.append).__func__ is Stub.append


def test_reading_a_pickle_gives_leaves_and_stubs(tmp_path):
    torch.save({"a": torch.arange(4).view(2, 2).t(), "b": Colour.RED, "c": torch.ones(2, dtype=torch.cfloat).conj()},
               tmp_path / "t.pt")  # fmt: skip
    content = read_any(tmp_path / "t.pt")
    assert content["a"].read().tolist() == [[0, 2], [1, 3]]
    assert content["b"].path.endswith("Colour")
    assert content["c"].read().imag.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("model", "said"),
    [("resnet18", "published resnet18 weights, mean 0.485 0.456 0.406"), ("resnet32", "the data's, mean 0.100 0.200")],
)
def test_the_command_line_takes_the_normalisation_that_python_takes_and_the_datas_for_ours(
    model, said, tmp_path, capsys
):
    network = create_model(model, 5).eval()
    state = {k.removeprefix("network."): v for k, v in network.state_dict().items() if "normalize" not in k}
    torch.save(state, tmp_path / "t.pt")
    data = types.SimpleNamespace(mean=(0.1, 0.2, 0.3), std=(0.2,) * 3, channels=3, num_classes=5)
    loaded = Foreign(model).load(tmp_path / "t.pt", 0, 1, untyped(data))
    assert said in capsys.readouterr().err
    x = torch.rand(1, 3, 32, 32)
    if model == "resnet18":
        check_close("as from Python", loaded(x), load_network(tmp_path / "t.pt", model)(x), 0.0)
    else:
        assert untyped(loaded).spec.arguments["mean"] == data.mean
    given = Foreign(model, mean=(0.9,) * 3, std=(0.8,) * 3).load(tmp_path / "t.pt", 0, 1, untyped(data))
    assert untyped(given).spec.arguments["mean"] == (0.9,) * 3


def test_settings_for_all_files_are_for_those_that_do_not_say_them(tmp_path):
    save_network(tmp_path / "ours.pt", tiny())
    data = types.SimpleNamespace(mean=(0.1,) * 3, std=(0.2,) * 3, channels=3, num_classes=5)
    foreign = Foreign("resnet18", mean=(0.9,) * 3, std=(0.8,) * 3)
    assert untyped(foreign).load(tmp_path / "ours.pt", 0, 2, data).spec.arguments["mean"] == (0.5,) * 3
    with pytest.raises(InputError, match=r"says mean=\(0\.5, 0\.5, 0\.5\) itself"):
        foreign.load(tmp_path / "ours.pt", 0, 1, untyped(data))
    with pytest.raises(InputError, match=r"holds preresnet.*not resnet18"):
        Foreign("resnet18").load(tmp_path / "ours.pt", 0, 1, untyped(data))
