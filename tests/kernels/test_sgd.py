"""The optimiser step over a flat buffer against torch.optim.SGD, and its kernel against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.sgd import sgd, sgd_kernel
from tests.compare import check_close
from tests.kernels.both import check_op, values

SHAPES = {"one": (1,), "few": (5,), "one-block": (1024,), "past-a-block": (2051,), "branches": (3, 701)}
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {"momentum": 0.9, "weight_decay": 5e-4},
    "factors": {"momentum": 0.9, "weight_decay": 1.25e-4, "scale": 4.0},
    "plain": {"momentum": 0.0, "weight_decay": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_steps_are_torch_sgd(shape, options):
    given = OPTIONS[options]
    p, v = values(*SHAPES[shape]).double(), torch.zeros(SHAPES[shape], dtype=torch.float64)
    q = p.clone().requires_grad_()
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimiser = torch.optim.SGD(
        [q], lr=0.1, momentum=given["momentum"], weight_decay=given["weight_decay"], nesterov=given["momentum"] > 0
    )
    for i in range(3):
        rate.fill_(0.1 / (1 + i))
        optimiser.param_groups[0]["lr"] = given.get("scale", 1.0) * 0.1 / (1 + i)
        g = values(*SHAPES[shape], seed=i + 1).double()
        q.grad = g.clone()
        optimiser.step()
        sgd(p, v, g, rate, **given)
        check_close("gradient", g, q.grad, 0.0)
    check_close("parameters", p, q, 1e-14)
    if given["momentum"]:
        check_close("momentum", v, optimiser.state[q]["momentum_buffer"], 1e-14)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_reference(shape, options):
    def step(p, v, g, rate):
        sgd(p, v, g, rate, **OPTIONS[options])
        return torch.cat([p.flatten(), v.flatten()])

    tensors = (values(*SHAPES[shape], seed=i) for i in range(3))
    check_op(step, *tensors, torch.tensor(0.1), tolerance=1e-6)


def test_one_launch_and_the_arithmetic_of_five():
    """On the CPU bit by bit what five operations in place give."""
    p, v, g, rate = values(77), values(77, seed=1), values(77, seed=2), torch.tensor(0.05)
    q, w, h = p.clone(), v.clone(), g.clone()
    h.add_(q, alpha=5e-4)
    w.mul_(0.9).add_(h)
    q.sub_(h.add_(w, alpha=0.9).mul_(4 * rate))
    with record_launches() as launches:
        sgd(p, v, g, rate, momentum=0.9, weight_decay=5e-4, scale=4.0)
    assert [launch.kernel for launch in launches] == [sgd_kernel]
    sgd(p, v, g, rate, momentum=0.9, weight_decay=5e-4, scale=4.0)
    assert torch.equal(p, q)
    assert torch.equal(v, w)


def test_nothing_to_move():
    empty = torch.zeros(0)
    with record_launches() as launches:
        sgd(empty, empty.clone(), empty.clone(), torch.tensor(0.1), momentum=0.9, weight_decay=0.0)
    assert launches == []


P, R = torch.zeros(4), torch.tensor(0.1)
REFUSED = {
    "half": (lambda: sgd(P.half(), P, P, R, momentum=0.9, weight_decay=0), "p has dtype torch.float16"),
    "momentum-shape": (lambda: sgd(P, P[1:], P, R, momentum=0.9, weight_decay=0), r"v has shape \(3,\)"),
    "gradient-dtype": (lambda: sgd(P, P, P.double(), R, momentum=0.9, weight_decay=0), "g has dtype torch.float64"),
    "rate-shape": (lambda: sgd(P, P, P, R[None], momentum=0.9, weight_decay=0), r"rate has shape \(1,\)"),
    "device": (lambda: sgd(P, P, P.to("meta"), R, momentum=0.9, weight_decay=0), "g is on meta"),
    "strided": (
        lambda: sgd(torch.zeros(4, 2)[:, 0], P, P, R, momentum=0.9, weight_decay=0), "p is not contiguous"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()
