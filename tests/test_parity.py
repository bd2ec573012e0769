"""The reference engine against recorded steps of the authors' code, and that a fault in it would be seen."""

import pytest

from fastensdistill.method import perturbation
from fastensdistill.method.student import BatchEnsemble
from tests import parity


def test_every_quantity_of_every_step(capsys):
    assert parity.main([str(parity.RECORDING)]) == 0
    printed = capsys.readouterr().out
    assert "138 quantities" in printed
    assert max(parity.run(parity.RECORDING).values()) < 1e-12


@pytest.mark.parametrize("fault", ["sign of SDiv", "pair swapped", "factors pushed from one", "no K-fold gradient"])
def test_a_fault_is_seen(monkeypatch, fault):
    if fault == "sign of SDiv":
        seeds = perturbation.diversity_seed
        monkeypatch.setattr(perturbation, "diversity_seed", lambda t, s: (*seeds(t, s)[:3], -seeds(t, s)[3]))
    elif fault == "pair swapped":
        right = parity.tdiv_sdiv
        swapped = lambda x, t, s, pair, branches, size: right(x, t, s, pair[::-1], branches[::-1], size)  # noqa: E731
        monkeypatch.setattr(parity, "tdiv_sdiv", swapped)
    else:
        groups = BatchEnsemble.parameter_groups

        def wrong(self, weight_decay):
            shared, factors = groups(self, weight_decay)
            change = {"weight_decay": -weight_decay} if fault == "factors pushed from one" else {"lr_scale": 1.0}
            return [shared, factors | change]

        monkeypatch.setattr(BatchEnsemble, "parameter_groups", wrong)
    assert max(parity.run(parity.RECORDING).values()) > 1e-4
