"""The perturbation step against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.perturb_step import perturb_step
from tests.compare import check_close
from tests.kernels import rows
from tests.untyped import untyped

pytestmark = pytest.mark.usefixtures("each_implementation")
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LAST = torch.channels_last


def definition(images, gradients, step, low=0.0, high=1.0, confidence=None) -> Tensor:
    x, g = images.double(), gradients.double().sum(0)
    factor = torch.ones(len(x), dtype=torch.float64) if confidence is None else confidence.double()
    out = []
    for image, gradient, c in zip(x, g, factor, strict=True):
        norm = torch.linalg.vector_norm(gradient)
        out.append(image if norm == 0 else (image + step * c * gradient / norm).clamp(low, high))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", rows.IMAGES)
@pytest.mark.parametrize("confident", [False, True], ids=["", "confidence"])
def test_equals_the_definition(case, dtype, confident):
    images, gradients, confidence = untyped(rows.images)(case, dtype)
    step = math.sqrt(images[0].numel()) / 20  # large enough to clip
    confidence = confidence.to(torch.float64 if dtype == torch.float64 else torch.float32) if confident else None
    actual = perturb_step(images, gradients, step, confidence=confidence)
    assert actual.dtype == dtype
    check_close("images", actual, definition(images, gradients, step, confidence=confidence), DTYPES[dtype])
    assert actual.min() >= 0
    assert actual.max() <= 1


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(dtype, gradient_dtype):
    images, gradients, _ = rows.images("cifar", dtype, gradient_dtype)
    actual = perturb_step(images, gradients, 0.5, 0.1, 0.8)
    check_close("images", actual, definition(images, gradients, 0.5, 0.1, 0.8), DTYPES[dtype])


def test_step_has_its_length_where_nothing_clips():
    images, gradients, _ = rows.images("cifar", torch.float64)
    moved = perturb_step(images, gradients, 0.25, -10.0, 10.0)
    lengths = torch.linalg.vector_norm((moved - images).flatten(1), dim=1)
    check_close("lengths", lengths, torch.full((5,), 0.25, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize(
    "layout",
    {
        "channels-last": lambda x: x.to(memory_format=LAST),
        "gradients-channels-last": lambda x: x,
        "images-innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "every-other": lambda x: torch.stack([x, x], 1)[:, 0],
        "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
        "expanded": lambda x: x[:1].expand(x.shape),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_memory_formats(layout, dtype, uninitialised_is_nan):
    name, arrange = layout
    images, gradients, _ = rows.images("one-group", dtype)
    gradients = torch.cat([gradients, gradients.flip(1)])
    arranged = arrange(images)
    if name != "cropped":
        gradients = torch.stack([g.to(memory_format=LAST) for g in gradients])
    actual = perturb_step(arranged, gradients, 0.5)
    assert actual.stride() == torch.empty_like(arranged).stride()
    check_close("images", actual, definition(arranged, gradients, 0.5), DTYPES[dtype])


def test_zero_gradient_leaves_the_image():
    images, gradients, _ = rows.images("cifar", torch.float32)
    images[1, 0, 0, 0], images[3, 0, 0, 0] = 1.5, 1.5  # outside [0, 1]: an image that does not move is not clipped
    gradients[:, 1] = 0
    gradients[1, 2] = -gradients[0, 2]  # groups that cancel
    moved = perturb_step(images, gradients, 0.5)
    assert torch.equal(moved[1:3], images[1:3])
    assert moved[3].max() <= 1
    assert not torch.equal(moved[0], images[0])


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-42),
        (torch.float32, 1e-25),
        (torch.float32, 1e37),
        (torch.float64, 1e-310),
        (torch.float64, 1e300),
    ],
    ids=str,
)
def test_gradients_whose_squares_leave_the_range(dtype, size):
    images, gradients, _ = rows.images("flat", torch.float64)
    images, tiny = images.to(dtype), (gradients * 1e3 * size).to(dtype)
    actual = perturb_step(images, tiny, 0.3)
    expected = definition(images, tiny.double() / size, 0.3)
    check_close("images", actual, expected, 1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("others", [0.0, 1.0], ids=["among-zeros", "among-others"])
def test_gradient_that_is_not_finite_shows(value, others):
    images, gradients, _ = rows.images("flat", torch.float32)
    gradients[:, 2] *= others
    gradients[1, 2, 4] = value
    moved = perturb_step(images, gradients, 0.5)
    assert moved[2].isnan().all()
    assert moved[[0, 1, 3, 4, 5]].isfinite().all()


def test_no_gradient_flows():
    images, gradients, _ = rows.images("flat", torch.float32)
    assert not perturb_step(images.requires_grad_(), gradients.requires_grad_(), 0.5).requires_grad


def test_full_graph_compile():
    images, gradients, confidence = rows.images("one-group", torch.float32)
    images, confidence = images.to(memory_format=LAST), confidence.float()
    expected = perturb_step(images, gradients, 0.5, confidence=confidence)
    compiled = torch.compile(perturb_step, fullgraph=True, backend="aot_eager")
    actual = compiled(images, gradients, 0.5, confidence=confidence)
    assert actual.stride() == images.stride()
    check_close("images", actual, expected, 1e-7)


X, GX, CONF = torch.rand(2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4), torch.rand(2)
REFUSED = {
    "bytes": ((X.byte(), GX, 0.1), {}, "images has dtype torch.uint8"),
    "integer-gradients": ((X, GX.int(), 0.1), {}, "input_gradients has dtype torch.int32"),
    "no-groups": ((X, GX[:0], 0.1), {}, r"input_gradients \(0, 2, 3, 4, 4\)"),
    "group-missing": ((X, GX[0], 0.1), {}, r"expected \[B, …\] and \[G, B, …\]"),
    "shapes-differ": ((X[..., :3], GX, 0.1), {}, r"images has shape \(2, 3, 4, 3\)"),
    "double-and-single": ((X.double(), GX, 0.1), {}, "expected float64 for both or for neither"),
    "devices-differ": ((X, GX.to("meta"), 0.1), {}, "input_gradients is on meta"),
    "confidence-dtype": ((X, GX, 0.1), {"confidence": CONF.double()}, "confidence has dtype torch.float64"),
    "confidence-shape": ((X, GX, 0.1), {"confidence": CONF[:1]}, r"shape \(1,\); expected torch.float32 and \(2,\)"),
    "step": ((X, GX, math.inf), {}, "step is inf"),
    "range": ((X, GX, 0.1, 1.0, 0.0), {}, "low is 1.0 and high is 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    args, options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        untyped(perturb_step)(*args, **options)
