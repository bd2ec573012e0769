"""The reference engine against recorded steps of the authors' code, and that a fault in it would be seen."""

import pytest

from fastensdistill.method import perturbation
from fastensdistill.method.perturbation import Perturbation
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
        right = Perturbation.perturb
        swapped = lambda self, x, teachers, student, pair: right(self, x, teachers, student, pair[::-1])  # noqa: E731
        monkeypatch.setattr(Perturbation, "perturb", swapped)
    else:
        groups = BatchEnsemble.parameter_groups

        def wrong(self, weight_decay):
            shared, factors = groups(self, weight_decay)
            change = {"weight_decay": -weight_decay} if fault == "factors pushed from one" else {"lr_scale": 1.0}
            return [shared, factors | change]

        monkeypatch.setattr(BatchEnsemble, "parameter_groups", wrong)
    assert max(parity.run(parity.RECORDING).values()) > 1e-4
