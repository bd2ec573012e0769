"""Networks of torchvision and timm: the list of their tiers is kept, and what is planned computes what it is."""

from __future__ import annotations

import json

import pytest

from bench.network_steps import ROLES, step_errors, tier
from bench.networks import BOUND, NETWORKS, RESULTS, tiers, worst

pytest.importorskip("timm")
QUICK = ("squeezenet1_1", "mobilenetv4_conv_small")
"""Two that are quick; ``python -m bench.networks`` takes them all."""
TOO_LARGE = {"vgg16"}
"""Many copies of 100 million weights in float64: ten minutes and 10 GB. Traced and compared, its step is not run."""


def test_the_list_is_long_and_mostly_planned():
    assert len(NETWORKS) >= 40
    assert sum(listed.source == "torchvision" for listed in NETWORKS.values()) == 16
    assert sum(listed.tiers == ("planned", "planned") for listed in NETWORKS.values()) >= 20
    assert sum("eager" in listed.tiers for listed in NETWORKS.values()) <= 5
    assert [name for name, listed in NETWORKS.items() if listed.bound > BOUND] == ["efficientnetv2_rw_t"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", QUICK)
def test_a_step_is_that_of_the_reference_engine(name, role):
    network, found = tier(name, role)
    assert network is not None, found
    assert found["tier"] == NETWORKS[name].tiers[ROLES.index(role)]
    errors = step_errors(name, role)["errors"]
    assert errors.keys() >= {"update", "losses", "images"}
    assert max(errors.values()) < BOUND, errors


def test_the_results_are_of_the_whole_list():
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    assert rows.keys() >= NETWORKS.keys() - TOO_LARGE
    for name, row in rows.items():
        assert "error" not in row, name
        assert tiers(row) == NETWORKS[name].tiers, name
        for role in ROLES:
            if row[role]["tier"] in ("planned", "mixed"):
                error = worst(row, role)
                assert error is not None, (name, role)
                assert error < NETWORKS[name].bound, (name, role)
