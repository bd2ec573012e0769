"""AdamW, clipping and averages over a flat tensor's runs, against PyTorch's own; kernels against their references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.kernels.adamw import adamw, adamw_kernel
from fastensdistill.kernels.clip_factors import clip_factors
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.move_average import move_average
from fastensdistill.kernels.sgd import sgd, sgd_kernel
from fastensdistill.kernels.update import Average, Blocks, Run, fields_of, unit
from tests.compare import check_close
from tests.kernels.both import check_op, run_kernel, values

SIZE = 2600
# Networks, counters, decays, moves; with values between that are of no run, and one run of three blocks
RUNS = [
    Run(0, 3), Run(3, 5, 1, 1, 0), Run(10, 2050, 1, 2), Run(2060, 1, 0, 0, 1, 0), Run(2061, 200, 0, 3, 0),
    Run(2300, 300, 1, 1, 1, 0),
]  # fmt: skip
EVEN = [Run(0, 1024), Run(1024, 8, 1, 1, 0), Run(1032, 1568, 0, 2, 1, 0)]
CASES: dict[str, tuple[Sequence[Run], bool, bool]] = {
    "one run": ((), False, False), "average": ((), True, False), "clipped": ((), False, True),
    "runs": (RUNS, False, False), "runs, all": (RUNS, True, True), "even runs, all": (EVEN, True, True),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def options(case: str, average: Tensor, clip: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    runs, averages, clips = CASES[case]
    return {
        "runs": fields_of(runs), "clip": clip if clips else None,
        "average": Average(average, torch.tensor(3.0, dtype=dtype), 0.9) if averages else None,
    }  # fmt: skip


@each_case
def test_sgd_by_its_kernel_is_the_reference(case):
    def step(p, v, g, rate, e, clip):
        sgd(p, v, g, rate, momentum=0.9, weight_decay=0.1, scale=2.0, **options(case, e, clip))
        return torch.stack([p, v, e])

    tensors = [values(SIZE, seed=i) for i in range(3)]
    check_op(step, *tensors, torch.tensor(0.1), values(SIZE, seed=4), torch.tensor([0.5, 2.0]), tolerance=1e-6)


@each_case
def test_adamw_by_its_kernel_is_the_reference(case):
    def step(p, m, s, g, rate, counts, e, clip):
        adamw(p, m, s, g, rate, counts, beta1=0.9, beta2=0.999, weight_decay=0.1, scale=2.0, **options(case, e, clip))
        return torch.stack([p, m, s, e])

    p, m, s, g = (values(SIZE, seed=i) for i in range(4))
    counts = torch.tensor([0.0, 1.0, 2.0, 1000.0])
    check_op(
        step, p, m, s.abs(), g, torch.tensor(0.01), counts, values(SIZE, seed=4), torch.tensor([0.5, 2.0]),
        tolerance=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("clip", [0.5, 1e6], ids=["clipped", "small enough"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_runs_take_the_steps_of_pytorchs_parameters(kind, clip):
    """Each run a parameter, of a network with a norm of its own, that decays or does not; one joins after a step."""
    runs = [run for run in RUNS if run.moves]
    p, e = values(SIZE).double(), values(SIZE, seed=9).double()
    expected, before = e.clone(), p.clone()
    moments = [torch.zeros_like(p) for _ in range(2)]
    own = [nn.Parameter(p[run.start : run.start + run.size].clone()) for run in runs]
    groups = [{"params": [q], "weight_decay": 0.1 * run.decays} for q, run in zip(own, runs, strict=True)]
    rule: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.04, momentum=0.9, nesterov=True)
    if kind == "adamw":
        rule = torch.optim.AdamW(groups, lr=0.04, betas=(0.8, 0.99))
    rate, counts, updates = (torch.zeros(n, dtype=p.dtype) for n in ((), (4,), ()))
    rate.fill_(0.02)
    late = len(runs) - 1
    for i in range(4):
        g = values(SIZE, seed=20 + i).double()
        now = [run._replace(moves=int(i > 0 or k != late)) for k, run in enumerate(runs)]
        for k, (q, run) in enumerate(zip(own, runs, strict=True)):
            q.grad = g[run.start : run.start + run.size].clone() if now[k].moves else None
        for network in (0, 1):
            nn.utils.clip_grad_norm_([q for q, run in zip(own, runs, strict=True) if run.network == network], clip)
        rule.step()
        fields = fields_of(now)
        factors = clip_factors(g, most=clip, networks=2, runs=fields)
        given: dict[str, Any] = {"average": Average(e, updates, 0.9), "clip": factors, "runs": fields, "scale": 2.0}
        if kind == "sgd":
            sgd(p, moments[0], g, rate, momentum=0.9, weight_decay=0.1, **given)
        else:
            adamw(p, moments[0], moments[1], g, rate, counts, beta1=0.8, beta2=0.99, weight_decay=0.1, **given)
        for k, (q, run) in enumerate(zip(own, runs, strict=True)):
            part = slice(run.start, run.start + run.size)
            check_close(f"step {i}, run {k}", p[part], q, 1e-12)
            expected[part].lerp_(q.detach(), 1 - min(0.9, (1 + i) / (10 + i)))
            check_close(f"step {i}, average of run {k}", e[part], expected[part], 1e-12)
            counts[run.counter] = i + 1 if k != late else i
        updates += 1
    outside = torch.ones(SIZE, dtype=torch.bool)
    for run in runs:
        outside[run.start : run.start + run.size] = False
    assert torch.equal(p[outside], before[outside])
    assert torch.equal(e[outside], values(SIZE, seed=9).double()[outside])


@pytest.mark.parametrize("runs", [RUNS, EVEN, ()], ids=["odd", "even", "none"])
@pytest.mark.parametrize("factors", [False, True])
def test_clipping_by_its_kernels_is_pytorchs(runs, factors):
    g, more = values(SIZE), values(3, 700, seed=1)
    of_factors = [Run(0, 699, 1), Run(699, 1401, 0)] if runs else []
    networks = 2 if runs else 1
    given: dict[str, Any] = {
        "most": 20.0,
        "networks": networks,
        "runs": fields_of(runs),
        "factor_runs": fields_of(of_factors),
    }
    check_op(lambda *x: clip_factors(*x, **given), *((g, more) if factors else (g,)), tolerance=1e-6)
    found = clip_factors(g.double(), more.double() if factors else None, **given)
    for n in range(networks):
        parts = [(g, run) for run in runs or [Run(0, SIZE)]]
        parts += [(more.flatten(), run) for run in of_factors or [Run(0, 2100)] if factors]
        own = [x[run.start : run.start + run.size].double() for x, run in parts if run.network == n and run.moves]
        q = nn.Parameter(torch.cat(own))
        q.grad = q.detach().clone()
        nn.utils.clip_grad_norm_([q], 20.0)
        check_close(f"network {n}", found[n] * q.detach(), q.grad, 1e-12)


def test_what_is_not_finite_is_never_hidden():
    g = values(SIZE)
    g[77] = math.nan
    for found in (clip_factors(g, most=1.0), run_kernel(clip_factors, g, most=1.0)):
        assert found.isnan().all()
    assert run_kernel(clip_factors, torch.zeros(9), most=1.0).tolist() == [1.0]
    frozen = fields_of([Run(0, SIZE, 0, 0, 1, 0)])
    assert run_kernel(clip_factors, g, most=1.0, runs=frozen).tolist() == [1.0]


def test_averages_of_statistics():
    def step(e, p, updates):
        move_average(e, p, updates, 0.9)
        return e

    check_op(step, values(1500), values(1500, seed=1), torch.tensor(5.0), tolerance=1e-6)
    e, p = values(40).double(), values(40, seed=1).double()
    expected = torch.lerp(e, p, 1 - 6 / 15)
    move_average(e, p, torch.tensor(5.0, dtype=torch.float64), 0.9)
    check_close("average", e, expected, 1e-14)


def test_blocks_are_of_one_run_and_aligned_where_they_can_be():
    (rows,) = Blocks(1024)(fields_of(RUNS))
    assert unit(fields_of(RUNS)) == 1
    assert [(row[0], row[1]) for row in rows[2:5]] == [(10, 1024), (1034, 1024), (2058, 2)]
    assert rows[4][2:] == (1, 2, 1, 1)
    (rows,) = Blocks(1024)(fields_of(EVEN))
    assert unit(fields_of(EVEN)) == 4
    assert [row[:2] for row in rows] == [(0, 256), (256, 2), (258, 256), (514, 136)]


def test_one_launch_each():
    p, one = values(77), torch.zeros(1)
    with record_launches() as launches:
        sgd(p, p, p, one[0], momentum=0.9, weight_decay=0.0, average=Average(p, one[0], 0.9), clip=one)
        adamw(p, p, p, p, one[0], one, beta1=0.0, beta2=0.9, weight_decay=0.0, runs=fields_of([Run(0, 4), Run(8, 60)]))
    assert [launch.kernel for launch in launches] == [sgd_kernel, adamw_kernel]


P, R = torch.zeros(4), torch.tensor(0.1)
USUAL: dict[str, Any] = {"beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0}
ONE = torch.zeros(1)
REFUSED = {
    "half": (lambda: adamw(P.half(), P, P, P, R, ONE, **USUAL), "p has dtype torch.float16"),
    "moment": (lambda: adamw(P, P, P[1:], P, R, ONE, **USUAL), r"s has shape \(3,\)"),
    "gradient": (lambda: adamw(P, P, P, P[1:], R, ONE, **USUAL), r"g has shape \(3,\)"),
    "rate": (lambda: adamw(P, P, P, P, ONE, ONE, **USUAL), r"rate has shape \(1,\)"),
    "counts": (lambda: adamw(P, P, P, P, R, R, **USUAL), r"counts has shape \(\)"),
    "counts' device": (lambda: adamw(P, P, P, P, R, ONE.to("meta"), **USUAL), "counts is on meta"),
    "average": (lambda: adamw(P, P, P, P, R, ONE, **USUAL, average=Average(P[1:], R, 0.9)), "average has shape"),
    "updates": (
        lambda: sgd(P, P, P, R, momentum=0.9, weight_decay=0, average=Average(P, ONE, 0.9)), "updates has shape"
    ),
    "clip": (lambda: sgd(P, P, P, R, momentum=0.9, weight_decay=0, clip=R), "clip has shape"),
    "past the end": (
        lambda: sgd(P, P, P, R, momentum=0.9, weight_decay=0, runs=fields_of([Run(2, 3)])), "does not fit 4 values"
    ),
    "no such network": (
        lambda: sgd(P, P, P, R, momentum=0.9, weight_decay=0, clip=ONE, runs=fields_of([Run(0, 3, 1)])), "1 factors"
    ),
    "no such count": (
        lambda: adamw(P, P, P, P, R, ONE, **USUAL, runs=fields_of([Run(0, 3, 0, 1)])), "values with 1 counts"
    ),
    "norm of zero": (lambda: clip_factors(P, most=0.0), "most is 0.0"),
    "half a gradient": (lambda: clip_factors(P.half(), most=1.0), "g has dtype torch.float16"),
    "other factors": (lambda: clip_factors(P, P.double(), most=1.0), "factor_g has dtype torch.float64"),
    "other statistics": (lambda: move_average(P, P[1:], R, 0.9), "p has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()
