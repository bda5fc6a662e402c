"""Who is where: ranks laid out on an (expert-data, expert) grid. Pure Python.

Expert parallelism is the fastest axis, so that the ranks that exchange tokens are neighbours and share a node:
with 4 ranks and expert_parallel 2, ranks 0,1 hold one whole set of experts and ranks 2,3 the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One rank's place.

    Raises:
        ValueError: expert_parallel does not divide world_size, or rank lies outside it.
    """

    world_size: int
    rank: int
    expert_parallel: int

    def __post_init__(self) -> None:
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise ValueError(
                f"expert_parallel is {self.expert_parallel}, but must divide the world size, {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, but must lie in [0, {self.world_size})")

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

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts on this rank."""
        if num_experts % self.expert_parallel:
            raise ValueError(f"num_experts is {num_experts}, but must be a multiple of {self.expert_parallel}")
        each = num_experts // self.expert_parallel
        return range(self.expert_rank * each, (self.expert_rank + 1) * each)
