"""Un-fold of gradients in the kernels' order, against autograd through the folded layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.layout import Layout
from fastensdistill.kernels.unfold import unfold_factors_kernel, unfold_gradients, unfold_kernel
from tests.compare import check_close
from tests.kernels import layouts
from tests.kernels.both import DEVICE, run_kernel
from tests.untyped import present, untyped

POSITIONS = {"fc": 6}  # of the linear layer of the one case that these lack
CASES = [*(case for case in layouts.CASES if case != "two-tables"), "positions"]


def problem(case: str, dtype: torch.dtype) -> tuple[Layout, dict[str, Tensor]]:
    if case != "positions":
        return layouts.problem(case, dtype)
    weights = [("conv", (7, 3, 3, 3), True), ("fc", (35, 7 * 6), True), ("last", (4, 35), False)]
    layout = Layout.build(weights, 5, 2, POSITIONS)
    g = torch.Generator().manual_seed(1)
    sizes = {
        "parameters": (layout.size,),
        "deviations": (2, layout.factors),
        "branch_gradients": (2, layout.ranked),
    }
    drawn = {name: torch.randn(*size, generator=g, dtype=torch.float64) for name, size in sizes.items()}
    return layout, {name: value.to(dtype) for name, value in drawn.items()}


def in_kernel_order(layout: Layout, gradients: Tensor) -> Tensor:
    """[K, ranked] in the parameters' order → flat, element by element as the documentation says."""
    K = len(gradients)
    flat = gradients.new_full((K * layout.ranked,), float("nan"))
    for layer in layout.layers:
        W = gradients[:, layer.weight : layer.weight + layer.weight_size]
        if layer.positions > 1:  # [K, Co, C, H·W] → [K, H·W, C, Co]
            W = W.view(K, layer.out_channels, -1, layer.positions).permute(0, 3, 2, 1)
        else:  # [K, Co, Ci, taps] → [K, taps, Ci, Co]
            W = W.view(K, layer.out_channels, layer.in_channels, layer.taps).permute(0, 3, 2, 1)
        flat[K * layer.weight : K * (layer.weight + layer.weight_size)] = W.flatten()
        if layer.bias >= 0:
            b = gradients[:, layer.bias : layer.bias + layer.out_channels]
            flat[K * layer.bias : K * (layer.bias + layer.out_channels)] = b.flatten()
    return flat


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("case", CASES)
def test_branches(case):
    """Kernels and reference are the adjoint of folding; what is not a layer's stays; twice the same bits."""
    layout, t = problem(case, torch.float32)
    p, d = (t[name].double().requires_grad_() for name in ("parameters", "deviations"))
    layouts.folded(layout, p, d).backward(t["branch_gradients"].double())
    expected = present(p.grad)[: layout.ranked], d.grad

    def run(call, dtype):
        gradients = in_kernel_order(layout, t["branch_gradients"]).to(DEVICE, dtype)
        given = [t[name].to(DEVICE, dtype) for name in ("parameters", "deviations")]
        gradient = torch.full_like(given[0], float("nan"))
        factors = call(unfold_gradients, gradients, *given, layout, gradient)
        assert gradient[layout.ranked :].isnan().all()
        return gradient[: layout.ranked], factors

    actual = run(run_kernel, torch.float32)
    for one, other in zip(actual, run(run_kernel, torch.float32), strict=True):
        assert torch.equal(one, other)
    reference = run(lambda op, *args: op(*args), torch.float64)
    for i, name in enumerate(("gradient", "factor_gradients")):
        check_close(f"{name}, reference", reference[i], present(expected[i]), 1e-12)
        check_close(f"{name}, kernels", actual[i], present(expected[i]), 5e-6)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", [run_kernel, lambda op, *args: op(*args)], ids=["kernel", "reference"])
def test_plain_networks(case, call):
    """The gradients of copies without factors are put in order, [copies, *shape] per weight, and nothing else moves."""
    layout, t = problem(case, torch.float32)
    g = t["branch_gradients"]
    K = len(g)
    gradients = in_kernel_order(layout, g).to(DEVICE)
    expected = torch.full((K * layout.size,), 7.0)
    for layer in layout.layers:
        W = g[:, layer.weight : layer.weight + layer.weight_size]
        expected[K * layer.weight : K * (layer.weight + layer.weight_size)] = W.flatten()
    gradient = torch.full_like(expected, 7.0, device=DEVICE)
    none = call(unfold_gradients, gradients, torch.empty_like(gradient), None, layout, gradient)
    assert none.numel() == 0
    assert torch.equal(gradient.cpu(), expected)


def test_launches():
    layout, t = problem("many-layers", torch.float32)
    flat, gradients = t["parameters"], in_kernel_order(layout, t["branch_gradients"])
    with record_launches() as launches:
        unfold_gradients(gradients, flat, t["deviations"], layout, flat.clone())
        unfold_gradients(gradients, flat.repeat(2), None, layout, flat.repeat(2))
    assert [launch.kernel for launch in launches] == [unfold_kernel, unfold_factors_kernel, unfold_kernel]
    assert [launch.grid for launch in launches] == [(12,), (24, 2), (12, 2)]


L, V = problem("one-branch", torch.float32)
REFUSED = {
    "gradients": ({"gradients": torch.zeros(3)}, r"gradients has shape \(3,\); expected \(603,\)"),
    "gradient": ({"gradient": torch.zeros(603)}, r"gradient has shape \(603,\); expected \(612,\)"),
    "strided": ({"gradient": torch.zeros(L.size, 2)[:, 0]}, "gradient is not contiguous"),
    "dtype": ({"gradients": torch.zeros(603).double()}, "gradients has dtype torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changed, message = REFUSED[case]
    given = {
        "gradients": torch.zeros(L.ranked),
        "parameters": V["parameters"],
        "deviations": V["deviations"],
        "layout": L,
        "gradient": torch.zeros(L.size),
    }
    with pytest.raises(InputError, match=message):
        unfold_gradients(**untyped(given | changed))
