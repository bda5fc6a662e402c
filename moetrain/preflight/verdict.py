"""What was found against what the run needs: a line for each rule, and the nodes to leave out. No torch."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moetrain.plan.cluster import GB, Cluster
from moetrain.plan.time import REACHED, all_to_all_seconds, ring
from moetrain.preflight.checks import Needs
from moetrain.preflight.links import Pair, at_fault, leave_out, median_of_others
from moetrain.preflight.rules import NO_GO, RULES, SAME, SPEEDS, WARN, Rule, Same
from moetrain.preflight.seen.facts import Collective, Found, Measured, NodeFacts

GO, NOT_MEASURED = "go", "not measured"
REPORT_FILE, HOSTFILE = "preflight.json", "hostfile.good"
_BEFORE_MEASURING = ("settings", "interface variables", "own address")
"""Rules without which the ranks cannot join."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table."""

    what: str
    verdict: str
    """go, warn, no-go or not measured."""
    where: str
    found: str
    reason: str = ""
    """Why it matters."""
    remedy: str = ""
    node: int | None = None
    """Whose fault it is."""
    link: tuple[int, int] | None = None
    """The nodes at both ends, where it may be either's."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a cluster's file says, as far as the plan counts on it."""

    name: str
    cluster: Cluster
    efficiency: float
    """Share of the peak that matrix products reach."""


def in_the_way(found: Found) -> str | None:
    """Why the ranks cannot measure together; None: they can."""
    if found.missing or found.unreachable:
        return "not all nodes are there"
    for same in SAME:
        if same.what in ("code", "settings") and len({same.value(facts) for facts in found.nodes}) > 1:
            return f"the {same.what} of the nodes differ"
    needs = Needs(nodes=len(found.nodes), processes=found.ranks_per_node, gpus=False, checkpoint_bytes=0,
                  checkpoints_kept=0)  # fmt: skip
    for rule in RULES:
        if rule.what in _BEFORE_MEASURING:
            for facts in found.nodes:
                if rule.applies(facts, needs) and rule.check(facts, needs):
                    return rule.what
    return None


def judge(
    found: Found,
    *,
    needs: Needs,
    stated: Stated | None,
    failure: str | None = None,
    dtype: str,
    hosts: Sequence[str] = (),
) -> list[Line]:
    """Hold what was found against every rule, the gravest lines first.

    Args:
        stated: None: no cluster was named, and what was measured is held against the rest of it.
        failure: what ended the ranks while they measured.
        dtype: of the run.
        hosts: what the launcher calls the nodes, in order; empty: as they call themselves.
    """
    names = node_names(found) | dict(enumerate(hosts))
    lines = [*_absent(found, names)]
    for rule in RULES:
        lines += _of_rule(rule, found.nodes, names, needs=needs)
    if len(found.nodes) > 1:
        for same in SAME:
            lines += _of_same(same, found.nodes, names)
    if found.measured is not None:
        lines += _Judge(found, found.measured, names, stated, dtype).lines()
    else:
        why = failure or in_the_way(found) or "the ranks did not come so far"
        verdict = NO_GO if failure else NOT_MEASURED
        lines.append(Line(what="speed", verdict=verdict, where="all nodes", found=why,
                          remedy="mend what is no-go, and try again" if not failure else "see the logs"))  # fmt: skip
    order = (NO_GO, WARN, NOT_MEASURED, GO)
    return sorted(lines, key=lambda line: order.index(line.verdict))


def judge_alone(facts: NodeFacts, *, needs: Needs) -> list[Line]:
    """The rules for one node, of which nothing was measured."""
    lines: list[Line] = []
    for rule in RULES:
        lines += _of_rule(rule, [facts], {facts.node: facts.host}, needs=needs)
    return lines


def overall(lines: Sequence[Line]) -> str:
    """The gravest verdict; what could not be looked at does not count."""
    return next((each for each in (NO_GO, WARN) if any(line.verdict == each for line in lines)), GO)


def node_names(found: Found) -> dict[int, str]:
    """A name for each node: its host's, with the address where two hosts are called the same."""
    many = Counter(facts.host for facts in found.nodes)
    names = {node: f"node {node}" for node in range(found.world_size // found.ranks_per_node)}
    for facts in found.nodes:
        names[facts.node] = (
            facts.host if many[facts.host] == 1 else f"{facts.host} ({facts.address}, node {facts.node})"
        )
    return names


def nodes_to_leave_out(lines: Sequence[Line]) -> list[int]:
    """Nodes without which no line says no-go."""
    grave = [line for line in lines if line.verdict == NO_GO]
    return leave_out([line.node for line in grave if line.node is not None],
                     [line.link for line in grave if line.link is not None])  # fmt: skip


def write_report(found: Found, lines: Sequence[Line], run_dir: Path, *, hosts: Sequence[str] = ()) -> Path | None:
    """Leave ``preflight.json``, and ``hostfile.good`` where leaving some nodes out helps.

    Args:
        hosts: as in ``judge``.

    Returns:
        The hostfile; None: there is nothing to leave out, or nothing would be left.
    """
    out = nodes_to_leave_out(lines)
    called = {facts.node: facts.host for facts in found.nodes} | dict(enumerate(hosts))
    good = [called[facts.node] for facts in found.nodes if facts.node not in out]
    report = {"verdict": overall(lines), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
              "lines": [asdict(line) for line in lines], 
              "leave_out": [called.get(node, f"node {node}") for node in out], "found": asdict(found)}  # fmt: skip
    _write(run_dir / REPORT_FILE, json.dumps(report, indent=1))
    path = run_dir / HOSTFILE
    if not out or not good:
        path.unlink(missing_ok=True)  # an earlier preflight's would mislead
        return None
    _write(path, "".join(f"{host} slots={found.ranks_per_node}\n" for host in good))
    return path


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _absent(found: Found, names: dict[int, str]) -> Iterator[Line]:
    for node in found.missing:
        yield Line(what="node", verdict=NO_GO, where=names[node], found="it did not report", node=node,
                   reason="the run starts when all nodes are there",
                   remedy="see its log; can it be reached, and does moetrain start on it?")  # fmt: skip
    # both directions of one link are one fault
    silent: dict[Pair, str] = {}
    for each in found.unreachable:
        ends = (min(each.source, each.target), max(each.source, each.target))
        silent.setdefault(ends, f"{names[each.source]} cannot reach {each.reason}")
    culprits = at_fault(list(silent), tried=[(a.node, b.node) for a in found.nodes for b in found.nodes
                                             if a.node < b.node])  # fmt: skip
    for ends, told in silent.items():
        culprit = next((node for node in culprits if node in ends), None)
        yield Line(what="link", verdict=NO_GO, where=_between(ends, names), found=told, node=culprit, link=ends,
                   reason="gloo and NCCL would wait for it, and time out",
                   remedy="see the cable, the route and the firewall between them")  # fmt: skip


def _of_rule(rule: Rule, nodes: Sequence[NodeFacts], names: dict[int, str], *, needs: Needs) -> Iterator[Line]:
    held = [facts for facts in nodes if rule.applies(facts, needs)]
    faults = {facts.node: rule.check(facts, needs) for facts in held}
    for node, texts in faults.items():
        if texts:
            yield Line(what=rule.what, verdict=rule.severity, where=names[node], found="; ".join(texts),
                       reason=rule.reason, remedy=rule.remedy, node=node)  # fmt: skip
    unseen = [names[node] for node, texts in faults.items() if texts is None]
    if unseen:
        yield Line(what=rule.what, verdict=NOT_MEASURED, where=_some(unseen, of=len(held)), found="could not look")
    elif held and not any(faults.values()):
        yield Line(
            what=rule.what, verdict=GO, where=_some([names[facts.node] for facts in held], of=len(held)), found=""
        )


def _of_same(same: Same, nodes: Sequence[NodeFacts], names: dict[int, str]) -> Iterator[Line]:
    values = {facts.node: value for facts in nodes if (value := same.value(facts)) is not None}
    if not values:
        return  # no GPUs, no fabric: nothing that could differ
    many = Counter(values.values())
    usual: str = max(many, key=lambda value: many[value])  # of as many, the first node's
    for node, value in values.items():
        if value != usual:
            yield Line(what=same.what, verdict=same.severity, where=names[node], found=f"{value}; others: {usual}",
                       reason=same.reason, remedy=same.remedy, node=node)  # fmt: skip
    unseen = [names[facts.node] for facts in nodes if facts.node not in values]
    if unseen:
        yield Line(what=same.what, verdict=NOT_MEASURED, where=_some(unseen, of=len(nodes)), found="could not look")
    elif len(many) == 1:
        yield Line(what=same.what, verdict=GO, where=f"{len(nodes)} nodes", found=usual)


@dataclass(frozen=True)
class _Judge:
    """What was measured, held against the cluster's file or against the rest."""

    found: Found
    measured: Measured
    names: dict[int, str]
    stated: Stated | None
    dtype: str

    def lines(self) -> Iterator[Line]:
        yield from self._matmul()
        yield from self._collectives()
        yield from self._links()
        for node, counters in self.measured.grown.items():
            told = ", ".join(f"{name} by {count:,}" for name, count in counters.items())
            yield Line(what="fabric errors", verdict=NO_GO, where=self.names[int(node)], node=int(node),
                       found=f"grew while measuring: {told}", reason="the link is failing now",
                       remedy="change the cable, or leave the node out")  # fmt: skip

    @property
    def _cluster(self) -> Cluster | None:
        """With the processes of a node that there are."""
        if self.stated is None:
            return None
        return replace(self.stated.cluster, gpus_per_node=self.found.ranks_per_node)

    def _matmul(self) -> Iterator[Line]:
        values = self.measured.matmul
        wanted = self.stated and self.stated.cluster.peak_flops(self.dtype) * self.stated.efficiency
        what = "matrix products on a CPU" if self.measured.device == "cpu" else "matrix products"
        slow, speed = False, SPEEDS[what]
        for rank, value in enumerate(values):
            expected = wanted or median_of_others(values, rank)
            verdict = _verdict(what, value, expected)
            if verdict != GO:
                slow = True
                yield Line(what=what, verdict=verdict, where=self._rank_name(rank),
                           found=f"{_si(value)}FLOP/s, {self._share(value, expected)}",
                           node=rank // self.found.ranks_per_node,
                           reason=speed.reason, remedy=speed.remedy)  # fmt: skip
        if not slow:
            yield Line(what=what, verdict=GO, where=f"{len(values)} ranks",
                       found=f"{_si(min(values))}FLOP/s or more each")  # fmt: skip

    def _collectives(self) -> Iterator[Line]:
        cluster, reduced = self._cluster, self.measured.all_reduce
        if reduced is not None:
            size = len(reduced.ranks)
            expected = None
            if cluster:
                latency, per_byte = ring(size=size, stride=1, cluster=cluster)
                expected = latency + reduced.sent_bytes * per_byte * size / (size - 1)
            yield self._collective("all-reduce", reduced, expected)
        groups = self.measured.all_to_all
        for number, group in enumerate(groups):
            size = len(group.ranks)
            if cluster:
                expected = max(all_to_all_seconds(group.sent_bytes * size / (size - 1), size=size, cluster=cluster))
            else:
                expected = median_of_others([each.seconds for each in groups], number)
            yield self._collective("all-to-all of the experts", group, expected)

    def _collective(self, what: str, done: Collective, expected: float | None) -> Line:
        rate = done.sent_bytes / done.seconds
        verdict = _verdict(what, rate, None if expected is None else done.sent_bytes / expected)
        compared = "nothing to compare with" if expected is None else self._share(1 / done.seconds, 1 / expected)
        return Line(
            what=what,
            verdict=verdict,
            where=f"ranks {done.ranks[0]} to {done.ranks[-1]}",
            found=f"{_si(rate)}B/s from each rank, {done.seconds * 1e3:.3g} ms; {compared}",
            reason=SPEEDS[what].reason,
            remedy=SPEEDS[what].remedy,
        )

    def _links(self) -> Iterator[Line]:
        links, units = self.measured.links, self.measured.units
        if not links:
            return
        cluster = self._cluster
        lane = cluster and GB * REACHED * (
            cluster.network_gb_per_second if units == "nodes" else cluster.nvlink_gb_per_second
        )
        rates = [link.rate for link in links]
        expected = [lane * len(link.lanes) if lane else median_of_others(rates, n) for n, link in enumerate(links)]
        verdicts = [_verdict("link", rate, wanted) for rate, wanted in zip(rates, expected, strict=True)]
        ends: list[Pair] = [(link.a, link.b) for link in links]
        bad = [pair for pair, verdict in zip(ends, verdicts, strict=True) if verdict == NO_GO]
        culprits = at_fault(bad, tried=ends)
        unit_names = (
            self.names if units == "nodes" else {n: self._rank_name(n) for n in range(len(self.measured.matmul))}
        )
        for pair, rate, wanted, verdict in zip(ends, rates, expected, verdicts, strict=True):
            if verdict != GO:
                culprit = next((unit for unit in culprits if unit in pair), None)
                told = "" if culprit is None else f"; all links of {unit_names[culprit]} are slow"
                yield Line(what="link", verdict=verdict, where=_between(pair, unit_names),
                           found=f"{_si(rate)}B/s each way, {self._share(rate, wanted)}{told}",
                           node=culprit if units == "nodes" else None, link=pair if units == "nodes" else None,
                           reason=SPEEDS["link"].reason, remedy=SPEEDS["link"].remedy)  # fmt: skip
        if all(verdict == GO for verdict in verdicts):
            part = "" if self.measured.rounds == self.measured.rounds_of else (
                f" ({self.measured.rounds} of {self.measured.rounds_of} rounds)")  # fmt: skip
            alone = "; nothing to compare with" if expected[0] is None else ""
            yield Line(what="links", verdict=GO, where=f"{len(links)} between {units}{part}",
                       found=f"{_si(min(rates))}B/s or more each way{alone}")  # fmt: skip

    def _share(self, value: float, expected: float | None) -> str:
        if not expected:
            return "nothing to compare with"
        of = "the median of the others" if self.stated is None else f"what the plan counts on ({self.stated.name})"
        return f"{value / expected:.0%} of {of}"

    def _rank_name(self, rank: int) -> str:
        node, place = divmod(rank, self.found.ranks_per_node)
        return f"{self.names[node]}, {'process' if self.measured.device == 'cpu' else 'GPU'} {place}"


def _verdict(what: str, value: float, expected: float | None) -> str:
    speed = SPEEDS[what]
    if not expected or value >= speed.warn_below * expected:
        return GO
    return NO_GO if value < speed.no_go_below * expected else WARN


def _between(pair: Pair, names: dict[int, str]) -> str:
    return f"{names[pair[0]]} - {names[pair[1]]}"


def _some(names: Sequence[str], *, of: int) -> str:
    if len(names) == of > 1:
        return f"{of} nodes"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _si(value: float) -> str:
    """12.3 G, 456 M, …; a unit is to follow."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
