import pytest
import torch

from fastensdistill.kernels import sums
from fastensdistill.kernels.batch_norm import batch_norm_statistics
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward
from fastensdistill.kernels.sums import TERMS, add_rows
from tests.compare import check_close
from tests.kernels.both import DEVICE, check_op, run_kernel, values


@pytest.mark.parametrize(
    ("sets", "rows", "width", "kept"),
    [(1, 3, 700, 1), (2, 3 * TERMS + 1, 48, 1), (2, 37, 6, 5), (3, 4, 33, 8), (1, 2 * TERMS * 16, 20, 16)],
    ids=["few", "several-blocks", "last-row-not-full", "fewer-than-kept", "even"],
)
def test_add_rows(sets, rows, width, kept):
    x = values(sets, rows, width)
    expected = torch.stack([x[:, r::kept].double().sum(1) for r in range(kept)], 1)
    check_close("sums", run_kernel(add_rows, x.to(DEVICE), kept), expected, 1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_batch_norm_with_many_rows(shared, monkeypatch):
    """With more rows than a few, they are first added up to 1024; the results stay what they are."""
    monkeypatch.setattr(sums, "FEW_ROWS", 1024)
    groups, rows, channels = 2, 1100, 20
    sets = 1 if shared else groups
    partials = values(groups, rows, 2, channels)
    partials[:, :, 1] = partials[:, :, 1].abs() + 1
    a, b, c, d = (0.5 + values(sets, channels, seed=seed).abs() for seed in range(4))
    check_op(batch_norm_statistics, partials, 30 * rows, a, b, c, d)
    z = [values(groups, 2, 3, 3, channels, seed=seed) for seed in range(2)]
    check_op(batch_norm_backward, *z, partials, 30 * rows, a, b, c)
