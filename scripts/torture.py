"""Kill a run at random moments, again and again, and hold what comes of it against a run that nothing disturbed.

    python scripts/torture.py --rounds 100

Each round starts (or resumes) a small run that saves after every step, waits for a random while, in every other round
also for the next save to begin, and sends SIGKILL to the launcher or to one of the ranks. After each kill every whole
checkpoint must have its digests, and the newest must be no older than before; in the end the loss of every step must be
equal, bit for bit, to that of the unbroken run. Exit code 1 when anything is lost or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moetrain.checkpoint import store
from moetrain.errors import CheckpointError
from moetrain.sources.text import expand, read_documents

STEPS = 60
LIMIT_SECONDS = 300
SETTINGS = [
    "data.text=corpus.jsonl", "data.held_out=0.2", "model.vocab_size=512", "model.context=32", "model.num_layers=2",
    "model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.moe.d_expert=32", "model.moe.num_experts=4",
    "batch.global_batch=8", f"schedule.steps={STEPS}", "schedule.warmup_steps=4", "checkpoint.every_steps=1",
    "checkpoint.keep=2", "evaluate.every_steps=null", "log.every_steps=1", "log.wandb=off",
]  # fmt: skip


def main() -> int:
    """Torture, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="kills")
    parser.add_argument("--processes", type=int, default=2, help="ranks of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine adds its own chance")
    parser.add_argument("--directory", type=Path, help="where to run; the default is temporary")
    given = parser.parse_args()
    place = given.directory or Path(tempfile.mkdtemp(prefix="moetrain-torture"))
    place.mkdir(parents=True, exist_ok=True)
    documents = read_documents(expand(["builtin:sotu"]), text_column="text")
    rows = [json.dumps({"text": next(documents)[:3000]}) for _ in range(30)]
    (place / "corpus.jsonl").write_text("\n".join(rows))
    train(place, "unbroken", processes=given.processes)
    chance, kills, mid_save, run_number = random.Random(given.seed), 0, 0, 1
    while kills < given.rounds:
        name = f"killed_{run_number}"
        was_killed = disturb(place, name, processes=given.processes, chance=chance)
        if not was_killed or kills + 1 == given.rounds:
            train(place, name, processes=given.processes)
            compare(place, name)
            run_number += 1
        kills += was_killed
        mid_save += was_killed and any((place / "runs" / name / "checkpoints").glob("step_????????.partial"))
        if was_killed:
            print(f"kill {kills}: {name} at step {newest(place, name)}", flush=True)
    print(f"{kills} kills, {mid_save} of them in the middle of a save: nothing lost, every loss bit-equal")
    if given.directory is None:
        shutil.rmtree(place)
    return 0


def start(place: Path, name: str, *, processes: int) -> subprocess.Popen[bytes]:
    """The run, in the background; its output goes to a file beside it."""
    line = [sys.executable, "-m", "moetrain.cli", "train", f"name={name}", *SETTINGS, f"launch.processes={processes}",
            f"batch.micro_batch={8 // processes}"]  # fmt: skip
    with (place / f"{name}.out").open("ab") as output:
        return subprocess.Popen(line, cwd=place, stdout=output, stderr=subprocess.STDOUT)


def train(place: Path, name: str, *, processes: int) -> None:
    """The run, to its end."""
    if start(place, name, processes=processes).wait(timeout=LIMIT_SECONDS):
        fail(f"{name} ended badly:\n{(place / f'{name}.out').read_text()[-3000:]}")


def disturb(place: Path, name: str, *, processes: int, chance: random.Random) -> bool:
    """Start the run and kill it; False: it was at its end before that."""
    before, since = newest(place, name), time.monotonic()
    process = start(place, name, processes=processes)
    while not (moved := newest(place, name) > before) and process.poll() is None:
        if time.monotonic() - since > LIMIT_SECONDS:
            fail(f"{name} makes no progress")
        time.sleep(0.005)
    if moved:
        time.sleep(chance.uniform(0.0, 1.0))
    if chance.random() < 0.5:
        wait_for_save(place / "runs" / name / "checkpoints")
        time.sleep(chance.uniform(0.0, 0.02))
    ranks = children(process.pid)
    victim = chance.choice([process.pid, *ranks])
    if process.poll() is not None:
        return False
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return False
    process.wait(timeout=LIMIT_SECONDS)
    for rank in ranks:
        while Path(f"/proc/{rank}").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text().split()[2]:
            time.sleep(0.01)
    if newest(place, name) < before:
        fail(f"{name} was at step {before} and is now at {newest(place, name)}")
    return True


def wait_for_save(root: Path) -> None:
    """Until a checkpoint is being written, or for two seconds."""
    until = time.monotonic() + 2
    while not any(root.glob("step_????????.partial")) and time.monotonic() < until:
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, of all its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(each) for each in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def newest(place: Path, name: str) -> int:
    """Step of the newest checkpoint, every file of which has its digest; 0: there is none."""
    whole = store.whole_checkpoints(place / "runs" / name / "checkpoints")
    for directory in reversed(whole):
        try:
            return store.verify(directory).step
        except CheckpointError as error:
            # pruned while it was read; one that is damaged stays
            if directory.exists():
                fail(f"a whole checkpoint is damaged: {error}")
    return 0


def compare(place: Path, name: str) -> None:
    """End unless the two runs have the same losses."""
    for what in (step_losses, final_loss):
        expected, found = what(place, "unbroken"), what(place, name)
        if found != expected:
            fail(f"{name} differs from the unbroken run: {found} instead of {expected}")
    if len(step_losses(place, name)) != STEPS:
        fail(f"{name} has {len(step_losses(place, name))} losses for {STEPS} steps")


def lines(place: Path, name: str) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def step_losses(place: Path, name: str) -> list[float]:
    """The loss of every step."""
    return [loss for line in lines(place, name) for loss in line.get("step_losses", [])]


def final_loss(place: Path, name: str) -> float:
    """The loss on all held-out text in the end."""
    return float(next(line["held_out_loss"] for line in lines(place, name) if line.get("final")))


def fail(message: str) -> None:
    """Say what is wrong, and end."""
    print(f"torture: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
