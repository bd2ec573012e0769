"""What the extension's ops refuse, called without the checks that the public functions make in Python.

Past these stands a kernel: a read past a buffer's end, and a tensor of another device ends the CUDA context. The ops
are called as ``emulation.py`` builds them, whose kernels run on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastensdistill.kernels import extension, halo_conv
from tests.kernels import rows, weight_gradients, wgmma_convs
from tests.kernels.emulation import OPS, call
from tests.kernels.halos import CASES, epilogues, gradient_epilogues
from tests.kernels.halos import operands as halo_operands
from tests.untyped import untyped

ROOT = Path(__file__).parents[2]
FIRST = {  # the operand whose device the others have to be on
    "distillation_loss": "branch_logits",
    "teacher_diversity_seed": "teacher_pair", "diversity_seed": "teacher_pair", "ods_seed": "logits",
    "perturb_step": "images", "pack_rank_one": "parameters", "halo_conv": "x", "halo_data_gradient": "d",
    "wgmma_conv": "x", "wgmma_data_gradient": "d", "wgmma_weight_gradient": "x",
}  # fmt: skip
DENSE = {  # operands that have to be contiguous
    "pack_rank_one": ("packed", "packed_gradient"),
    **{name: tuple(a.name for a in getattr(torch.ops.fastensdistill, name).default._schema.arguments)
       for name in ("halo_conv", "halo_data_gradient", "wgmma_conv", "wgmma_data_gradient", "wgmma_weight_gradient")},
}  # fmt: skip


def arguments(name: str) -> dict[str, Any]:
    """Every argument of an op by the name it has in the schema, all optional tensors given."""
    names = [argument.name for argument in getattr(torch.ops.fastensdistill, name).default._schema.arguments]
    if name == "wgmma_weight_gradient":
        values = weight_gradients.op_operands(weight_gradients.CASES[0], weight_gradients.EVERYTHING)
    elif name.startswith("wgmma"):
        values = wgmma_arguments(name)
    elif not name.startswith("halo"):
        values = rows.operands(name, torch.float32, False)
    else:
        x, weight, slots = halo_operands(CASES[0])
        tile = list(untyped(halo_conv.halo_tile)(*x.shape[1:4], weight.shape[3]))
        e, g = epilogues(CASES[0]), gradient_epilogues(CASES[0])
        given = {**e["everything"], **e["prologue"], "residual_stride": 1}
        if name == "halo_data_gradient":
            given = {**g["mask-scale-residual"], **g["residual-first-mask-sums"], "residual_stride": 1}
        given |= {"x": x, "d": x, "weight": weight, "weight_flipped": weight, "weight_index": slots, "tile": tile}
        values = tuple(given[key] for key in names)
    return dict(zip(names, values, strict=True))


def wgmma_arguments(name: str) -> tuple[Any, ...]:
    """Of a wide convolution of everything, every tensor given."""
    case = wgmma_convs.Case(2, 1, 6, 8, 64, 64, 3, 1)
    names = ("bias", "relu", "residual", "next", "sums", "mask", "prologue", "second")
    if name == "wgmma_conv":
        return (*wgmma_convs.conv(case, *names), *case.window, 3, False)
    o, e = wgmma_convs.gradient(case, "second", "norm", "mask", "scale", "residual", "mask-of-z")
    return (*o, *e, *case.window, 3, False)


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def tensors(name: str) -> list[str]:
    return [key for key, value in arguments(name).items() if isinstance(value, torch.Tensor)]


def refuses(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"fastensdistill::{name}: {message}"):
        call(name, *given.values())


@pytest.mark.parametrize(("name", "operand"), [(name, operand) for name in FIRST for operand in tensors(name)])
def test_an_operand_of_another_dtype_rank_or_device(name, operand):
    good = arguments(name)
    tensor = good[operand]
    first = operand == FIRST[name]
    refuses(name, good | {operand: tensor.to(torch.int16)}, rf"{operand} is Short \[.*; expected ")
    # one more dimension of the first operand can be the others' mistake
    refuses(name, good | {operand: tensor[None]}, r"\w+ is " if first else f"{operand} is ")
    if not first:
        on = " on another kind of device; expected .* on the CPU"
        refuses(name, good | {operand: tensor.to("meta")}, f"{operand} is .*{on}")
    if operand in DENSE.get(name, ()):
        on = ", strided, on the CPU; expected .*, contiguous, on"
        refuses(name, good | {operand: strided(tensor)}, f"{operand} is .*{on}")


@pytest.mark.parametrize("name", FIRST)
def test_all_operands_on_a_device_that_is_not_the_kernels(name):
    good = arguments(name)
    away = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in good.items()}
    refuses(name, away, rf"{FIRST[name]} is .* on another .*; expected a CUDA device")
    if not extension.serves(name, "cuda"):
        pytest.skip("the extension is not built")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=rf"{name}: {FIRST[name]} is .* on the CPU; expected a CUDA device"):
        getattr(torch.ops.fastensdistill, name).default.redispatch(keys, *good.values())


def cut(name: str, **dims: tuple[int, ...]) -> dict[str, object]:
    """The arguments with these dimensions of these operands empty."""
    given = arguments(name)
    for operand, empty in dims.items():
        for dim in empty:
            given[operand] = given[operand].narrow(dim, 0, 0)
    return given


LOGITS = {"no images": 1, "no classes": 2}
EMPTY = {
    **{f"distillation_loss of {what}": ("distillation_loss", {"teacher_logits": (dim,), "branch_logits": (dim,)}
                                        | ({"labels": (0,)} if dim == 1 else {}))
       for what, dim in LOGITS.items()},
    **{f"distillation_loss of no {who}s": ("distillation_loss", {f"{who}_logits": (0,)})
       for who in ("teacher", "branch")},
    **{f"teacher_diversity_seed of {what}": ("teacher_diversity_seed", {"teacher_pair": (dim,)})
       for what, dim in LOGITS.items()},
    **{f"diversity_seed of {what}": ("diversity_seed", {"teacher_pair": (dim,), "branch_pair": (dim,)})
       for what, dim in LOGITS.items()},
    **{f"ods_seed of {what}": ("ods_seed", {"logits": (dim - 1,), "weights": (dim - 1,)})
       for what, dim in LOGITS.items()},
    "perturb_step of no images": ("perturb_step", {"images": (0,), "input_gradients": (1,), "confidence": (0,)}),
    "perturb_step of no values": ("perturb_step", {"images": (2,), "input_gradients": (3,)}),
    "perturb_step of no gradients": ("perturb_step", {"input_gradients": (0,)}),
    "pack_rank_one of no branches": ("pack_rank_one", {"deviations": (0,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_what_is_empty(case):
    name, dims = EMPTY[case]
    refuses(name, cut(name, **dims), r"\w+ is .*\b0\b.*; expected .*, not empty")


def test_gradients_in_float64_of_images_that_are_not():
    """What is dispatched over two dtypes has combinations without a kernel."""
    good = arguments("perturb_step")
    wide = good | {"input_gradients": good["input_gradients"].double()}
    refuses("perturb_step", wide, "input_gradients is float64 .*; expected float32")
    wide = good | {"images": good["images"].double(), "confidence": good["confidence"].double()}
    refuses("perturb_step", wide, "input_gradients is float32 .*; expected float64")


def test_a_mean_of_too_many_teachers():
    """A block keeps the softmax of each."""
    good = arguments("distillation_loss") | {"mean_target": True}
    many = good["teacher_logits"][:1].expand(257, -1, -1)
    refuses(
        "distillation_loss", good | {"teacher_logits": many}, "teacher_logits is .*; expected a mean of at most 256"
    )


def test_labels_and_weights_of_other_numbers():
    good = arguments("distillation_loss")
    _, B, C = good["branch_logits"].shape
    for labels in (torch.rand(B, C, dtype=torch.float64), torch.rand(B, C + 1), torch.rand(B)):
        refuses("distillation_loss", good | {"labels": labels}, "labels is float.*; expected ")
    for mean, whose in ((False, "branch"), (True, "teacher")):
        wrong = good | {"mean_target": mean, "weights": [1.0] * 3}
        refuses("distillation_loss", wrong, f"weights is 3 numbers; expected one for each {whose}, at most 256")
    many = good["branch_logits"][:1].expand(257, -1, -1)
    refuses("distillation_loss", good | {"branch_logits": many, "weights": [1.0] * 257}, "weights is 257 numbers; ")


# number in a layer's nine → a value that leaves the buffers, or divides by zero
WRONG = {
    0: (-1, 10**6, 2**62), 2: (-1, 10**6), 3: (-1, 10**6), 4: (-1, 10**6), 5: (0, 10**6, 2**40), 6: (0, 10**6, 2**40),
    7: (0, 10**6, 2**40), 8: (0, 3),
}  # fmt: skip


def test_layers_outside_the_buffers():
    good = arguments("pack_rank_one")
    fields = good["fields"]
    for number, values in WRONG.items():
        for value in values:
            wrong = fields[:9] + [value if i == number else field for i, field in enumerate(fields[9:])]
            told = rf"layer 1 of fields is \[.*(?<![-\d]){value}\b.*; expected offsets"
            refuses("pack_rank_one", good | {"fields": wrong}, told)
    for wrong in ([], fields[:-1]):
        told = f"fields is {len(wrong)} integers; expected 9 for each layer"
        refuses("pack_rank_one", good | {"fields": wrong}, told)


def test_slots_outside_the_packings():
    good = arguments("pack_rank_one")
    for slot in (-1, 3, 2**62):
        refuses("pack_rank_one", good | {"first_slot": slot}, rf"layer \d of fields is .* from slot {slot}")


def halo_cases():
    f, g = arguments("halo_conv"), arguments("halo_data_gradient")
    x, weight = f["x"], f["weight"]
    odd = x[..., :8].contiguous()
    return {
        "channels of the input": ("halo_conv", {"x": odd, "weight": weight[:, :, :8].contiguous()}, "x"),
        "channels of the result": ("halo_conv", {"weight": weight[..., :8].contiguous()}, "weight"),
        "taps": ("halo_conv", {"weight": weight[:, :4].contiguous()}, "weight"),
        "groups": ("halo_conv", {"x": torch.cat([x, x])}, "x"),
        "groups of a gradient": ("halo_data_gradient", {"d": x[:1]}, "d"),
        "rows of other slots": ("halo_conv", {"bias": f["bias"][:2]}, "bias"),
        "rows of other channels": ("halo_conv", {"center": f["center"][:, :8].contiguous()}, "center"),
        "a scale alone": ("halo_conv", {"in_shift": None}, "in_scale"),
        "a shift alone": ("halo_conv", {"next_scale": None}, "next_scale"),
        "sums without a mean": ("halo_data_gradient", {"mean": None}, "mean"),
        "sums without z": ("halo_data_gradient", {"z": None}, "mean"),
        "a residual of other size": ("halo_conv", {"residual": f["residual"][:, :, 1:].contiguous()}, "residual"),
        "a residual's channels": ("halo_conv", {"residual": f["residual"][..., :4].contiguous()}, "residual"),
        "a residual's stride": ("halo_conv", {"residual_stride": 2}, "residual"),
        "no stride": ("halo_data_gradient", {"residual_stride": 0}, "residual_stride"),
        "a mask of other size": ("halo_data_gradient", {"mask": g["mask"][..., :1].contiguous()}, "mask"),
        "three numbers of a tile": ("halo_conv", {"tile": [1, 6, 8]}, "tile"),
        "no rows in a tile": ("halo_conv", {"tile": [1, 0, 8, 16]}, "tile"),
        "positions of a tile": ("halo_data_gradient", {"tile": [6, 6, 8, 16]}, "tile"),
        "a tile past 32 bits": ("halo_conv", {"tile": [2**31, 2**31, 2**31, 16]}, "tile"),
        "border of a tile": ("halo_conv", {"tile": [1, 1, 200, 16]}, "tile"),
        "channels of a tile": ("halo_conv", {"tile": [1, 6, 8, 48]}, "tile"),
    }  # fmt: skip


HALO = halo_cases()


def test_every_op_is_here():
    assert set(OPS) - {"wgmma_joint_conv"} == set(FIRST)


@pytest.mark.parametrize("case", HALO)
def test_halo_refusals(case):
    name, changed, operand = HALO[case]
    refuses(name, arguments(name) | changed, f"{operand} is .*; expected ")


def weight_gradient_cases():
    g = arguments("wgmma_weight_gradient")
    return {
        "channels of the input": ({"x": g["x"][..., :8].contiguous()}, "x"),
        "channels of the result": ({"d": g["d"][..., :8].contiguous(), "norm_z": None}, "d"),
        "groups": ({"x": torch.cat([g["x"], g["x"]])}, "x"),
        "images": ({"d": g["d"][:, 1:].contiguous()}, "d"),
        "positions": ({"d": g["d"][:, :, 1:].contiguous()}, "d"),
        "a window of other size": ({"kernel": 5, "padding": 2}, "the window"),
        "padding": ({"padding": 0}, "the window"),
        "stride": ({"stride": 3}, "the window"),
        "a scale alone": ({"in_shift": None}, "in_shift"),
        "a shift alone": ({"in_scale": None}, "in_shift"),
        "z without a coefficient": ({"norm_b": None}, "norm_b"),
        "coefficients without z": ({"norm_z": None}, "norm_a"),
        "rows of other groups": ({"norm_c": torch.cat([g["norm_c"]] * 2)}, "norm_c"),
        "no multiprocessors": ({"multiprocessors": 0}, "multiprocessors"),
        "partial results": ({"partial": g["partial"][1:].contiguous()}, "partial"),
    }  # fmt: skip


WEIGHT_GRADIENT = weight_gradient_cases()


@pytest.mark.parametrize("case", WEIGHT_GRADIENT)
def test_weight_gradient_refusals(case):
    changed, operand = WEIGHT_GRADIENT[case]
    refuses(
        "wgmma_weight_gradient",
        arguments("wgmma_weight_gradient") | changed,
        f"{operand} is .*; expected ",
    )


@pytest.mark.parametrize(("name", "operand"), [("wgmma_conv", "x"), ("wgmma_data_gradient", "d")])
@pytest.mark.parametrize("dim", [2, 3])
def test_images_without_positions(name, operand, dim):
    """Tiles are counted by dividing by them."""
    good = arguments(name)
    empty = good[operand].narrow(dim, 0, 0).contiguous()
    refuses(name, good | {operand: empty}, f"{operand} is .*; expected positions")


def test_offsets_of_32_bits():
    """One group of more values than its kernels can count; nothing is read before that."""
    good = arguments("halo_conv")
    x = torch.empty(1, 1, 1, 1, 16, dtype=torch.bfloat16).expand(1, 2**15, 2**6, 2**6, 16)
    refuses("halo_conv", good | {"x": x}, "x is .*, strided")
    meta = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in good.items()}
    x = torch.empty(1, 2**15, 2**6, 2**6, 16, dtype=torch.bfloat16, device="meta")
    refuses("halo_conv", meta | {"x": x}, r"x is .*; expected fewer than 2\^31 values in a group")


def test_a_library_that_comes_later_is_found(tmp_path):
    """A failed look-up of PyTorch's stream is made again, and a successful one is kept."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "needs a C++ compiler"
    (tmp_path / "late.cpp").write_text('extern "C" int late() { return 7; }\n')
    (tmp_path / "look.cpp").write_text(
        '#include "loaded_symbol.h"\n'
        'static fed::LoadedSymbol symbol{"liblate_of_the_test.so", "late"};\n'
        'extern "C" void* look() { return symbol.get(); }\n'
    )
    for source, library in (("late", "liblate_of_the_test.so"), ("look", "look.so")):
        command = [compiler, "-std=c++17", "-fPIC", "-shared", f"-Wl,-soname,{library}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(tmp_path / f"{source}.cpp"), "-o", str(tmp_path / library)], check=True)
    look = ctypes.CDLL(str(tmp_path / "look.so")).look
    look.restype = ctypes.c_void_p
    assert look() is None
    late = ctypes.CDLL(str(tmp_path / "liblate_of_the_test.so"))
    assert look() == look() == ctypes.cast(late.late, ctypes.c_void_p).value
