"""How the halo convolution is launched: its shared memory, and devices for which its kernels have no body.

The launcher is compiled by nvcc and linked with ``fake_cuda_runtime.cpp``: its host code runs, no kernel does.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.kernels import halo_conv as halo
from tests.kernels.sanitize import find_nvcc
from tests.untyped import untyped

ROOT = Path(__file__).parents[2]
# as a block's shape, and bytes of the largest tile with two chunks of input channels
MOST = {16: 39508, 32: 75092, 64: 133972, 128: 160596}
LARGE, SMALL = (5, 7, 7), (1, 3, 3)  # images, rows, columns: bordered 405 and 25 positions
NOT_SUPPORTED, INVALID = 801, 1


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    if (nvcc := find_nvcc()) is None:
        pytest.skip("no nvcc on this machine")
    library = tmp_path_factory.mktemp("launch") / "launch.so"
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=compute_90a", "-Xcompiler=-fPIC", "-shared"]
    # PyTorch's own runtime has been loaded for all
    command += ["-cudart=none", "-Xlinker=-Bsymbolic", f"-I{ROOT / 'csrc'}", str(ROOT / "csrc/halo_conv.cu")]
    command += [str(ROOT / "tests/kernels/fake_cuda_runtime.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


@pytest.fixture
def runtime(library, tmp_path):
    """A process's first launches each: the library is loaded anew from a copy."""
    copy = tmp_path / "launch.so"
    copy.write_bytes(Path(library).read_bytes())
    loaded = ctypes.CDLL(str(copy))
    loaded.events.restype = ctypes.c_char_p
    loaded.has_body.restype = ctypes.c_bool
    return loaded


def events(runtime) -> list[tuple[str, ...]]:
    found = [tuple(line.split()) for line in runtime.events().decode().splitlines()]
    runtime.forget()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(LARGE, SMALL, LARGE), (SMALL, LARGE)], ids=["large-first", "small-first"])
def test_the_limit_of_shared_memory_is_set_once_and_to_the_most(runtime, sizes):
    """A limit that a smaller launch lowers fails the larger one that a graph holds."""
    for columns in MOST:
        for gradient in (False, True):
            for size in sizes:
                assert runtime.launch(columns, *size, 640, gradient) == 0
    found = events(runtime)
    limits = [event[2:] for event in found if event[1] == "limit"]
    assert limits == [(str(columns), way, str(MOST[columns])) for columns in MOST for way in ("forward", "gradient")]
    assert len([event for event in found if event[1] == "launch"]) == 8 * len(sizes)
    assert max(int(event[4]) for event in found if event[1] == "launch") == MOST[128] == runtime.most_shared()
    runtime.use_device(1, 227 * 1024, 90)
    assert runtime.launch(128, *SMALL, 64, False) == 0
    assert [event[:2] for event in events(runtime)] == [("1", "limit"), ("1", "launch")], "each device has its own"


@pytest.mark.slow
def test_a_kernel_without_a_body_is_not_launched(runtime):
    """An empty one would leave its results as they were, without an error."""
    runtime.use_device(0, 99 * 1024, 89)
    for columns in MOST:
        assert runtime.launch(columns, *SMALL, 16, False) == NOT_SUPPORTED
    assert events(runtime) == []
    runtime.use_device(0, 99 * 1024, 80)  # 8.6 runs what was compiled for 8.0
    assert [runtime.launch(columns, *SMALL, 16, False) for columns in MOST] == [0, 0, INVALID, INVALID]
    assert [event[1:3] for event in events(runtime) if event[1] == "launch"] == [("launch", "16"), ("launch", "32")]
    runtime.use_device(0, 163 * 1024, 80)  # an error is not kept
    assert [runtime.launch(columns, *SMALL, 16, False) for columns in MOST] == [0, 0, 0, 0]


@pytest.mark.slow
def test_python_and_cuda_agree(runtime):
    assert runtime.most_shared() <= halo.SHARED
    for arch in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
        assert halo.without_body(arch) is not runtime.has_body(10 * arch)


@pytest.mark.parametrize("arch", [86, 89, 120, 121])
def test_an_architecture_without_the_kernels_has_no_support(monkeypatch, arch):
    covered = (16, 16, halo.WINDOW, torch.bfloat16)
    assert halo.supports(*covered, arch=90)
    assert not halo.supports(*covered, arch=arch)
    assert f"compute capability {arch / 10}" in halo.unsupported(*covered, arch=arch)
    monkeypatch.setattr(halo.extension, "serves", lambda *names: True)
    assert halo.built()
    assert halo.built(90)
    assert not halo.built(arch)
    table, stem = Dispatch([Choice("conv", "cuda", "for the test")]), SimpleNamespace(name="stem")
    chosen = {at: untyped(table).choice("conv", stem, at) for at in (90, arch)}
    assert chosen[90].implementation == "cuda"
    assert chosen[arch] is None, "Triton's kernel"
    monkeypatch.setattr(halo.extension, "serves", lambda *names: False)
    assert table.missing(90)
    assert not table.missing(arch), "building it would not help"


def test_a_device_with_too_little_shared_memory_is_refused(monkeypatch):
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    for limit, refused in ((227 * 1024, False), (163 * 1024, False), (99 * 1024, True)):
        found = SimpleNamespace(shared_memory_per_block_optin=limit)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        expected = f"a device with {limit} bytes of shared memory, expected 163840"
        assert halo.short_of_memory(untyped(x)) == (expected if refused else "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    with pytest.raises(AttributeError):  # what is not known is not taken for enough
        halo.short_of_memory(untyped(x))
