"""Who is where: ranks laid out on an (expert-data, expert) grid. Pure Python.

Expert parallelism is the fastest axis, so that the ranks that exchange tokens are neighbours and share a node:
with 4 ranks and expert_parallel 2, ranks 0,1 hold one whole set of experts and ranks 2,3 the other. Ranks of a node are
neighbours too. So an expert group lies inside a node, or it is made of whole nodes; anything between is refused, since
its all-to-all would cross nodes for some ranks and not for others, and all would wait for the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One rank's place.

    Attributes:
        processes_per_node: ranks on each node; None: all are on one.

    Raises:
        ValueError: expert_parallel does not divide world_size, or does not fit the nodes; or rank lies outside.
    """

    world_size: int
    rank: int
    expert_parallel: int
    processes_per_node: int | None = None

    def __post_init__(self) -> None:
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise ValueError(
                f"expert_parallel is {self.expert_parallel}, but must divide the world size, {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, but must lie in [0, {self.world_size})")
        if self.world_size % self.node_size:
            raise ValueError(
                f"the world size is {self.world_size}, but must be a multiple of the processes of a node, "
                f"{self.node_size}: start as many on every node"
            )
        if not self._fits_nodes(self.expert_parallel):
            fitting = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0 and self._fits_nodes(n)]
            raise ValueError(
                f"expert_parallel is {self.expert_parallel}, but must divide the processes of a node, "
                f"{self.node_size}, or be a multiple of them, so that experts are shared inside a node or among whole "
                f"nodes: use one of {fitting}"
            )

    def _fits_nodes(self, expert_parallel: int) -> bool:
        return self.node_size % expert_parallel == 0 or expert_parallel % self.node_size == 0

    @property
    def node_size(self) -> int:
        """Ranks on each node."""
        return self.processes_per_node or self.world_size

    @property
    def crosses_nodes(self) -> bool:
        """Whether the ranks that exchange tokens are on more than one node."""
        return self.expert_parallel > self.node_size

    @property
    def expert_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.rank % self.expert_parallel

    @property
    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold each expert once and exchange tokens."""
        size = self.expert_parallel
        return [list(range(start, start + size)) for start in range(0, self.world_size, size)]

    @property
    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts and average their gradients."""
        return [list(range(start, self.world_size, self.expert_parallel)) for start in range(self.expert_parallel)]

    @property
    def inside_groups(self) -> list[list[int]]:
        """Ranks of one node, for expert groups that cross nodes."""
        return [list(range(start, start + self.node_size)) for start in range(0, self.world_size, self.node_size)]

    @property
    def across_groups(self) -> list[list[int]]:
        """Ranks at one place in all the nodes of an expert group, for those that cross nodes."""
        return [group[place :: self.node_size] for group in self.expert_groups for place in range(self.node_size)]

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts on this rank."""
        if num_experts % self.expert_parallel:
            raise ValueError(f"num_experts is {num_experts}, but must be a multiple of {self.expert_parallel}")
        each = num_experts // self.expert_parallel
        return range(self.expert_rank * each, (self.expert_rank + 1) * each)
