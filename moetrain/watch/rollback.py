"""Going back to a checkpoint and leaving batches out, so that every later start leaves out the same.

Which ones is written to RUN_DIR/left_out.json before anything goes back, and into every checkpoint. A checkpoint that
was trained on one of them is none of this run's any more (``LeftOut.allows``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moetrain.checkpoint import store
from moetrain.checkpoint.remote import Remote
from moetrain.errors import CheckpointError, TrainingError
from moetrain.watch.incidents import Tell
from moetrain.watch.progress import Progress

LEFT_OUT = "left_out.json"
_REMEMBERED_STEPS = 1000


class LeftOut:
    """The batches that a run leaves out, by the step they belong to, and when it went back.

    Args:
        content: as ``content`` gives it; empty for a new run.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        content = content or {}
        self._steps = {step for first, last in content.get("batches", []) for step in range(first, last + 1)}
        self._rolled_back_at: list[int] = list(content.get("rolled_back_at", []))

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def content(self) -> dict[str, Any]:
        """As plain data: ranges, both ends included, and the steps from which the run went back."""
        ranges: list[list[int]] = []
        for step in sorted(self._steps):
            if ranges and ranges[-1][1] == step - 1:
                ranges[-1][1] = step
            else:
                ranges.append([step, step])
        return {"batches": ranges, "rolled_back_at": self._rolled_back_at}

    def add(self, first: int, last: int, *, at: int) -> None:
        """Leave out these, both ends included, from now on."""
        self._steps |= set(range(first, last + 1))
        self._rolled_back_at.append(at)

    def join(self, other: dict[str, Any]) -> None:
        """Leave out also what a checkpoint says, which may come from another directory of the run."""
        told = LeftOut(other)
        self._steps |= told._steps
        self._rolled_back_at = sorted({*self._rolled_back_at, *told._rolled_back_at})

    def allows(self, manifest: store.Manifest) -> bool:
        """Whether the checkpoint has left out all that is to be left out before its step."""
        done = LeftOut(manifest.watch.get("left_out"))
        return all(step in done for step in self._steps if step < manifest.step)

    def hold(self, *, at: int, most: int, what: str) -> None:
        """Refuse to go back once more.

        Raises:
            TrainingError: the run has gone back often enough in the last thousand steps.
        """
        lately = [step for step in self._rolled_back_at if step > at - _REMEMBERED_STEPS]
        if len(lately) >= most:
            raise TrainingError(
                f"{what} at step {at:,}, and the run has gone back to a checkpoint {len(lately)} times in the last "
                f"{_REMEMBERED_STEPS:,} steps (watch.max_rollbacks): lower optim.lr, lengthen schedule.warmup_steps, "
                "set optim.clip or look at the data of these steps; the same command goes on from the newest checkpoint"
            )

    def write(self, run_dir: Path) -> None:
        """Write the file of the run, whole or not at all."""
        partial = run_dir / f"{LEFT_OUT}.partial"
        with partial.open("w", encoding="ascii") as file:
            json.dump(self.content(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, run_dir / LEFT_OUT)

    @staticmethod
    def read(run_dir: Path) -> LeftOut:
        """What the run leaves out; nothing where there is no file.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = run_dir / LEFT_OUT
        if not path.is_file():
            return LeftOut()
        try:
            return LeftOut(json.loads(path.read_bytes()))
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no list of left-out batches ({error}): the newest checkpoint's manifest.json has one under "
                "'watch'; write it there, or remove the file to leave out none"
            ) from None


@dataclass(frozen=True)
class RollBack:
    """Back to a checkpoint from before some batches, which are then left out."""

    first: int
    last: int
    what: str
    """What happened."""
    must: bool
    """Whether the run cannot go on otherwise."""


class State(Protocol):
    """How far a run is."""

    step: int
    tokens: int
    updates: int


class GoBack:
    """Brings a run back to a checkpoint. Every rank calls it at the same step.

    Args:
        run_dir: of the run.
        is_first: whether this is the rank that writes.
        left_out: grows.
        settle: waits for the save in flight; a failure that ends the run is raised by it.
        find: the newest whole checkpoint that may be taken, the same on every rank.
        load: fills the engine from it.
        forget: called when all is loaded, with the state as it is then.
        remote: where copies of the checkpoints are; None: nowhere.
        tell: writes an incident down.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        progress: Progress,
        is_first: bool,
        left_out: LeftOut,
        settle: Callable[[], None],
        find: Callable[[Callable[[store.Manifest], bool]], tuple[Path, store.Manifest] | None],
        load: Callable[[Path, store.Manifest], None],
        forget: Callable[[Any], None],
        remote: Remote | None,
        tell: Tell,
    ) -> None:
        self._progress = progress
        self._run_dir, self._is_first, self._left_out, self._settle = run_dir, is_first, left_out, settle
        self._find, self._load, self._forget, self._remote, self._tell = find, load, forget, remote, tell

    def __call__(self, state: State, wanted: RollBack) -> bool:
        """Go back; False, with nothing changed, where there is no checkpoint to go back to.

        Raises:
            TrainingError: there is none, and the run cannot go on as it is.
        """
        with self._progress.during("going back"):
            return self._go_back(state, wanted)

    def _go_back(self, state: State, wanted: RollBack) -> bool:
        self._settle()
        found = self._find(lambda each: each.step <= wanted.first and self._left_out.allows(each))
        at, batches = state.step, _in_words(wanted.first, wanted.last)
        if found is None:
            done = f"there is no checkpoint of step {wanted.first:,} or before to go back to"
            self._tell("spike" if not wanted.must else "gave_up", step=at, rank=None, what=wanted.what, done=done)
            if wanted.must:
                raise TrainingError(
                    f"{wanted.what}, up to step {at:,}, and {done}: lower optim.lr, lengthen schedule.warmup_steps or "
                    "set optim.clip"
                )
            return False
        directory, manifest = found
        self._left_out.add(wanted.first, wanted.last, at=at)
        if self._is_first:
            # first the list, then the rest: whatever is cut short here, the next start leaves out these batches
            self._left_out.write(self._run_dir)
            self._remove_after(directory.parent, manifest.step)
        self._load(directory, manifest)
        state.step, state.tokens, state.updates = manifest.step, manifest.tokens, updates_of(manifest)
        self._forget(state)
        done = f"back to the checkpoint of step {manifest.step:,}; the batches of steps {batches} are left out"
        self._tell("roll_back", step=at, rank=None, what=wanted.what, done=done)
        return True

    def _remove_after(self, root: Path, step: int) -> None:
        """Take away later checkpoints, here and at the remote place: what they trained on is left out now."""
        store.remove(path for path in store.whole_checkpoints(root) if store.step_of(path) > step)
        if self._remote is None:
            return
        try:
            for each in self._remote.steps():
                if each.step > step:
                    self._remote.clear(each.step)
        except CheckpointError as error:
            self._tell("roll_back", step=step, rank=None, what=f"copies of later checkpoints are still there: {error}",
                       done="a new machine must not go on from them")  # fmt: skip


def updates_of(manifest: store.Manifest) -> int:
    """Steps of the optimizer that a checkpoint has behind it."""
    return manifest.step if manifest.updates is None else manifest.updates


def _in_words(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
