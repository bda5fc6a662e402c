"""The verb on saved checkpoints: list, show, examine, compare, rewrite and remove them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.archive import listing
from moetrain.archive.listing import in_bytes, table
from moetrain.checkpoint import store
from moetrain.cli.options import number
from moetrain.errors import CheckpointError, ConfigError

HELP = {
    "checkpoint": """usage: moetrain checkpoint ls | show | doctor | diff | reshard | prune …

  ls [RUN] [--digests] [--remote] [--json]
                                        the checkpoints of a run: step, size, age, layout, held-out loss, whole or not
                                        (by the sizes of the files; --digests reads them all); with --remote, what
                                        lies at the run's checkpoint.remote too
  show [WHICH] [--tensors] [--json]     what is in one: settings, parameters part by part, files; with --tensors,
                                        every tensor in it
  doctor [WHICH] [--no-certificate] [--json]
                                        is it whole? a line for each check; it reads every value, and takes the resume
                                        certificate again where the run's data are here (weights in memory once)
  diff WHICH WHICH [--json]             tensor by tensor, by global names, whatever layouts wrote the two
  reshard WHICH RUN [files=N] [moments=false]
                                        write it again into another run directory, as N files, or without the
                                        optimizer's moments (a third of the size; for evaluation only)
  prune RUN keep=N [every=STEPS] [best=N] [--dry-run]
                                        remove all but the newest N, those of each multiple of STEPS, and the N of
                                        the lowest held-out loss

RUN is a run directory (also written run_dir=RUN). WHICH is a run directory, for its newest checkpoint or with step=N
that one, or the directory of a checkpoint. Without either: runs/tiny.

No reshard is needed to go on with another number of processes, expert-parallel size or ZeRO stage: every layout reads
every checkpoint as it is.

exit codes: 0 whole, equal or done; 1 not whole (doctor) or different (diff); 2 something to mend, said in one message

examples:
  moetrain checkpoint ls run_dir=runs/tiny
  moetrain checkpoint show runs/tiny step=400
  moetrain checkpoint doctor runs/tiny/checkpoints/step_00000600
  moetrain checkpoint doctor run_dir=runs/tiny --json
  moetrain checkpoint diff runs/tiny runs/other
  moetrain checkpoint reshard runs/tiny runs/light moments=false
  moetrain checkpoint prune run_dir=runs/tiny keep=1 every=200 --dry-run
""",
}


_LEAST = {"step": 0, "best": 0}
"""Where 1 is not the least."""


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    run_dir: str = "runs/tiny"


@dataclass(frozen=True, kw_only=True)
class _OfOne:
    run_dir: str = "runs/tiny"
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class _OfTwo:
    """diff takes paths alone."""


@dataclass(frozen=True, kw_only=True)
class _Reshard:
    step: int | None = None
    files: int = 1
    moments: bool = True


@dataclass(frozen=True, kw_only=True)
class _Prune:
    run_dir: str | None = None
    keep: int | None = None
    every: int | None = None
    best: int = 0


class _Verb(NamedTuple):
    action: Callable[[Any, list[Path], set[str]], int]
    settings: type
    paths: range
    """How many it may be given."""
    flags: tuple[str, ...]


def checkpoint(words: Sequence[str]) -> int:
    """The verb `checkpoint`."""
    from moetrain.config.freeze import freeze_section

    if not words or words[0] not in _VERBS:
        said = f"checkpoint has no verb '{words[0]}'" if words else "checkpoint wants to know what to do"
        raise ConfigError([f"{said}: use {', '.join(_VERBS)}; see moetrain checkpoint --help"])
    verb = _VERBS[words[0]]
    given, paths, flags = _read(words[0], words[1:])
    if len(paths) not in verb.paths:
        least, most = verb.paths[0], verb.paths[-1]
        wanted = f"{least}" if least == most else f"{least} or {most}"
        raise ConfigError([f"{words[0]} takes {wanted} paths, but was given {len(paths)}: see moetrain checkpoint "
                           "--help"])  # fmt: skip
    if given and not fields(verb.settings):
        raise ConfigError([f"{words[0]} has no settings, but was given {', '.join(given)}"])
    wanted = freeze_section(verb.settings, given)
    problems = [f"{name} is {value}, but must be at least {_LEAST.get(name, 1)}" for name, value in vars(wanted).items()
                if type(value) is int and value < _LEAST.get(name, 1)]  # fmt: skip
    if paths and "run_dir" in given:
        problems.append(f"both {paths[0]} and run_dir={given['run_dir']} are given: name one")
    if problems:
        raise ConfigError(problems)
    return verb.action(wanted, paths, flags)


def _read(verb: str, words: Sequence[str]) -> tuple[dict[str, Any], list[Path], set[str]]:
    given: dict[str, Any] = {}
    paths, flags, problems = [], set(), []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            if word not in _VERBS[verb].flags:
                problems.append(f"{word} is not an option of {verb}: see moetrain checkpoint --help")
            flags.add(word)
        elif equals and key.isidentifier() and not Path(word).exists():
            truth = {"true": True, "false": False}
            given[key] = value if key == "run_dir" else truth.get(value.lower(), number(value))
        else:
            paths.append(Path(word))
    if problems:
        raise ConfigError(problems)
    return given, paths, flags


def _ls(wanted: _OfRun, paths: list[Path], flags: set[str]) -> int:
    run_dir = _run(paths[0] if paths else Path(wanted.run_dir))
    rows = [listing.entry(each, digests="--digests" in flags) for each in store.whole_checkpoints(_root(run_dir))]
    losses, warning = listing.held_out_losses(run_dir)
    left = store.leftovers(_root(run_dir))
    copies = _copies(run_dir) if "--remote" in flags else {}
    if "--json" in flags:
        entries = [asdict(row) | {"held_out_loss": losses.get(row.step)} for row in rows]
        more = {"remote": copies} if "--remote" in flags else {}
        return _print_json({"checkpoints": entries, "leftovers": [str(each) for each in left]} | more)
    print("\n".join(listing.lines(rows, losses)) if rows else f"{run_dir} has no checkpoint yet")
    for each in left:
        print(f"being written, or left by a crash: {each} ({in_bytes(listing.size_of(each))})")
    for where, copy in copies.items():
        state = "copied" if copy["whole"] else "being copied, or left by a crash"
        print(f"{state}: {where} ({in_bytes(copy['bytes'])})")
    if "--remote" in flags and not copies:
        print("checkpoint.remote has no copy yet")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _copies(run_dir: Path) -> dict[str, dict[str, Any]]:
    """URL -> bytes and whether it is whole by its manifest, of what lies at the remote place of a run."""
    from moetrain.checkpoint.remote import Remote
    from moetrain.config.freeze import read_run

    url = read_run(run_dir).checkpoint.remote
    if url is None:
        raise ConfigError([f"--remote asks for copies, but {run_dir} has no checkpoint.remote"])
    remote = Remote(url)
    return {f"{remote.url}/{store.step_directory(Path(), each.step)}":
            {"step": each.step, "bytes": sum(each.sizes.values()), "whole": each.has_manifest}
            for each in remote.steps()}  # fmt: skip


def _show(wanted: _OfOne, paths: list[Path], flags: set[str]) -> int:
    directory = _which(paths[0] if paths else Path(wanted.run_dir), step=wanted.step)
    manifest = store.read_manifest(directory)
    run = listing.settings(manifest)
    tensors = {}
    if "--tensors" in flags:
        from moetrain.archive.stored import Stored

        tensors = {name: {"elements": each.numel, "dtype": str(each.dtype).removeprefix("torch."), "bytes": each.nbytes,
                          "intervals": len(each.pieces)}
                   for name, each in Stored(directory).tensors.items()}  # fmt: skip
    if "--json" in flags:
        more = {"tensors": tensors} if tensors else {}
        return _print_json({"path": str(directory), "parameters": listing.parameters(run)} | asdict(manifest) | more)
    print("\n".join(listing.description(directory, manifest, run)))
    if tensors:
        print(f"\n{len(tensors):,} tensors")
        rows = [[f"{each['elements']:,}", str(each["dtype"]), f"{each['bytes']:,}", str(each["intervals"]), name]
                for name, each in tensors.items()]  # fmt: skip
        print("\n".join(table(["elements", "dtype", "bytes", "intervals", "name"], rows, left={1, 4})))
    return 0


def _doctor(wanted: _OfOne, paths: list[Path], flags: set[str]) -> int:
    directory = _which(paths[0] if paths else Path(wanted.run_dir), step=wanted.step)
    from moetrain.archive.doctor import Check, examine
    from moetrain.archive.expected import expected_tensors

    checks: list[Check] = []
    if "--json" not in flags:
        print(directory)
    retake = None if "--no-certificate" in flags else partial(_retaken, directory)
    for check in examine(directory, expect=expected_tensors, retake=retake):
        checks.append(check)
        if "--json" not in flags:
            word = {True: "pass", False: "FAIL", None: "  - "}[check.passed]
            reason = "not checked: " if check.passed is None else ""
            print(f"  {word}  {check.name:<17} {reason}{check.detail}", flush=True)
    failed = [check for check in checks if check.passed is False]
    if "--json" in flags:
        _print_json({"path": str(directory), "whole": not failed, "checks": [asdict(check) for check in checks]})
    else:
        print(f"NOT whole: {len(failed)} of {len(checks)} checks failed" if failed else "whole")
    return 1 if failed else 0


def _retaken(directory: Path, manifest: store.Manifest) -> list[str]:
    run = listing.settings(manifest)
    from moetrain.evaluation.witness import hold

    return hold(directory, manifest, run, run_dir=directory.parent.parent)


def _diff(wanted: _OfTwo, paths: list[Path], flags: set[str]) -> int:
    one, two = (_which(path, step=None) for path in paths)
    from moetrain.archive.stored import Stored
    from moetrain.archive.values import compare

    changed = listing.changed_settings(store.read_manifest(one), store.read_manifest(two))
    differences = list(compare(Stored(one), Stored(two)))
    equal = all(each.equal for each in differences)
    if "--json" in flags:
        _print_json({"first": str(one), "second": str(two), "equal": equal, "settings": changed,
                     "tensors": [asdict(each) for each in differences]})  # fmt: skip
        return 0 if equal else 1
    print(f"first   {one}\nsecond  {two}")
    for name, (before, after) in changed.items():
        print(f"  {name}: {before} -> {after}")
    if equal:
        print(f"all {len(differences):,} tensors are bit-equal")
        return 0
    print("\n".join(listing.difference_lines(differences)))
    return 1


def _reshard(wanted: _Reshard, paths: list[Path], flags: set[str]) -> int:
    directory, target = _which(paths[0], step=wanted.step), paths[1]
    from moetrain.archive.reshard import reshard
    from moetrain.config.freeze import RUN_FILE

    before = listing.size_of(directory)
    made = reshard(directory, _root(target), files=wanted.files, moments=wanted.moments)
    # what sampling and evaluation need beside the weights, where the checkpoint lies in a run
    for name in (RUN_FILE, "tokenizer.json"):
        source = directory.parent.parent / name
        if source.is_file() and not (target / name).exists():
            shutil.copyfile(source, target / name)
    print(f"{made}: {in_bytes(listing.size_of(made))}, {in_bytes(before)} before")
    return 0


def _prune(wanted: _Prune, paths: list[Path], flags: set[str]) -> int:
    if wanted.keep is None or (wanted.run_dir is None and not paths):
        raise ConfigError(["prune removes for good, so it wants to hear which run and how many stay, e.g. "
                           "run_dir=runs/tiny keep=2"])  # fmt: skip
    run_dir = _run(paths[0] if paths else Path(str(wanted.run_dir)))
    retention = store.Retention(keep=wanted.keep, every_steps=wanted.every, best=wanted.best)
    if "--dry-run" in flags:
        print(_told(run_dir, _going(run_dir, retention), word="would remove"))
        return 0
    from moetrain.launch.lock import RunLock

    with RunLock(run_dir):  # a run that is training may be writing what looks like a leftover
        going = _going(run_dir, retention)
        _one_stays_whole(run_dir, going)
        told = _told(run_dir, going, word="removed")
        store.prune(_root(run_dir), retention)
    print(told)
    return 0


def _going(run_dir: Path, retention: store.Retention) -> list[Path]:
    return [*store.superfluous(_root(run_dir), retention), *store.leftovers(_root(run_dir))]


def _told(run_dir: Path, going: list[Path], *, word: str) -> str:
    sizes = {each: listing.size_of(each) for each in going}
    stay = sum(each not in going for each in store.whole_checkpoints(_root(run_dir)))
    lines = [f"{word} {each} ({in_bytes(size)})" for each, size in sizes.items()]
    total = f"{word} {in_bytes(sum(sizes.values()))} in all; checkpoints that stay: {stay}"
    return "\n".join([*lines, total])


def _one_stays_whole(run_dir: Path, going: list[Path]) -> None:
    if not going:
        return
    told = ""
    for each in reversed([path for path in store.whole_checkpoints(_root(run_dir)) if path not in going]):
        try:
            store.verify(each)
            return
        except CheckpointError as error:
            told = told or str(error)
    raise CheckpointError(f"nothing was removed: no checkpoint that would stay is whole ({told or 'there is none'}): "
                          "keep more of them")  # fmt: skip


def _which(path: Path, *, step: int | None) -> Path:
    """The checkpoint that a path, or a run and a step, means; whether it is whole is not asked."""
    if _is_checkpoint(path):
        if step is not None:
            raise ConfigError([f"step={step} chooses among the checkpoints of a run, but {path} is one checkpoint"])
        return path
    root = _root(_run(path))
    found = {store.step_of(each): each for each in store.whole_checkpoints(root)}
    if not found:
        raise CheckpointError(f"{path} has no checkpoint yet: train it first, e.g. moetrain train")
    if step is not None and step not in found:
        raise CheckpointError(f"{path} has no checkpoint of step {step}: use {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def _is_checkpoint(path: Path) -> bool:
    # by any of its marks: the doctor is asked about those that have lost the others
    has_files = any((path / name).exists() for name in (store.MANIFEST, ".metadata"))
    return path.is_dir() and (path.name.startswith("step_") or has_files)


def _run(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path} {'is a file' if path.exists() else 'does not exist'}: name the directory of a "
                              "run, e.g. run_dir=runs/tiny, or of one of its checkpoints")  # fmt: skip
    if path.name == "checkpoints" and not (path / "checkpoints").is_dir():
        path = path.parent
    if not (path / "checkpoints").is_dir() and not (path / "run.yaml").is_file():
        raise CheckpointError(f"{path} is neither a run nor a checkpoint: it holds no run.yaml, checkpoints/ or "
                              "manifest.json")  # fmt: skip
    return path


def _root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _print_json(content: dict[str, Any]) -> int:
    print(json.dumps(listing.finite(content), indent=1, allow_nan=False))
    return 0


_VERBS = {
    "ls": _Verb(_ls, _OfRun, range(2), ("--digests", "--remote", "--json")),
    "show": _Verb(_show, _OfOne, range(2), ("--tensors", "--json")),
    "doctor": _Verb(_doctor, _OfOne, range(2), ("--no-certificate", "--json")),
    "diff": _Verb(_diff, _OfTwo, range(2, 3), ("--json",)),
    "reshard": _Verb(_reshard, _Reshard, range(2, 3), ()),
    "prune": _Verb(_prune, _Prune, range(2), ("--dry-run",)),
}
