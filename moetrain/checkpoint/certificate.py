"""The resume certificate: what a run that goes on from a checkpoint must find again. No torch.

Digests show that the files are those that were written. The certificate shows that what was loaded from them trains on
as the run would have: the same batch next, the same random numbers, and a model that says the same of the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""Relative. Another layout adds in another order: some 1e-6 in fp32 and 1e-3 in bf16 on a mean over tokens, and more
where that turns a near-tie between two experts the other way."""
COUNT_TOLERANCE = {"fp32": 0.01, "bf16": 0.05}
"""Share of a layer's token copies that may go to other experts. A choice flips where the scores of the last expert
chosen and the first one left out are closer than the rounding of the router's input: 1e-6 of the scores' spread in
fp32, 4e-3 in bf16, and so about that share of the tokens in each layer; a flip changes what later layers see."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Taken when a checkpoint is saved, and again when it is loaded."""

    next_batch: str
    """sha256 of the token ids of the next step, over the whole global batch: no layout shows in it."""
    generator: str
    """sha256 of the state of the first rank's random generator, seeded for the next step."""
    probe_loss: float
    """Mean loss, in evaluation mode, of a few held-out sequences that never change; nats per token."""
    probe_counts: list[list[int]]
    """[L][E]: token copies of these sequences that the router sent to each expert; empty for a dense model."""
    taken_on: dict[str, Any]
    """Layout, device and versions: where they are the same, so is every bit of the two values above."""


def differences(saved: Certificate, now: Certificate, *, exact: bool) -> list[str]:
    """What of a certificate does not hold: which, both values, and what it may mean.

    Args:
        saved: from the checkpoint.
        now: of what was loaded from it.
        exact: the probe must agree bit for bit, else to the tolerances above.
    """
    found = []
    if saved.next_batch != now.next_batch:
        found.append(
            f"the next batch has the digest {now.next_batch[:16]}, but had {saved.next_batch[:16]}: the data, their "
            "order, the seed or the global batch is another"
        )
    if saved.generator != now.generator:
        found.append(
            f"the random generator of the next step has the digest {now.generator[:16]}, but had "
            f"{saved.generator[:16]}: the seed is another, or this version of torch draws other numbers"
        )
    return found + probe_differences(saved, now, exact=exact)


def probe_differences(saved: Certificate, now: Certificate, *, exact: bool) -> list[str]:
    """The same for what the model makes of the probe alone; every rank can tell that of its own weights."""
    found = []
    dtypes = {str(each.taken_on.get("dtype", "fp32")) for each in (saved, now)}
    loosest = "bf16" if "bf16" in dtypes else "fp32"
    allowed = 0.0 if exact else LOSS_TOLERANCE[loosest] * abs(saved.probe_loss)
    # written so that NaN is a difference
    if not abs(now.probe_loss - saved.probe_loss) <= allowed:
        found.append(
            f"the probe loss is {now.probe_loss!r}, but was {saved.probe_loss!r}"
            f"{'' if exact else f' (within {allowed:.1g} it would pass)'}: weights are not those that were saved, or "
            "the model computes something else"
        )
    moved = _moved_share(saved.probe_counts, now.probe_counts)
    worst = max(range(len(moved)), key=moved.__getitem__, default=0)
    if moved and moved[worst] > (0.0 if exact else COUNT_TOLERANCE[loosest]):
        found.append(
            f"in MoE layer {worst} {moved[worst]:.1%} of the probe's token copies go to other experts, "
            f"{_shown(now.probe_counts, worst)} instead of {_shown(saved.probe_counts, worst)}: a router or the "
            "experts before it are not those that were saved"
        )
    return found


def _moved_share(before: list[list[int]], after: list[list[int]]) -> list[float]:
    """[L]: copies that changed their expert / copies; 1 where the layers or experts are not even as many."""
    if [len(layer) for layer in before] != [len(layer) for layer in after]:
        return [1.0] * max(len(before), len(after))
    return [
        sum(abs(a - b) for a, b in zip(old, new, strict=True)) / 2 / max(1, *(sum(old), sum(new)))
        for old, new in zip(before, after, strict=True)
    ]


def _shown(counts: list[list[int]], layer: int) -> str:
    own = counts[layer] if layer < len(counts) else []
    return f"[{', '.join(map(str, own[:8]))}{', …' if len(own) > 8 else ''}]"
