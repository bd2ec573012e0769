import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.head import head
from fastensdistill.kernels.head_backward import head_backward
from tests.compare import check_close
from tests.kernels.both import TOLERANCE, check_op, each_dtype, values
from tests.untyped import present

SLOTS = 3
# groups, images, height, width, channels, classes; 19 images are two blocks, 130 classes two, 40 channels two
SHAPES = {"odd": (2, 19, 3, 7, 20, 11), "many-classes": (1, 2, 2, 2, 16, 130), "one-image": (3, 1, 5, 4, 40, 2)}
each_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


def _operands(shape, dtype):
    groups, *_, channels, classes = shape
    z = values(*shape[:5], dtype=dtype)
    weight = values(SLOTS, channels, classes, dtype=dtype, scale=channels**-0.5)
    weight_index = torch.tensor([(2 * g + 2) % SLOTS for g in range(groups)], dtype=torch.int32)
    return z, weight, values(SLOTS, classes), weight_index


def _scaling(channels):
    return {"scale": values(SLOTS, channels, seed=1), "shift": values(SLOTS, channels, seed=2)}


@each_dtype
@each_shape
def test_forward(shape, dtype):
    z, weight, bias, weight_index = _operands(shape, dtype)
    tolerance = TOLERANCE[dtype]
    check_op(head, z, weight, bias, weight_index, **_scaling(shape[4]), tolerance=tolerance)
    check_op(head, z, weight, None, weight_index, relu=False, tolerance=tolerance)


@each_dtype
@each_shape
def test_backward(shape, dtype):
    z, weight, _, weight_index = _operands(shape, dtype)
    groups, images, *_, channels, classes = shape
    d_logits, scaling, tolerance = values(groups, images, classes), _scaling(channels), TOLERANCE[dtype]
    check_op(head_backward, d_logits, z, weight, weight_index, **scaling, tolerance=tolerance)
    check_op(head_backward, d_logits, z, weight, weight_index, relu=False, tolerance=tolerance)
    training = {
        "mean": values(1, channels, seed=3),
        "inv_std": values(1, channels, seed=4).abs(),
        "pooled": values(groups, images, channels),
    }
    check_op(head_backward, d_logits, z, weight, weight_index, **scaling, **training, tolerance=tolerance)


@pytest.mark.parametrize("relu", [True, False])
def test_reference_is_autograds(relu):
    shape = SHAPES["odd"]
    z, weight, bias, weight_index = (
        t.double() if t.is_floating_point() else t for t in _operands(shape, torch.float32)
    )
    scale, shift = (v.double() for v in _scaling(shape[4]).values())
    leaves = [z.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    index = weight_index.long()
    y = scale[index][:, None, None, None] * leaves[0] + shift[index][:, None, None, None]
    logits = (y.relu() if relu else y).mean((2, 3)) @ leaves[1][index] + leaves[2][index][:, None]
    out = head(z, weight, bias, weight_index, scale=scale, shift=shift, relu=relu)
    check_close("logits", out.logits, logits, 1e-12)
    d_logits = values(*logits.shape, seed=5).double()
    dz, dw, db = torch.autograd.grad(logits, leaves, d_logits)
    back = head_backward(d_logits, z, weight, weight_index, scale=scale, shift=shift, relu=relu, pooled=out.pooled)
    check_close("dz", back.d, dz, 1e-12)
    check_close("dW", torch.zeros_like(dw).index_add(0, index, present(back.d_weight)), dw, 1e-12)
    check_close("db", torch.zeros_like(db).index_add(0, index, present(back.d_bias)), db, 1e-12)
    mean, inv_std = values(1, shape[4]).double(), values(1, shape[4], seed=1).double()
    training = head_backward(
        d_logits, z, weight, weight_index, scale=scale, shift=shift, relu=relu, mean=mean, inv_std=inv_std
    )
    check_close("d of the BatchNorm's output", training.d * scale[index][:, None, None, None], dz, 1e-12)
    product = training.d * (z - mean) * inv_std
    sums = torch.stack([training.d.sum((1, 2, 3)), product.sum((1, 2, 3))], 1)
    check_close("sums", present(training.statistics).sum(1), sums, 1e-12)


def test_refusals():
    z, weight, bias, weight_index = _operands(SHAPES["odd"], torch.float32)
    with pytest.raises(InputError, match="weight has shape"):
        head(z, weight[:, 1:].contiguous(), bias, weight_index)
    with pytest.raises(InputError, match="expected 1 as weight_index has"):
        head(z, weight, bias, weight_index[:1])
    with pytest.raises(InputError, match=r"bias has shape \(1, 11\), expected \(3, 11\)"):
        head(z, weight, bias[:1], weight_index)
    with pytest.raises(InputError, match=r"pooled has shape \(2, 19, 11\), expected \(2, 19, 20\)"):
        head_backward(values(2, 19, 11), z, weight, weight_index, pooled=values(2, 19, 11))
    with pytest.raises(InputError, match="d_logits has shape"):
        head_backward(values(2, 19, 3), z, weight, weight_index)
    with pytest.raises(InputError, match="given together"):
        head_backward(values(2, 19, 11), z, weight, weight_index, mean=torch.ones(1, 20))
