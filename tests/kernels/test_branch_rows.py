"""Rows of biases, scales, shifts and factors: each value from its definition, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.branch_rows import branch_rows, branch_rows_kernel
from fastensdistill.kernels.launch import record_launches
from tests.compare import check_close
from tests.kernels.both import check_op, values
from tests.untyped import untyped

SCALES, P, K, R = 40, 7, 3, 11
# id: (deviation, scale, parameter, shift), each a number or "any" index
PARTS = {
    "folded bias": ("any", "any", "any", "any"),
    "folded, no bias": ("any", "any", -1, "any"),
    "bias": ("any", -1, "any", -1),
    "scale": (-1, "any", -2, -1),
    "shift": (-1, -1, -1, "any"),
    "factor": ("any", "any", -2, -2),
    "factor without a norm": ("any", -1, -2, -2),
}


def problem(parts, n: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    sizes = (K * R, P, SCALES, P)
    table = [torch.randperm(n + 5, generator=generator)[:n]]
    for part, size in zip(parts, sizes, strict=True):
        table.append(torch.randint(size, (n,), generator=generator) if part == "any" else torch.full((n,), part))
    return [
        torch.full((n + 5,), 7.0, dtype=dtype),
        torch.stack(table),
        values(SCALES + 2 * P + 3).to(dtype),
        0.3 * values(K, R).to(dtype),
        values(P, seed=1).to(dtype),
        values(P, seed=2).abs().to(dtype),
        torch.linspace(1e-5, 1e-3, P, dtype=dtype),
        SCALES,
    ]


@pytest.mark.parametrize("n", [1, 300], ids=["one", "two-programs"])
@pytest.mark.parametrize("parts", PARTS)
def test_values(parts, n):
    arguments = problem(PARTS[parts], n, torch.float64)
    out, table, p, d, mean, var, eps, _ = arguments
    expected = out.clone()
    for target, i, norm, parameter, shift in table.t().tolist():
        factor = (1 + d[i // R, i % R]) if i >= 0 else 1.0
        if norm >= 0:
            factor = factor * p[SCALES + norm] / (var[norm] + eps[norm]).sqrt()
        value = p[parameter] if parameter >= 0 else {-1: 0.0, -2: 1.0}[parameter]
        added = {-1: 0.0, -2: -1.0}.get(shift)
        if added is None:
            scale = p[SCALES + shift] / (var[shift] + eps[shift]).sqrt()
            added = p[SCALES + P + shift] - scale * mean[shift]
        expected[target] = factor * value + added
    branch_rows(*arguments)
    check_close("rows", out, expected, 1e-14)


@pytest.mark.parametrize("n", [1, 300], ids=["one", "two-programs"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_kernel_is_the_reference(parts, n):
    def rows(*arguments):
        branch_rows(*arguments)
        return arguments[0]

    check_op(rows, *problem(PARTS[parts], n), tolerance=1e-6)


def test_one_launch_and_none_for_no_rows():
    with record_launches() as launches:
        branch_rows(*problem(PARTS["bias"], 20))
        branch_rows(*problem(PARTS["bias"], 0))
    assert [launch.kernel for launch in launches] == [branch_rows_kernel]


REFUSED = {
    "table": ({1: torch.zeros(5, 3)}, r"table has dtype torch.float32"),
    "columns": ({1: torch.zeros(4, 3, dtype=torch.int64)}, r"shape \(4, 3\)"),
    "dtype": ({3: torch.zeros(K, R, dtype=torch.float64)}, "deviations has dtype torch.float64"),
    "device": ({4: torch.zeros(P, device="meta")}, "running_mean is on meta"),
    "channels": ({5: torch.ones(P + 1)}, r"running_var has shape \(8,\)"),
    "strided": ({3: torch.zeros(R, K).t()}, "deviations is not contiguous"),
    "scales": ({7: 50}, "scales is 50; 57 parameters hold no 2 x 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changed, message = REFUSED[case]
    arguments = problem(PARTS["bias"], 3)
    for at, value in untyped(changed).items():
        arguments[at] = value
    with pytest.raises(InputError, match=message):
        branch_rows(*arguments)
