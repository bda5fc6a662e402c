"""From which checkpoint a run goes on, the same one on every rank, and whether it is one of this run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint import store
from moetrain.checkpoint.certificate import Certificate, differences, probe_differences
from moetrain.checkpoint.state import Fragment, load, newest_first, newest_whole, passed_over, read_index
from moetrain.config.schema import RunConfig
from moetrain.errors import CheckpointError

Found = tuple[Path, store.Manifest]


def find(
    root: Path,
    *,
    run: RunConfig,
    data: dict[str, str],
    group: dist.ProcessGroup,
    warn: Callable[[str], None],
    accept: Callable[[store.Manifest], bool] = lambda manifest: True,
) -> Found | None:
    """The newest whole checkpoint of the run; None: there is none. Every rank calls it, and digests its share.

    Args:
        data: digests of the token files and the tokenizer.
        group: all ranks, on a backend that moves host memory.
        warn: names the damaged ones that are passed over, on the first rank.
        accept: which of them may be taken.

    Raises:
        CheckpointError: on every rank; the newest one is of another run or another version, or a rank does not see it.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    candidates = newest_first(root, warn=warn, accept=accept)
    while (found := from_first(lambda: next(candidates, None), group=group)) is not None:
        directory, manifest = found
        damage = _damage(directory, store.share_of(manifest.files, rank=rank, world_size=world_size))
        told: list[tuple[bool, CheckpointError | None]] = [(False, None)] * world_size
        dist.all_gather_object(told, (directory.is_dir(), damage), group=group)
        for other, (is_seen, _) in enumerate(told):
            if not is_seen:  # else a disk that is not mounted would make a run begin anew
                raise CheckpointError(
                    f"rank {other} does not find {directory}, which the first rank reads: run_dir must be a directory "
                    "that all nodes share"
                )
        damaged = [each for _, each in told if each is not None]
        if not damaged:
            if foreign := store.foreign(manifest, run=run, data=data):
                raise CheckpointError(
                    f"{directory} {foreign}; set it back, or choose another name=… or run_dir=… for another run"
                )
            return directory, manifest
        if rank == 0:
            warn(passed_over(directory, damaged[0]))
    return None


def _damage(directory: Path, files: list[store.FileDigest]) -> CheckpointError | None:
    try:
        store.check_files(directory, files)
    except CheckpointError as error:
        return error
    return None


def from_first(read: Callable[[], Any], *, group: dist.ProcessGroup) -> Any:
    """What the first rank reads, on every rank: each by itself might come to another answer.

    Raises:
        CheckpointError: on every rank; reading raised it there.
    """
    answer: list[Any] = [None, ""]
    if dist.get_rank(group) == 0:
        try:
            answer[0] = read()
        except CheckpointError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1]:
        raise CheckpointError(answer[1])
    return answer[0]


def hold_certificate(
    found: Found, now: Certificate, *, group: dist.ProcessGroup, trust: bool, warn: Callable[[str], None]
) -> None:
    """Hold what was loaded against the certificate of its checkpoint. Every rank calls it.

    The first rank compares everything, bit for bit where layout and machine are the ones of the save and compute on
    CPU; the others compare what their own weights make of the probe, to the tolerances of ``certificate``.

    Args:
        now: this rank's.
        trust: warn, and go on.
        warn: called on the first rank.

    Raises:
        CheckpointError: on every rank, when something differs on one, with every difference.
    """
    directory, manifest = found
    saved, rank = manifest.certificate, dist.get_rank(group)
    if saved is None:
        if rank == 0:
            warn(f"{directory.name} has no resume certificate: what was loaded is held against its digests alone")
        return
    if rank == 0:
        own = differences(saved, now, exact=saved.taken_on == now.taken_on and now.taken_on.get("device") == "cpu")
    else:
        own = probe_differences(saved, now, exact=False)
    told: list[list[str]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(told, own, group=group)
    first, of_others = told[0], [f"rank {i}: {each}" for i, rest in enumerate(told) for each in rest if i]
    # what the first rank sees, all may see; the others are named only where it sees nothing
    causes = first or of_others
    if not causes:
        return
    message = f"{directory} does not resume as it was saved: {'; '.join(causes)}"
    if not trust:
        raise CheckpointError(f"{message}; if you know why and want to go on all the same, set resume.trust=true")
    if rank == 0:
        warn(f"{message}; going on all the same (resume.trust)")


def take_weights(
    weights: Path, fragments: Iterable[Fragment], *, run: RunConfig, tokenizer: str, group: dist.ProcessGroup
) -> Path:
    """Fill the weights of a run that begins from those of another one; its moments stay as they are.

    What routers keep beside their weights is taken too, where the other has it.

    Args:
        weights: directory of a run or of a checkpoint (``init.weights``).
        fragments: this rank's.
        tokenizer: fingerprint of this run's.
        group: all ranks, on a backend that moves host memory.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointError: on every rank; there is none, it is another model's, or another tokenizer's.
    """
    directory: Path = from_first(lambda: _start(weights, run=run, tokenizer=tokenizer), group=group)
    there = read_index(directory).state_dict_metadata
    wanted = [each for each in fragments
              if each.name.endswith("/fp32") or (each.name.endswith("/state") and each.name in there)]  # fmt: skip
    load(directory, wanted, group=group)
    return directory


def _start(weights: Path, *, run: RunConfig, tokenizer: str) -> Path:
    told: list[str] = []
    if (weights / store.MANIFEST).is_file():
        found: Found | None = (weights, store.verify(weights))
    else:
        found = newest_whole(weights / "checkpoints", warn=told.append)
    if found is None:
        raise CheckpointError(
            f"init.weights is {weights}, but has no whole checkpoint{''.join(f'; {t}' for t in told)}"
        )
    directory, manifest = found
    if problems := store.not_a_start(manifest, run=run, tokenizer=tokenizer):
        raise CheckpointError(f"the run cannot begin from {directory}: {'; '.join(problems)}")
    return directory
