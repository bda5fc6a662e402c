"""The grid of ranks, written out by hand."""

from __future__ import annotations

import pytest

from moetrain.parallel.topology import Topology


def place(rank: int, *, world_size: int = 8, expert_parallel: int = 4) -> Topology:
    return Topology(world_size=world_size, rank=rank, expert_parallel=expert_parallel)


def test_eight_ranks_in_expert_groups_of_four() -> None:
    for rank in range(8):
        assert place(rank).expert_groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert place(rank).expert_data_groups == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [place(rank).expert_rank for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    eight = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(place(rank).local_experts(8)) for rank in range(8)] == eight + eight


def test_without_expert_parallelism_every_rank_holds_all() -> None:
    alone = place(2, world_size=3, expert_parallel=1)
    assert alone.expert_groups == [[0], [1], [2]]
    assert alone.expert_data_groups == [[0, 1, 2]]
    assert list(alone.local_experts(5)) == [0, 1, 2, 3, 4]


def test_all_ranks_may_share_one_set_of_experts() -> None:
    last = place(3, world_size=4, expert_parallel=4)
    assert last.expert_groups == [[0, 1, 2, 3]]
    assert last.expert_data_groups == [[0], [1], [2], [3]]
    assert list(last.local_experts(4)) == [3]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"world_size": 6, "rank": 0, "expert_parallel": 4}, "expert_parallel is 4, but must divide the world size, 6"),
        ({"world_size": 4, "rank": 0, "expert_parallel": 8}, "expert_parallel is 8, but must divide the world size, 4"),
        ({"world_size": 4, "rank": 0, "expert_parallel": 0}, "expert_parallel is 0"),
        ({"world_size": 4, "rank": 0, "expert_parallel": -2}, "expert_parallel is -2"),
        ({"world_size": 4, "rank": 4, "expert_parallel": 2}, r"rank is 4, but must lie in \[0, 4\)"),
        ({"world_size": 4, "rank": -1, "expert_parallel": 2}, "rank is -1"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(settings: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Topology(**settings)


def test_expert_groups_lie_inside_a_node_where_they_fit() -> None:
    for expert_parallel, inside in ((1, True), (2, True), (4, True), (8, False), (16, False)):
        place = Topology(world_size=16, rank=5, expert_parallel=expert_parallel, processes_per_node=4)
        nodes = [{rank // 4 for rank in group} for group in place.expert_groups]
        assert place.crosses_nodes is not inside
        assert all((len(each) == 1) is inside for each in nodes)


def test_groups_of_two_levels_are_nodes_and_places() -> None:
    place = Topology(world_size=8, rank=0, expert_parallel=4, processes_per_node=2)
    assert place.crosses_nodes
    assert place.expert_groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert place.inside_groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # ranks at one place of the two nodes of an expert group: what they exchange never leaves the expert group
    assert place.across_groups == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_without_nodes_all_ranks_are_on_one() -> None:
    assert not place(0).crosses_nodes
    assert place(0).node_size == 8


@pytest.mark.parametrize(
    ("expert_parallel", "told"),
    [
        (3, r"expert_parallel is 3, but must divide the processes of a node, 4, or .* use one of \[1, 2, 4, 12\]"),
        (6, r"expert_parallel is 6, but .* whole nodes: use one of \[1, 2, 4, 12\]"),
    ],
)
def test_expert_groups_that_cut_nodes_are_refused_with_those_that_do_not(expert_parallel: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Topology(world_size=12, rank=0, expert_parallel=expert_parallel, processes_per_node=4)


def test_nodes_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the world size is 6, but must be a multiple of the processes of a node, 4"):
        Topology(world_size=6, rank=0, expert_parallel=1, processes_per_node=4)


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts is 6, but must be a multiple of 4"):
        place(0).local_experts(6)
