"""torch.library.opcheck over every op of the loss, the seeds, the perturbation step and the packing."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.kernels import distillation_loss, diversity_seed, pack, perturb_step  # noqa: F401  (ops)
from tests.kernels import emulation
from tests.kernels.rows import operands

OPS = torch.ops.fastensdistill
pytestmark = pytest.mark.usefixtures("each_implementation")
DIFFERENTIABLE = ("distillation_loss", "diversity_seed", "teacher_diversity_seed")
NAMES = [*DIFFERENTIABLE, "ods_seed", "pack_rank_one", "perturb_step"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    op = getattr(OPS, name).default
    for grad in {False, name in DIFFERENTIABLE}:
        torch.library.opcheck(op, operands(name, dtype, grad))


def test_every_op_is_checked():
    """Those of the extension, but the convolutions', which their own tests check."""
    assert {name for name in emulation.OPS if not name.startswith(("halo", "wgmma"))} == set(NAMES)
