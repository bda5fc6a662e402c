"""Collectives that gradients pass through.

The all-to-all of expert parallelism comes in two forms with one interface: ``plan`` exchanges how many rows go where,
``there`` brings rows to the ranks of their experts and ``back`` brings the answers home. Both forms give the same rows
in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Watcher(Protocol):
    """Is told when a rank begins to wait for others, and when it no longer does."""

    def enter(self, collective: str) -> None: ...

    def leave(self) -> None: ...


@dataclass(frozen=True)
class Trip:
    """Who sends how many rows to whom, of one all-to-all among P ranks."""

    received_Pe: Tensor
    """int64, rows from each rank to each expert of this one."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    between: list[int]
    """Rows that change trains here: for each rank of this node, those it sends to each node by way of this rank. Empty
    for an all-to-all of one level."""


class AllToAll(Protocol):
    """Moves rows among the ranks that share the experts of a layer."""

    ranks: int

    def plan(self, sent_Pe: Tensor) -> Trip:
        """Tell every rank how many rows this one has for each of its experts; waits for the device once."""
        ...

    def there(self, x_ND: Tensor, trip: Trip) -> Tensor:
        """Rows grouped by the rank they go to -> rows grouped by the rank they came from."""
        ...

    def back(self, y_RD: Tensor, trip: Trip) -> Tensor:
        """The way back of ``there``."""
        ...


class OneLevel:
    """Every rank sends to every rank of the group.

    Args:
        watcher: told before and after each exchange; None: nobody watches.
    """

    def __init__(self, group: dist.ProcessGroup, *, watcher: Watcher | None = None) -> None:
        self._group, self._watcher = group, watcher
        self.ranks = dist.get_world_size(group)

    def plan(self, sent_Pe: Tensor) -> Trip:
        received_Pe = _swap(sent_Pe, self._group, self._watcher)
        # one wait for the device, for both lists: the all-to-all's arguments must be on the host
        sent, received = torch.stack([sent_Pe.sum(1), received_Pe.sum(1)]).tolist()
        return Trip(received_Pe=received_Pe, sent=sent, received=received, between=[])

    def there(self, x_ND: Tensor, trip: Trip) -> Tensor:
        return all_to_all_rows(x_ND, sent=trip.sent, received=trip.received, group=self._group, watcher=self._watcher)

    def back(self, y_RD: Tensor, trip: Trip) -> Tensor:
        return all_to_all_rows(y_RD, sent=trip.received, received=trip.sent, group=self._group, watcher=self._watcher)


class TwoLevel:
    """First among the ranks of a node, then among the ranks of one place in all nodes.

    With A nodes of L ranks each (P = A L), rank (a, l) hands the rows for (b, m) to (a, m), its neighbour at the place
    of their goal, which sends all that its node has for (b, m) in one message. A rank then sends A - 1 messages over
    the network where one level sends (A - 1) L, each L times as long; the rows travel once more inside the node
    (the hierarchical all-to-all of DeepSpeed-MoE, arXiv:2201.05596; 2DH in Tutel, arXiv:2206.03382).

    Args:
        inside: the ranks of this node, in order.
        across: the ranks at this place in every node, in order of the nodes.
        watcher: as ``OneLevel``.
    """

    def __init__(self, *, inside: dist.ProcessGroup, across: dist.ProcessGroup, watcher: Watcher | None = None) -> None:
        self._inside, self._across, self._watcher = inside, across, watcher
        self._nodes, self._places = dist.get_world_size(across), dist.get_world_size(inside)
        self.ranks = self._nodes * self._places

    def plan(self, sent_Pe: Tensor) -> Trip:
        nodes, places, experts = self._nodes, self._places, sent_Pe.shape[1]
        from_place_to_node = _swap(sent_Pe.view(nodes, places, experts).transpose(0, 1), self._inside, self._watcher)
        received_Pe = _swap(from_place_to_node.transpose(0, 1), self._across, self._watcher).view(-1, experts)
        # one wait for the device, for all three lists
        counts = torch.cat([sent_Pe.sum(1), received_Pe.sum(1), from_place_to_node.sum(2).flatten()]).tolist()
        return Trip(
            received_Pe=received_Pe,
            sent=counts[: self.ranks],
            received=counts[self.ranks : 2 * self.ranks],
            between=counts[2 * self.ranks :],
        )

    def there(self, x_ND: Tensor, trip: Trip) -> Tensor:
        leg = self._legs(trip)
        by_place = _transpose_blocks(x_ND, trip.sent, rows=self._nodes)
        here = self._move(by_place, leg.to_place, leg.from_place, self._inside)
        by_node = _transpose_blocks(here, trip.between, rows=self._places)
        return self._move(by_node, leg.to_node, leg.from_node, self._across)

    def back(self, y_RD: Tensor, trip: Trip) -> Tensor:
        leg = self._legs(trip)
        by_node = self._move(y_RD, leg.from_node, leg.to_node, self._across)
        here = _transpose_blocks(by_node, _transposed(trip.between, rows=self._places), rows=self._nodes)
        by_place = self._move(here, leg.from_place, leg.to_place, self._inside)
        return _transpose_blocks(by_place, _transposed(trip.sent, rows=self._nodes), rows=self._places)

    def _move(self, x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        return all_to_all_rows(x_ND, sent=sent, received=received, group=group, watcher=self._watcher)

    def _legs(self, trip: Trip) -> _Legs:
        nodes, places = self._nodes, self._places
        return _Legs(
            to_place=[sum(trip.sent[place::places]) for place in range(places)],
            from_place=[sum(trip.between[place * nodes : (place + 1) * nodes]) for place in range(places)],
            to_node=[sum(trip.between[node::nodes]) for node in range(nodes)],
            from_node=[sum(trip.received[node * places : (node + 1) * places]) for node in range(nodes)],
        )


@dataclass(frozen=True)
class _Legs:
    """Rows of the two legs of a trip."""

    to_place: list[int]
    from_place: list[int]
    to_node: list[int]
    from_node: list[int]


def all_to_all_rows(
    x_ND: Tensor,
    *,
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup,
    watcher: Watcher | None = None,
) -> Tensor:
    """Send the first ``sent[0]`` rows to rank 0 of the group, the next ``sent[1]`` to rank 1, …

    Args:
        x_ND: rows, grouped by the rank they go to.
        sent: rows to each rank; sums to N.
        received: rows from each rank.
        watcher: told before and after, on the way back of the gradients too.

    Returns:
        The ``sum(received)`` rows that came, grouped by the rank they came from. Gradients travel the way back.
    """
    return _AllToAllRows.apply(x_ND, sent, received, group, watcher)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup,
        watcher: Watcher | None,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.watcher = sent, received, group, watcher
        return _exchange(x_ND, sent, received, group, watcher)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.group, ctx.watcher), None, None, None, None


def _exchange(
    x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, watcher: Watcher | None
) -> Tensor:
    out = x_ND.new_empty((sum(received), *x_ND.shape[1:]))
    if watcher is not None:
        watcher.enter("the all-to-all")
    dist.all_to_all_single(out, x_ND.contiguous(), received, sent, group=group)
    if watcher is not None:
        watcher.leave()
    return out


def _swap(counts: Tensor, group: dist.ProcessGroup, watcher: Watcher | None) -> Tensor:
    """Slice i of the first dimension goes to rank i; slice i of the result came from there."""
    counts = counts.contiguous()
    out = torch.empty_like(counts)
    if watcher is not None:
        watcher.enter("the all-to-all of counts")
    dist.all_to_all_single(out, counts, group=group)
    if watcher is not None:
        watcher.leave()
    return out


def _transpose_blocks(x_ND: Tensor, sizes: list[int], *, rows: int) -> Tensor:
    """Blocks of rows of x that lie as a grid of ``rows`` rows, one grid row after the other: column after column."""
    return torch.cat(_transposed(x_ND.split(sizes), rows=rows))


def _transposed(grid: Any, *, rows: int) -> list[Any]:
    """A grid of ``rows`` rows, given as a list of one row after the other, column after column."""
    columns = len(grid) // rows
    return [each for column in range(columns) for each in grid[column::columns]]
