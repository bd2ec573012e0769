import pytest
import torch
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.pool import max_pool, max_pool_backward
from tests.compare import check_close
from tests.kernels.both import check_op, values

WINDOWS = {
    "resnet": {"kernel": 3, "stride": 2, "padding": 1},
    "vgg": {"kernel": 2, "stride": 2, "padding": 0},
    "overlapping": {"kernel": 3, "stride": 1, "padding": 1},
    "gaps": {"kernel": 2, "stride": 3, "padding": 0},
}
SHAPES = {"odd": (2, 3, 5, 7, 20), "even": (1, 2, 6, 8, 16)}
each_window = pytest.mark.parametrize("window", list(WINDOWS.values()), ids=list(WINDOWS))
each_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


@each_shape
@each_window
def test_max_pool(shape, window):
    x = values(*shape)
    x[0, 0, 0, :3] = 2.0  # a tie: the first of the equal values gets the gradient
    out = check_op(max_pool, x, **window)
    d = values(*out.y.shape, seed=1)
    dx = check_op(max_pool_backward, d, out.taps, in_size=shape[2:4], **window)

    leaf = x.clone().requires_grad_()
    images = leaf.flatten(0, 1).permute(0, 3, 1, 2)
    y = F.max_pool2d(images, window["kernel"], window["stride"], window["padding"]).permute(0, 2, 3, 1)
    check_close("y", out.y, y.unflatten(0, shape[:2]), 0)
    check_close("dx", dx, torch.autograd.grad(y, leaf, d.flatten(0, 1))[0], 1e-5)


def test_max_pool_passes_nan_on():
    x = values(1, 1, 4, 4, 8)
    x[0, 0, 1, 1, 3] = float("nan")
    y = max_pool(x, kernel=2, stride=2).y
    assert torch.isnan(y).sum() == 1
    assert torch.isnan(y[0, 0, 0, 0, 3])


def test_refusals():
    x = values(1, 1, 4, 4, 8)
    with pytest.raises(InputError, match="2·padding"):
        max_pool(x, kernel=2, stride=2, padding=2)
    out = max_pool(x, kernel=2, stride=2)
    with pytest.raises(InputError, match=r"expected \(3, 3\) for input"):
        max_pool_backward(out.y, out.taps, in_size=(6, 6), kernel=2, stride=2)
    with pytest.raises(InputError, match="expected uint8"):
        max_pool_backward(out.y, out.y, in_size=(4, 4), kernel=2, stride=2)
