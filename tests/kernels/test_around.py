"""The seams of a diagnosis: launches wrapped, tiles changed, ops kept to their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.launch import around_launches, references_only, use_kernels
from fastensdistill.kernels.tiles import changed_tiles, weight_gradient_split
from tests.kernels.both import values

X, W, SLOTS = values(2, 3, 5, 4, 16), values(2, 9, 16, 32), torch.tensor([1, 0], dtype=torch.int32)


def conv() -> torch.Tensor:
    with use_kernels():
        return grouped_conv(X, W, SLOTS, kernel=3, padding=1).z


def test_what_is_around_a_launch_sees_and_changes_it():
    seen = []

    def outer(launch, do):
        seen.append(("outer", launch.kernel.__name__, launch.num_warps))
        do(launch)

    def inner(launch, do):
        seen.append(("inner", launch.grid, launch.num_warps))
        do(launch._replace(num_warps=8))

    with around_launches(outer), around_launches(inner):
        conv()
    assert seen == [("inner", (4, 2), 4), ("outer", "grouped_conv_kernel", 8)]
    conv()
    assert len(seen) == 2, "it ends with the context"


def test_a_launch_that_is_not_done_leaves_its_result_unwritten():
    exact = conv()
    with around_launches(lambda launch, do: launch.arguments["p_z"].fill_(7)):
        assert conv().eq(7).all()
    assert torch.equal(conv(), exact)


@pytest.mark.parametrize("ops", [(), ("grouped_conv",)], ids=["all", "by name"])
def test_ops_kept_to_their_references_launch_nothing(ops):
    launches: list[Any] = []

    def noted(launch: Any, do: Any) -> None:
        launches.append(launch)
        do(launch)

    with around_launches(noted):
        with references_only(*ops):
            kept = conv()
        assert not launches
        with references_only("head"):
            torch.testing.assert_close(conv(), kept)
    assert len(launches) == 1


def test_half_the_columns_compute_the_same_with_more_programs():
    grids: list[Any] = []

    def halved(kernel, shape, tile):
        assert (kernel, shape[:2]) == ("conv", (16, 32))
        return tile._replace(BLOCK_N=16)

    exact = conv()

    def noted(launch: Any, do: Any) -> None:
        grids.append((launch.grid, launch.arguments["BLOCK_N"]))
        do(launch)

    with around_launches(noted):
        with changed_tiles(halved):
            torch.testing.assert_close(conv(), exact)
        with changed_tiles(lambda kernel, shape, tile: tile._replace(BLOCK_N=32)):
            torch.testing.assert_close(conv(), exact)
    assert grids == [((4, 2), 16), ((2, 2), 32)]


def test_a_weight_gradients_changed_tile_is_its_splits_too_and_ends_with_the_context():
    """Its split is searched for once a shape; a tile kept there would outlive the diagnosis, or never be seen by it."""
    given = (90, 4, 8 * 32 * 32, 9, 64, 64)
    own = weight_gradient_split(*given)
    with changed_tiles(lambda kernel, shape, tile: tile._replace(BLOCK_N=tile.BLOCK_N // 2)):
        halved = weight_gradient_split(*given)
    assert (halved.tile.BLOCK_N, halved.blocks) == (own.tile.BLOCK_N // 2, 2 * own.blocks)
    assert weight_gradient_split(*given) == own
