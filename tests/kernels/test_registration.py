"""Every op is well registered: schema, fake, mutation; on meta tensors; traceable as one graph."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastensdistill.errors import InputError
from fastensdistill.kernels import (  # noqa: F401  (importing registers the ops)
    activation,
    activation_gradient,
    adamw,
    augment,
    batch_norm,
    batch_norm_backward,
    batch_norm_sums,
    branch_rows,
    clip_factors,
    conv_data_gradient,
    conv_weight_gradient,
    depthwise_conv,
    depthwise_data_gradient,
    depthwise_weight_gradient,
    elementwise_gradient,
    gate,
    grouped_conv,
    head,
    head_backward,
    joint_conv,
    joint_head,
    launch,
    layer_norm,
    lookup_tables,
    mix,
    move_average,
    ops,
    pack,
    perturb_step,
    pool,
    sgd,
    unfold,
)
from fastensdistill.kernels.layout import Layout
from fastensdistill.kernels.trivial_augment import trivial_rows
from tests.kernels.both import values

OPS = torch.ops.fastensdistill
SLOTS = torch.tensor([1, 0], dtype=torch.int32)
X, Z, ROW = values(2, 3, 5, 4, 6), values(2, 3, 5, 4, 10), torch.ones(1, 10)
W, BITS = values(2, 9, 6, 10), torch.zeros(2, 3, 5, 4, 2, dtype=torch.uint8)
PARTIALS, LOGITS = values(2, 4, 2, 10).abs(), values(2, 3, 7)
CLASSIFIER = values(2, 10, 7)
NONE3 = (None, None, None)
LAYOUT = Layout.build([("a", (4, 3, 3, 3), False), ("fc", (5, 36), True)], 2, 3, {"fc": 9})
MEMORY = LAYOUT.gradients(2)
DEVIATIONS = 0.3 * values(2, LAYOUT.factors)


def _packed(dtype):
    return torch.zeros(LAYOUT.packed_size, dtype=dtype), torch.zeros(LAYOUT.packed_size, dtype=dtype)


def _conv(**options):
    return (*grouped_conv.ConvOperands(X, W, SLOTS, **options), 3, 1, 1, "ieee")


EVERYTHING = {"bias": ROW, "residual": Z, "relu": True, "next_scale": ROW, "next_shift": ROW, "center": ROW,
              "mask": True, "second": X, "second_weight": values(2, 1, 6, 10), "second_bias": ROW}  # fmt: skip


def _joint():
    sides = (grouped_conv.ConvOperands(X, W, SLOTS, bias=ROW), grouped_conv.ConvOperands(X, W, SLOTS, center=ROW))
    return (*sides[0], *sides[1], 3, 1, 1, "ieee")


SQUARE, X6 = (3, 3, 1, 1, 1, 1, 1, 1), torch.ones(1, 6)
NO_EPILOGUE = elementwise_gradient.GradientEpilogue()
CROP = (torch.zeros(4, 5, 5, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8))  # fmt: skip
NUMBERS, SIZES = torch.arange(20, dtype=torch.int32).view(2, 10) << 26, torch.tensor([[3, 2]], dtype=torch.int32)
NO_CHANGE, TRIVIAL = augment.ChangeOperands(), trivial_rows(5, 5)
ZERO = torch.zeros(())
RUNS = [0, 4, 0, 0, 1, 1, 5, 3, 1, 0, 0, 1]  # of values: 0 .. 4 of network 0, 5 .. 8 of network 1, which do not decay
CALLS = {
    "grouped_conv": _conv(),
    "grouped_conv, everything": _conv(**EVERYTHING),
    "conv_data_gradient": (*conv_data_gradient.DataGradientOperands(Z, W.transpose(2, 3).contiguous(), SLOTS, 5, 4,
                           "float32"), *NO_EPILOGUE, 3, 1, 1, "ieee"),
    "conv_data_gradient, everything": (X, values(2, 9, 6, 10), SLOTS, 9, 8, "float32", X, values(2, 1, 6, 10), 2, X,
                                       *3 * (torch.ones(1, 6),), Z[:, :, :5], 2, True,
                                       torch.zeros(2, 3, 9, 8, 2, dtype=torch.uint8), ROW, values(2, 3, 9, 8, 10), ROW,
                                       ROW, None, None, 3, 2, 1, "tf32"),
    "conv_weight_gradient": (*conv_weight_gradient.WeightGradientOperands(X, Z, None, None), 3, 1, 1, "ieee",
                             values(2, 9, 6, 10), False),
    "conv_weight_gradient, on top": (X, Z, None, None, False, Z, ROW, ROW, ROW, 3, 1, 1, "ieee", values(2, 9, 6, 10),
                                     True),
    "activation": (Z, "silu", None, None, None),
    "activation, everything": (Z, "leaky_relu(0.2)", ROW, ROW, Z),
    "activation_gradient": (Z, Z, "relu6", *NONE3, None, None),
    "activation_gradient, everything": (Z, Z, "gelu_tanh", ROW, ROW, Z, ROW, ROW),
    "depthwise_conv": (*depthwise_conv.DepthwiseOperands(X, W[..., :1, :6].contiguous(), SLOTS), *SQUARE),
    "depthwise_conv, everything": (X[:1], W[..., :1, :6].contiguous(), SLOTS, X6, X6, "silu", 3, 3, 2, 1, 1, 2, 1, 2),
    "depthwise_data_gradient": (*depthwise_data_gradient.DepthwiseGradientOperands(X, values(2, 9, 6, 1), SLOTS, 5, 4,
                                "float32"), *NO_EPILOGUE, *SQUARE),
    "depthwise_data_gradient, everything": (X, values(2, 9, 6, 1), SLOTS, 9, 8, "float16", Z[:, :, :5], 2, True,
                                            torch.zeros(2, 3, 9, 8, 1, dtype=torch.uint8), X6, values(2, 3, 9, 8, 6),
                                            X6, X6, None, None, 3, 3, 2, 2, 1, 1, 1, 1),
    "depthwise_weight_gradient": (X, X, *SQUARE, values(2, 9, 1, 6), False),
    "depthwise_weight_gradient, on top": (X[:1], X, *SQUARE, values(3, 2, 9, 1, 6), True),
    "batch_norm_sums": (Z, ROW),
    "batch_norm_statistics": (PARTIALS, 60, ROW, ROW.clone(), ROW.clone(), ROW.clone(), 0.1, 1e-5, 1.5),
    "batch_norm_apply": (Z, ROW, ROW, None, 1, True, False),
    "batch_norm_apply, everything": (Z, ROW, ROW, X, 1, True, True),
    "elementwise_gradient": (Z, *NO_EPILOGUE._replace(mask=BITS)),
    "elementwise_gradient, everything": (Z, Z, 1, False, BITS, ROW, Z, ROW, ROW, None, None),
    "elementwise_gradient, mask from z": (Z, Z, 1, True, None, None, Z, ROW, ROW, ROW, ROW),
    "batch_norm_backward": (Z, Z, PARTIALS, 60, ROW, ROW, ROW, None, ROW.clone(), ROW.clone(), False),
    "batch_norm_backward, on top": (Z, Z, PARTIALS, 60, ROW, ROW, ROW, Z, ROW.clone(), ROW.clone(), True),
    "batch_norm_coefficients": (PARTIALS, 60, ROW, ROW, ROW, ROW.clone(), ROW.clone(), True),
    "gate": (Z, Z[:, :, :1, :1].contiguous()),
    "gate_gradient": (Z, Z, Z[:, :, :1, :1].contiguous()),
    "layer_norm": (Z, None, None, None, 1e-5),
    "layer_norm, everything": (Z, values(2, 10), values(2, 10), SLOTS, 1e-5),
    "layer_norm_gradient": (Z, Z, None, None, 1e-5, 0),
    "layer_norm_gradient, everything": (Z, Z, values(2, 10), SLOTS, 1e-5, 1),
    "head": (Z, CLASSIFIER, None, SLOTS, ROW, ROW, True, "ieee"),
    "joint_conv": _joint(),
    "joint_head": 2 * (Z, CLASSIFIER, None, SLOTS, ROW, ROW, True, "ieee"),
    "head_backward": (LOGITS, Z, CLASSIFIER, SLOTS, None, None, True, *NONE3, "ieee", None, None, False),
    "head_backward, everything": (LOGITS, Z, CLASSIFIER, SLOTS, ROW, ROW, True, ROW, ROW, values(2, 3, 10), "ieee",
                                  values(2, 10, 7), values(2, 7), True),
    "max_pool": (X, 3, 2, 1),
    "max_pool_backward": (values(2, 3, 3, 2, 6), torch.ones(2, 3, 3, 2, 6, dtype=torch.uint8), 5, 4, 3, 2, 1),
    "pack_weights": (values(LAYOUT.size), DEVIATIONS, *_packed(torch.float16), LAYOUT.fields, 1, 2, 1),
    "pack_weights, copies": (values(3 * LAYOUT.size), None, *_packed(torch.float32), LAYOUT.fields, 0, 3, 3),
    "unfold_gradients": (values(MEMORY.size), values(LAYOUT.size), DEVIATIONS, values(LAYOUT.size),
                         LAYOUT.fields, MEMORY.fields, 2, 1),
    "unfold_gradients, copies": (values(MEMORY.size), values(2 * LAYOUT.size), None, values(2 * LAYOUT.size),
                                 LAYOUT.fields, MEMORY.fields, 2, 2),
    "sgd": (values(9), values(9, seed=1), values(9, seed=2), ZERO, None, None, None, [], 4.0, 0.9, 5e-4, 0.0),
    "sgd, everything": (*(values(9, seed=i) for i in range(3)), ZERO, values(9, seed=3), ZERO.clone(), torch.ones(2),
                        RUNS, 4.0, 0.9, 5e-4, 0.9),
    "adamw": (*(values(9, seed=i).abs() for i in range(4)), ZERO, torch.ones(1), None, None, None, [], 1.0, 0.9, 0.99,
              0.1, 0.0),
    "adamw, everything": (*(values(9, seed=i).abs() for i in range(4)), ZERO, torch.ones(1), values(9, seed=4),
                          ZERO.clone(), torch.ones(2), RUNS, 1.0, 0.9, 0.99, 0.1, 0.9),
    "clip_factors": (values(9), None, [], [], 1, 2.0),
    "clip_factors, two": (values(9), values(2, 3), RUNS, [0, 6, 1, 0, 1, 1], 2, 2.0),
    "move_average": (values(9), values(9, seed=1), ZERO, 0.9),
    "branch_rows": (torch.zeros(4), torch.tensor([[2, 0], [1, -1], [0, -1], [-2, 3], [-1, 0]]), values(9),
                    DEVIATIONS, values(2), values(2, seed=1).abs(), torch.full((2,), 1e-5), 5),
    "augment": (*CROP, None, None, *NO_CHANGE, "float16"),
    "augment, everything": (*CROP, NUMBERS, SIZES, TRIVIAL, torch.zeros(2, 3, 256, dtype=torch.uint8), 3, SIZES,
                            1 << 30, "float32"),
    "lookup_tables": (*CROP, NUMBERS, None, TRIVIAL),
    "lookup_tables, resized": (*CROP, NUMBERS, SIZES, TRIVIAL),
    "mix": (values(2, 5, 5, 3), torch.tensor([3, 0]), values(2, 4).abs(), torch.full((2, 5), 0.3), 6, 0.2, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_opcheck(name):
    opcheck(getattr(OPS, name.split(",")[0]).default, CALLS[name])


def test_one_graph_under_torch_compile():
    def block(x, weight, weight_index, scale, shift):
        z = grouped_conv.grouped_conv(x, weight, weight_index, kernel=3, padding=1).z
        return batch_norm.batch_norm_apply(z, scale, shift, mask=True)

    arguments = (X, W, SLOTS, ROW, values(1, 10))
    compiled = torch.compile(block, fullgraph=True, backend="eager")(*arguments)
    for a, e in zip(compiled, block(*arguments), strict=True):
        assert torch.equal(a, e)


def test_import_leaves_cuda_alone_and_kernels_on_the_cpu_need_the_interpreter():
    code = (
        "import torch\n"
        "from fastensdistill.kernels import grouped_conv, head_backward, pool, augment, launch\n"
        "assert not torch.cuda.is_initialized()\n"
        "with launch.use_kernels():\n"
        "    pool.max_pool(torch.ones(1, 1, 2, 2, 4), kernel=2, stride=2)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith(f"{InputError.__module__}.InputError: kernels on CPU tensors")
    )


def test_without_triton_every_op_runs_its_reference():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from fastensdistill.kernels import augment, conv_data_gradient, conv_weight_gradient, batch_norm_backward\n"
        "from fastensdistill.kernels import grouped_conv, head_backward, pool\n"
        "x, w = torch.ones(1, 1, 2, 2, 4), torch.ones(1, 1, 4, 4)\n"
        "slots = torch.zeros(1, dtype=torch.int32)\n"
        "assert grouped_conv.grouped_conv(x, w, slots, kernel=1).z.sum() == 64\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_kernels_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not launch.runs_kernel("cpu", torch.float32)
    with launch.use_kernels():
        assert launch.runs_kernel("cpu", torch.float32)
        assert not launch.runs_kernel("cpu", torch.float32, torch.float64), "float64 is the references' alone"
    monkeypatch.setenv("FASTENSDISTILL_KERNELS", "interpret")
    assert launch.runs_kernel("cpu", torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="set TRITON_INTERPRET=1"):
        launch.runs_kernel("cpu", torch.float32)


@pytest.mark.parametrize("built", [True, False], ids=["extension", "no-extension"])
def test_what_computes_an_op_is_the_extension_then_the_kernel_then_the_reference(monkeypatch, built):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops.extension, "serves", lambda name, device: built and name == "pack_weights")
    for device, dtype, kernel in (
        ("cpu", torch.float32, "reference"),
        ("cuda", torch.float32, "triton" if launch.HAS_TRITON else "reference"),
        ("cuda", torch.float64, "reference"),
    ):
        assert ops.implementation("pack_weights", device, dtype) == ("extension" if built else kernel)
        assert ops.implementation("grouped_conv", device, dtype) == kernel
        assert ops.implementation("perturb_step", device, dtype) == "reference", "it has no Triton kernel"
    with launch.use_kernels():
        assert ops.implementation("grouped_conv", "cpu", torch.float32) == "triton"
        assert ops.implementation("grouped_conv", "cpu", torch.float32, torch.float64) == "reference"
    with launch.references_only("grouped_conv"):
        assert ops.implementation("grouped_conv", "cuda", torch.float32) == "reference"
        assert ops.implementation("head", "cuda", torch.float32) == "triton"


class Sides(NamedTuple):
    x: Tensor
    out: Tensor
    factor: float = 1.0


def test_operands_that_travel_together_are_one_parameter():
    def reference(o: Sides, counts: list[int]) -> tuple[Tensor, Tensor]:
        o.out.copy_(o.factor * o.x)
        return o.x + 1, o.x.new_full((), sum(counts))

    def empty(o: Sides, counts: list[int]) -> tuple[Tensor, Tensor]:
        return torch.empty_like(o.x), o.x.new_empty(())

    op = ops.define("together_for_a_test", reference, empty, mutates=("out",))
    assert str(op._schema).endswith("(Tensor x, Tensor(a1!) out, float factor, SymInt[] counts) -> (Tensor, Tensor)")
    x, out = values(3), torch.zeros(3)
    opcheck(op, (x, out, 2.0, [3, 4]))
    one, total = op(x, out, 2.0, [3, 4])
    assert torch.equal(one, x + 1)
    assert torch.equal(out, 2 * x)
    assert total == 7


def test_a_gradient_that_an_op_lacks_is_refused_before_it_is_wrong():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="grouped_conv has no gradient; give it detached tensors"):
        grouped_conv.grouped_conv(x, W, SLOTS, kernel=3, padding=1)
    with torch.no_grad():
        assert not grouped_conv.grouped_conv(x, W, SLOTS, kernel=3, padding=1).z.requires_grad
