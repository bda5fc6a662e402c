"""What the ranks measure: matrix products, all-reduce, the run's own all-to-all, and every link by itself.

Device-neutral: NCCL and GPUs where there are some, gloo and CPUs elsewhere. Of several tries the best counts: a busy
moment of a machine is no fault of it, a slow part is slow every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.parallel.collectives import AllToAll, OneLevel
from moetrain.parallel.groups import Groups
from moetrain.preflight.links import Pair, rounds, slow_links
from moetrain.preflight.rules import SPEEDS
from moetrain.preflight.seen.facts import Collective, Link, Measured

TRIES = 4
KIB, MIB = 1 << 10, 1 << 20
AIM_SECONDS = 0.05
"""A message is as long as takes about this time: long against latency, short against patience."""
LARGEST = {"cuda": 256 * MIB, "cpu": 16 * MIB}
"""Bytes of one message."""
MATMUL = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the square matrices."""
MOST_ROUNDS = 63
"""Of the tournament: 64 nodes meet each other all; of more nodes, each meets 63 others."""
MOST_AGAIN = 16
"""Suspicious links that are measured a second time, each alone."""


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What one rank hands to its MoE layer's all-to-all in one micro-batch.

    Attributes:
        rows: token copies, tokens x top_k.
        width: of a row, d_model.
    """

    rows: int
    width: int
    num_experts: int


def measure(groups: Groups, *, ranks_per_node: int, dtype: torch.dtype, exchanged: Exchanged | None) -> Measured:
    """All measurements, in all ranks together.

    Args:
        ranks_per_node: on each node.
        dtype: of the run's matrix products and rows.
        exchanged: None: the model is dense, or each rank holds all experts.
    """
    bench = _Bench(groups)
    world_size = groups.topology.world_size
    nodes = world_size // ranks_per_node
    lanes = ranks_per_node if nodes > 1 else 1
    units = world_size // lanes
    played = rounds(units)[:MOST_ROUNDS]
    matmul = bench.of_all(bench.matmul(dtype))[:, 0].tolist()
    return Measured(
        device=torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else "cpu",
        ranks_per_node=ranks_per_node,
        matmul=matmul,
        all_reduce=bench.all_reduce() if world_size > 1 else None,
        all_to_all=[] if exchanged is None or groups.expert is None else bench.all_to_all(exchanged, dtype),
        units="nodes" if nodes > 1 else "ranks",
        links=_tournament(bench, played, lanes=lanes, units=units),
        rounds=len(played),
        rounds_of=len(rounds(units)),
        grown={},
    )


class _Bench:
    """Clocks on this rank's device, and what all ranks have seen on theirs."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.device = groups.device
        self.rank = groups.topology.rank
        self.largest = LARGEST[self.device.type]

    def seconds(self, act: Callable[[], object]) -> float:
        """Of one try, the device's work included."""
        self._wait()
        start = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def together(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.groups.control)

    def of_all(self, *values: float) -> Tensor:
        """A row of numbers from each rank: [ranks, values], float64."""
        own = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.groups.topology.world_size)]
        dist.all_gather(rows, own, group=self.groups.control)
        return torch.stack(rows)

    def matmul(self, dtype: torch.dtype) -> float:
        """FLOP/s of this rank while all others multiply too, as in a step."""
        size = MATMUL[self.device.type]
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        self.seconds(lambda: torch.mm(a, b, out=out))
        rough = self.seconds(lambda: torch.mm(a, b, out=out))
        repeats = max(1, min(100, round(AIM_SECONDS / max(rough, 1e-6))))

        def several() -> None:
            for _ in range(repeats):
                torch.mm(a, b, out=out)

        self.together()
        return 2.0 * size**3 * repeats / min(self.seconds(several) for _ in range(TRIES))

    def all_reduce(self) -> Collective:
        """Over all ranks, in fp32 as the engine reduces gradients."""
        numel = MIB // 4
        x = torch.ones(numel, device=self.device)
        act = self._reducer(x)
        self.seconds(act)  # opens the connections
        rough = float(self.of_all(self.seconds(act)).max())
        numel = round(max(numel, min(self.largest // 4, numel * AIM_SECONDS / rough)))
        act = self._reducer(torch.ones(numel, device=self.device))
        tries = self.of_all(*(self.seconds(act) for _ in range(TRIES)))
        ranks = self.groups.topology.world_size
        # each byte goes around the ring twice, less the share that is there already (NCCL's bus bandwidth)
        sent = 2 * 4 * numel * (ranks - 1) // ranks
        return Collective(ranks=list(range(ranks)), sent_bytes=sent, seconds=float(tries.max(0).values.min()))

    def _reducer(self, x: Tensor) -> Callable[[], object]:
        return lambda: dist.all_reduce(x, group=self.groups.world)

    def all_to_all(self, exchanged: Exchanged, dtype: torch.dtype) -> list[Collective]:
        """Rows to the experts, by the layer's own all-to-all, of every expert group at once: as in a step."""
        assert self.groups.expert is not None
        way: AllToAll = self.groups.two_level or OneLevel(self.groups.expert)
        ranks, experts = way.ranks, exchanged.num_experts // way.ranks
        row_bytes = exchanged.width * dtype.itemsize
        rows = min(exchanged.rows, self.largest // row_bytes)
        each = max(1, rows // exchanged.num_experts)
        trip = way.plan(torch.full((ranks, experts), each, dtype=torch.int64, device=self.device))
        x = torch.zeros(each * exchanged.num_experts, exchanged.width, dtype=dtype, device=self.device)

        def act() -> Tensor:
            return way.there(x, trip)

        self.seconds(act)
        self.together()
        tries = self.of_all(*(self.seconds(act) for _ in range(TRIES)))
        sent = each * experts * (ranks - 1) * row_bytes
        return [
            Collective(ranks=group, sent_bytes=sent, seconds=float(tries[group].max(0).values.min()))
            for group in self.groups.topology.expert_groups
        ]

    def link(self, partner: int) -> float:
        """Bytes per second to another rank, which sends as much to us meanwhile."""
        self._exchange(partner, 64 * KIB)  # opens the connection
        probe = 256 * KIB
        rough = self.seconds(lambda: self._exchange(partner, probe))
        # both ends must come to the same length
        own = torch.tensor([rough], dtype=torch.float32, device=self.device)
        slower = max(rough, float(self._swap(own, torch.empty_like(own), partner)))
        size = round(max(probe, min(self.largest, probe * AIM_SECONDS / slower)) / KIB) * KIB
        sent, received = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return size / min(self.seconds(lambda: self._swap(sent, received, partner)) for _ in range(TRIES))

    def _exchange(self, partner: int, size: int) -> None:
        sent, received = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        self._swap(sent, received, partner)

    def _swap(self, sent: Tensor, received: Tensor, partner: int) -> Tensor:
        # receive first: gloo's word that a buffer is ready would else queue behind our own data, and the two directions
        # would take turns
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, received, partner), dist.P2POp(dist.isend, sent, partner)]
        )
        for work in works:
            work.wait()
        return received


def _tournament(bench: _Bench, played: list[list[Pair]], *, lanes: int, units: int) -> list[Link]:
    """Every rank measures with the rank of its place in the other unit; then what was slow, again and alone."""
    own = [0.0] * units
    for pairs in played:
        _play(bench, pairs, own, lanes=lanes)
    links = _links(bench.of_all(*own), [pair for pairs in played for pair in pairs], lanes=lanes)
    suspects = slow_links({(link.a, link.b): link.rate for link in links}, below=SPEEDS["link"].warn_below)
    for pair in suspects[:MOST_AGAIN]:
        _play(bench, [pair], own, lanes=lanes)
    return _links(bench.of_all(*own), [(link.a, link.b) for link in links], lanes=lanes) if suspects else links


def _play(bench: _Bench, pairs: list[Pair], own: list[float], *, lanes: int) -> None:
    """One round: nobody starts before the round before is over everywhere."""
    unit, place = divmod(bench.rank, lanes)
    bench.together()
    for a, b in pairs:
        if unit in (a, b):
            other = b if unit == a else a
            own[other] = max(own[other], bench.link(other * lanes + place))


def _links(rates: Tensor, pairs: list[Pair], *, lanes: int) -> list[Link]:
    """Args: rates: [ranks, units], what each rank has measured to each unit."""
    return [
        Link(a=a, b=b, lanes=torch.minimum(rates[a * lanes : (a + 1) * lanes, b],
                                           rates[b * lanes : (b + 1) * lanes, a]).tolist())
        for a, b in pairs
    ]  # fmt: skip
