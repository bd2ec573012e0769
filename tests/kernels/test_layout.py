"""The order in which weight gradients lie, element by element."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest

from fastensdistill.kernels.layout import Order

CASES = {
    "one block": (Order(6, 10), 9, 6, 10),
    "blocks": (Order(4, 3), 9, 8, 9),
    "cut short": (Order(4, 3), 4, 6, 10),
    "input innermost": (Order(4, 3, True), 9, 6, 10),
    "more than there is": (Order(16, 64, True), 1, 3, 10),
}


@pytest.mark.parametrize("case", CASES)
def test_element_counts_the_elements_of_the_shape(case):
    order, taps, Ci, Co = CASES[case]
    shape = order.shape(taps, Ci, Co)
    places = {}
    for at, (i, o, tap, row, column) in enumerate(product(*map(range, shape))):
        if order.in_innermost:
            row, column = column, row
        places[tap, i * order.in_block + row, o * order.out_block + column] = at
    assert len(places) == prod(shape) >= taps * Ci * Co
    for tap, i, o in product(range(taps), range(Ci), range(Co)):
        assert order.element(taps, Ci, Co, tap, i, o) == places[tap, i, o]


def test_one_block_is_the_order_of_the_op():
    for tap, i, o in product(range(9), range(6), range(10)):
        assert Order(6, 10).element(9, 6, 10, tap, i, o) == (tap * 6 + i) * 10 + o
