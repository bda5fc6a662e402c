"""Held-out loss and the expert load on held-out tokens; what a resume certificate says of the model."""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.certificate import Certificate
from moetrain.data.loader import HeldOutBatch, HeldOutText, held_out_batches
from moetrain.data.packing import Packing
from moetrain.metrics.console import WorkBar
from moetrain.metrics.load import LoadMeter, LoadReport
from moetrain.model.gpt import GPT
from moetrain.model.objective import NOT_COUNTED, negative_log_likelihood
from moetrain.parallel.groups import Groups
from moetrain.train.setup import held_out_micro_batch

PROBE_SEQUENCES = 4


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text."""

    loss: float
    """Mean negative log likelihood, nats per token."""
    bits_per_byte: float
    """Loss in bits, spread over the bytes of the text: comparable across tokenizers."""
    tokens: int
    """Predicted tokens."""
    load: LoadReport | None
    """None for a dense model."""
    by_source: dict[str, float]
    """The loss on the text of each source; empty where there is one alone."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class HeldOutShare:
    """This rank's share of the held-out text of a source.

    Attributes:
        num_tokens: of all the held-out text of the source; what its loss weighs among the others'.
        num_bytes: the same in UTF-8.
    """

    name: str
    batches: Iterable[HeldOutBatch]
    num_tokens: int
    num_bytes: int


def evaluate(
    gpt: GPT,
    shares: Sequence[HeldOutShare],
    *,
    packing: Packing,
    meter: LoadMeter | None,
    device: torch.device,
    group: dist.ProcessGroup,
    on_batch: Callable[[], None],
) -> Evaluation:
    """Evaluate over all ranks; each brings the same number of batches, since an MoE block needs them all.

    Args:
        shares: one for each source.
        packing: what documents in one sequence see of each other.
        meter: counts the expert load; None for a dense model.
        on_batch: called after each batch, for a progress bar.
    """
    was_training = gpt.training
    gpt.eval()
    total = torch.stack(
        [_summed(gpt, each.batches, packing=packing, meter=meter, device=device, on_batch=on_batch) for each in shares]
    )
    gpt.train(was_training)
    dist.all_reduce(total, group=group)
    losses = [summed_nats / max(1.0, count) for summed_nats, count in total.tolist()]
    num_tokens, num_bytes = sum(each.num_tokens for each in shares), sum(each.num_bytes for each in shares)
    # by the size of their texts, however few sequences were read of each
    loss = sum(each.num_tokens / num_tokens * loss for each, loss in zip(shares, losses, strict=True))
    return Evaluation(
        loss=loss,
        bits_per_byte=loss / math.log(2) / (num_bytes / num_tokens),
        tokens=int(total[:, 1].sum().item()),
        load=meter.read(group) if meter is not None else None,
        by_source={each.name: loss for each, loss in zip(shares, losses, strict=True)} if len(shares) > 1 else {},
    )


def _summed(
    gpt: GPT,
    batches: Iterable[HeldOutBatch],
    *,
    packing: Packing,
    meter: LoadMeter | None,
    device: torch.device,
    on_batch: Callable[[], None],
) -> Tensor:
    """Nats and how many tokens they are of, [2]."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        # rows of padding keep the number of batches even between ranks; a pass with one row does that as well, and
        # what is not text must not be counted as load
        real = max(1, batch.rows)
        rows = HeldOutBatch(tokens=batch.tokens[:real], targets=batch.targets[:real], rows=batch.rows)
        given = held_out_micro_batch(rows, packing=packing, device=device)
        summed, blocks = negative_log_likelihood(gpt, given)
        total += torch.stack([summed.double(), (given.target_BS != NOT_COUNTED).sum().double()])
        if meter is not None and batch.rows:
            for layer, load in enumerate(block.load for block in blocks):
                meter.add(layer, load.count_E, dropped=load.dropped, entropy_sum=load.entropy,
                          tokens=given.token_BS.numel(), balance=load.balance, z=load.z)  # fmt: skip
        on_batch()
    return total


class Evaluator:
    """Evaluates a run's model on some or on all of its held-out text. Every rank takes part.

    Args:
        gpt: the model.
        held_out: the text of each source, by its name.
        sequence_length: tokens per sequence.
        micro_batch: sequences per forward pass on one rank.
        max_sequences: how many of each source are some; None: all.
        meter: counts the expert load; None for a dense model.
        packing: as ``evaluate``.
        groups: this rank's.
    """

    def __init__(
        self,
        gpt: GPT,
        held_out: dict[str, HeldOutText],
        *,
        sequence_length: int,
        micro_batch: int,
        packing: Packing,
        max_sequences: int | None,
        meter: LoadMeter | None,
        groups: Groups,
    ) -> None:
        self._gpt, self._held_out, self._meter, self._groups = gpt, held_out, meter, groups
        self._packing = packing
        self._length, self._micro_batch, self._max_sequences = sequence_length, micro_batch, max_sequences

    def some_of_it(self) -> Evaluation:
        """On ``max_sequences``, the same ones every time."""
        return self._evaluate(self._max_sequences, on_batch=lambda: None)

    def all_of_it(self) -> Evaluation:
        """On all held-out text, with a progress bar."""
        in_a_batch = self._length * self._micro_batch * self._groups.topology.world_size
        batches = sum(-(-(each.num_tokens - 1) // in_a_batch) for each in self._held_out.values())
        with WorkBar("evaluate", total=batches, unit="batches", shown=self._groups.topology.rank == 0) as bar:
            done = itertools.count(1)
            return self._evaluate(None, on_batch=lambda: bar.advance_to(next(done)))

    def _evaluate(self, max_sequences: int | None, *, on_batch: Callable[[], None]) -> Evaluation:
        shares = [
            HeldOutShare(
                name=name,
                batches=held_out_batches(
                    text,
                    sequence_length=self._length,
                    rank=self._groups.topology.rank,
                    world_size=self._groups.topology.world_size,
                    micro_batch=self._micro_batch,
                    max_sequences=max_sequences,
                ),
                num_tokens=text.num_tokens,
                num_bytes=text.num_bytes,
            )
            for name, text in self._held_out.items()
        ]
        return evaluate(
            self._gpt,
            shares,
            packing=self._packing,
            meter=self._meter,
            device=self._groups.device,
            group=self._groups.world,
            on_batch=on_batch,
        )


@torch.no_grad()
def certify(
    gpt: GPT,
    probe: Iterable[HeldOutBatch],
    *,
    packing: Packing,
    next_batch: str,
    next_seed: int,
    device: torch.device,
    layout: dict[str, Any],
) -> Certificate:
    """Take the resume certificate of the model as it is. Every rank calls it, with the same probe.

    As every rank sees all of the probe, what it finds there depends on no layout, but for rounding, and on the weights
    of the ranks it exchanges tokens with.

    Args:
        probe: held-out text that never changes.
        next_batch: fingerprint of the batch of the next step.
        next_seed: seed of the first rank's generator before the next step.
        layout: what the sums inside the model may depend on, beside the machine.
    """
    was_training = gpt.training
    gpt.eval()
    total, counts = torch.zeros(2, dtype=torch.float64, device=device), None
    for batch in probe:
        given = held_out_micro_batch(batch, packing=packing, device=device)
        summed, blocks = negative_log_likelihood(gpt, given)
        total += torch.stack([summed.double(), (given.target_BS != NOT_COUNTED).sum().double()])
        if blocks:
            now = torch.stack([block.load.count_E for block in blocks])
            counts = now if counts is None else counts + now
    gpt.train(was_training)
    summed_nats, count = total.tolist()
    # a generator of its own: on all devices the loop seeds, the state follows from the seed as it does in this one
    state = torch.Generator().manual_seed(next_seed).get_state()
    return Certificate(
        next_batch=next_batch,
        generator=hashlib.sha256(state.numpy().tobytes()).hexdigest(),
        probe_loss=summed_nats / max(1.0, count),
        probe_counts=[] if counts is None else counts.tolist(),
        taken_on=layout
        | {
            "device": device.type,
            "processor": _processor(device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        },
    )


def probe_batches(held_out: Iterable[HeldOutText], *, sequence_length: int) -> Iterator[HeldOutBatch]:
    """The probe of a run: a few held-out sequences, one to a batch, so that they fit wherever training does.

    Args:
        held_out: the text of each source; they share the sequences, one at least for each of the first ones.
    """
    texts = list(held_out)[:PROBE_SEQUENCES]
    return itertools.chain.from_iterable(
        held_out_batches(
            text, sequence_length=sequence_length, rank=0, world_size=1, micro_batch=1,
            max_sequences=PROBE_SEQUENCES // len(texts),
        )
        for text in texts
    )  # fmt: skip


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
