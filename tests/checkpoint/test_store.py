"""Checkpoints as directories: whole or not there, whatever moment the machine stops at."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.checkpoint import store
from moetrain.checkpoint.certificate import Certificate
from moetrain.checkpoint.store import MANIFEST, Manifest, Retention, commit, digest_file, open_partial, prune, verify
from moetrain.errors import CheckpointError

FILES = ("weights_0", "weights_1")


def save(root: Path, step: int, *, content: str = "", held_out_loss: float | None = None) -> Path:
    partial = open_partial(root, step)
    for name in FILES:
        (partial / name).write_text(f"{name} of step {step} {content}")
    files = [digest_file(partial / name) for name in FILES]
    return commit(root, replace(manifest(step, files=files), held_out_loss=held_out_loss))


def manifest(step: int, *, files: list[store.FileDigest]) -> Manifest:
    return Manifest(
        step=step, tokens=10 * step, seed=1, world_size=2, expert_parallel=2, run={"a": [1]}, data={}, files=files
    )


def newest(root: Path) -> tuple[int, str] | None:
    """Step and content of the newest checkpoint that verifies."""
    for directory in reversed(store.whole_checkpoints(root)):
        try:
            return verify(directory).step, (directory / FILES[0]).read_text()
        except CheckpointError:
            continue
    return None


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No test can tell whether the disk has really written: that it was asked to is held by a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_saved_checkpoint_verifies_and_says_what_was_put_in(tmp_path):
    directory = save(tmp_path, 100)
    assert directory == tmp_path / "step_00000100"
    sizes = {name: len(f"{name} of step 100 ") for name in FILES}
    sums = {name: xxhash.xxh128(f"{name} of step 100 ".encode()).hexdigest() for name in FILES}
    files = [store.FileDigest(name=name, size=sizes[name], xxh128=sums[name]) for name in FILES]
    assert verify(directory) == manifest(100, files=files)
    assert names(tmp_path) == ["step_00000100"]
    assert names(directory) == [MANIFEST, *FILES]


def test_a_file_longer_than_a_block_has_the_digest_of_all_of_it(tmp_path):
    content = os.urandom((3 << 20) + 7)
    (tmp_path / "a").write_bytes(content)
    assert digest_file(tmp_path / "a").xxh128 == xxhash.xxh128(content).hexdigest()


def test_everything_is_on_the_disk_before_the_name_says_so(tmp_path, monkeypatch):
    events: list[str] = []

    def sync(file: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{file}')).relative_to(tmp_path)}")

    rename = os.rename
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    save(tmp_path, 1)
    before = events[: events.index("rename")]
    partial = "step_00000001.partial"
    assert before == [*(f"sync {partial}/{name}" for name in (*FILES, MANIFEST)), f"sync {partial}"]
    assert events[len(before) :] == ["rename", "sync ."]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (5, 100_000_000, 99_999_999, 70):
        save(tmp_path, step)
    assert [verify(path).step for path in store.whole_checkpoints(tmp_path)] == [5, 70, 99_999_999, 100_000_000]


def test_no_directory_has_no_checkpoints(tmp_path):
    assert store.whole_checkpoints(tmp_path / "none") == []


def test_what_is_being_written_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (open_partial(tmp_path, 2) / MANIFEST).write_text("{}")
    (tmp_path / "step_00000003").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert [path.name for path in store.whole_checkpoints(tmp_path)] == ["step_00000001"]


def test_what_a_crash_left_is_not_part_of_the_next_attempt(tmp_path):
    (open_partial(tmp_path, 1) / "old").write_text("x")
    assert list(open_partial(tmp_path, 1).iterdir()) == []


def test_the_same_step_saved_again_takes_the_place_of_the_first(tmp_path):
    save(tmp_path, 1, content="first")
    save(tmp_path, 1, content="second")
    assert newest(tmp_path) == (1, "weights_0 of step 1 second")
    prune(tmp_path, Retention(keep=1))
    assert names(tmp_path) == ["step_00000001"]


def change_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = json.loads((directory / MANIFEST).read_text())
        change(content)
        (directory / MANIFEST).write_text(json.dumps(content))

    return damage


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / FILES[1]).read_bytes())
    content[3] ^= 4
    (directory / FILES[1]).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "file missing": (lambda d: (d / FILES[1]).unlink(), "weights_1 is missing"),
    "file is a directory": (lambda d: ((d / FILES[1]).unlink(), (d / FILES[1]).mkdir()), "weights_1 is missing"),
    "truncated": (lambda d: os.truncate(d / FILES[1], 5), "weights_1 has 5 bytes, but must have 20"),
    "longer": (lambda d: os.truncate(d / FILES[1], 21), "weights_1 has 21 bytes, but must have 20"),
    "one bit flipped": (flip_a_bit, "weights_1 has changed: its xxh128 is not the one in manifest.json"),
    "manifest missing": (lambda d: (d / MANIFEST).unlink(), "manifest.json cannot be read: FileNotFoundError"),
    "manifest empty": (lambda d: (d / MANIFEST).write_text(""), "manifest.json cannot be read: JSONDecodeError"),
    "manifest truncated": (lambda d: os.truncate(d / MANIFEST, 30), "manifest.json cannot be read: JSONDecodeError"),
    "manifest binary": (lambda d: (d / MANIFEST).write_bytes(b"\xff\x00"), "manifest.json cannot be read: Unicode"),
    "manifest a list": (lambda d: (d / MANIFEST).write_text("[1]"), "manifest.json cannot be read: TypeError"),
    "manifest a text": (lambda d: (d / MANIFEST).write_text('"a"'), "manifest.json cannot be read: ValueError"),
    "manifest null": (lambda d: (d / MANIFEST).write_text("null"), "manifest.json cannot be read: TypeError"),
    "manifest without files": (change_manifest(lambda c: c.pop("files")), "manifest.json cannot be read: KeyError"),
    "manifest without tokens": (change_manifest(lambda c: c.pop("tokens")), "manifest.json cannot be read: TypeError"),
    "other format": (
        change_manifest(lambda c: c.update(format=1, news=1)),
        "manifest.json has format 1, but this version of moetrain reads format 2: use the version that wrote it",
    ),
    "other step": (change_manifest(lambda c: c.update(step=3)), "manifest.json is of step 3, not of the directory's"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_counts(tmp_path, damage, message):
    save(tmp_path, 1)
    directory = save(tmp_path, 2)
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        verify(directory)
    assert str(caught.value).startswith(f"{directory}/{message}")
    assert newest(tmp_path) == (1, "weights_0 of step 1 ")


def test_a_file_that_cannot_be_read_is_damage_too(tmp_path, monkeypatch):
    directory = save(tmp_path, 1)

    def broken(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "_xxh128", broken)
    with pytest.raises(CheckpointError, match=r"weights_0 cannot be read: \[Errno 5\] Input/output error"):
        verify(directory)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(tmp_path, keep, left):
    for step in range(1, 6):
        save(tmp_path, step)
    open_partial(tmp_path, 6)
    prune(tmp_path, Retention(keep=keep))
    assert names(tmp_path) == [f"step_{step:08d}" for step in left]
    assert [verify(path).step for path in store.whole_checkpoints(tmp_path)] == left


LOSSES = {1: 3.0, 2: 2.0, 3: None, 4: 1.0, 5: float("nan"), 6: 2.0, 7: 9.0}


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(keep=1, every_steps=3), [3, 6, 7]),
        (Retention(keep=2, every_steps=7), [6, 7]),
        (Retention(keep=1, best=1), [4, 7]),
        (Retention(keep=1, best=2), [4, 6, 7]),
        (Retention(keep=1, best=3), [2, 4, 6, 7]),
        (Retention(keep=1, best=99), [1, 2, 4, 6, 7]),
        (Retention(keep=2, every_steps=5, best=1), [4, 5, 6, 7]),
    ],
    ids=str,
)
def test_what_any_of_the_three_rules_asks_for_stays(tmp_path, retention, left):
    """The newest; every so many steps; the best by held-out loss, of two alike the newer."""
    for step, loss in LOSSES.items():
        save(tmp_path, step, held_out_loss=loss)
    prune(tmp_path, retention)
    assert names(tmp_path) == [f"step_{step:08d}" for step in left]
    prune(tmp_path, retention)
    assert len(names(tmp_path)) == len(left), "what stays, stays"


def test_the_best_one_stays_while_others_come_and_one_whose_manifest_is_gone_is_no_best(tmp_path):
    for step in range(1, 30):
        save(tmp_path, step, held_out_loss=abs(step - 7.2))
        prune(tmp_path, Retention(keep=2, best=1))
    assert names(tmp_path) == [f"step_{step:08d}" for step in (7, 28, 29)]
    (tmp_path / "step_00000007" / MANIFEST).unlink()
    prune(tmp_path, Retention(keep=2, best=1))
    assert names(tmp_path) == [f"step_{step:08d}" for step in (28, 29)]


def test_a_certificate_is_read_as_it_was_written(tmp_path):
    certificate = Certificate(next_batch="a", generator="b", probe_loss=1 / 3, probe_counts=[[1, 2], [3, 0]],
                              taken_on={"world_size": 2, "dtype": "bf16"})  # fmt: skip
    open_partial(tmp_path, 1)
    directory = commit(tmp_path, replace(manifest(1, files=[]), certificate=certificate, held_out_loss=2.5))
    assert store.read_manifest(directory).certificate == certificate
    assert store.read_manifest(directory).held_out_loss == 2.5
    content = json.loads((directory / MANIFEST).read_text())
    content["certificate"]["probe"] = 1
    (directory / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.read_manifest(directory)


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "notes.partial").mkdir()
    (tmp_path / "step_by_step.txt").write_text("x")
    save(tmp_path, 1)
    prune(tmp_path, Retention(keep=1))
    assert names(tmp_path) == ["notes.partial", "step_00000001", "step_by_step.txt"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_does_not_push_out_what_is_saved_after_it(tmp_path, keep):
    """Resumed at 1, because 9 is damaged: 2, just saved, is the newest of this run, and must stay."""
    save(tmp_path, 1)
    flip_a_bit(save(tmp_path, 9))
    for step in (1, 9):
        os.utime(store.step_directory(tmp_path, step) / MANIFEST, (step, step))
    save(tmp_path, 2)
    prune(tmp_path, Retention(keep=keep))
    assert newest(tmp_path) == (2, "weights_0 of step 2 ")
    assert len(store.whole_checkpoints(tmp_path)) == keep + 1


class Crash(BaseException):
    """The machine stops here."""


@contextmanager
def crash_at(call: int) -> Iterator[None]:
    """Stop before the call'th change to the disk; a directory being removed is left half there."""
    done = 0

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if function is shutil_rmtree and not Path(args[0]).exists():
                return None
            done += 1
            if done > call:
                if function is shutil_rmtree:
                    for path in sorted(Path(args[0]).iterdir())[:1]:
                        path.unlink()
                raise Crash
            return function(*args, **kwargs)

        return run

    shutil_rmtree = shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", guarded(shutil.rmtree))
        for name in ("rename", "mkdir"):
            patch.setattr(os, name, guarded(getattr(os, name)))
        patch.setattr(os, "fsync", guarded(lambda _: None))
        patch.setattr(store.json, "dump", guarded(json.dump))
        yield


def save_and_prune(root: Path, step: int, *, keep: int, content: str = "") -> None:
    save(root, step, content=content)
    prune(root, Retention(keep=keep))


@pytest.mark.parametrize("further", [0, 1], ids=["then the same step", "then the next step"])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "the next step"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, step, keep, further):
    crashes = 0
    for call in range(100):
        root = tmp_path / str(call)
        save_and_prune(root, 1, keep=keep)
        save_and_prune(root, 2, keep=keep, content="old")
        try:
            with crash_at(call):
                save_and_prune(root, step, keep=keep, content="new")
        except Crash:
            crashes += 1
            assert newest(root) in ((2, "weights_0 of step 2 old"), (step, f"weights_0 of step {step} new"))
            for listed in store.whole_checkpoints(root):
                verify(listed)
        else:
            break
        save_and_prune(root, step + further, keep=keep, content="again")
        assert newest(root) == (step + further, f"weights_0 of step {step + further} again")
        assert len(names(root)) == keep, "and nothing of the crash stays"
    assert crashes >= 8, "the moments were really tried"


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 14))), min_size=2, max_size=8),
    st.integers(1, 3),
)
def test_crash_upon_crash_never_loses_progress(saves, keep):
    """Each save goes on from the newest whole one, or does its step again, and may end in a crash."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "checkpoints"
        save(root, 1)
        before = 1
        for further, call in saves:
            try:
                with crash_at(1000 if call is None else call):
                    save_and_prune(root, before + further, keep=keep)
            except Crash:
                pass
            else:
                assert newest(root) == (before + further, f"weights_0 of step {before + further} ")
                assert len(names(root)) <= keep
            found = newest(root)
            assert found is not None
            assert found[0] >= before
            before = found[0]


def test_the_manifest_is_readable_by_others(tmp_path):
    """Plain JSON, as docs promise: what was saved can be told without this package."""
    directory = save(tmp_path, 7)
    assert json.loads((directory / MANIFEST).read_text()) == asdict(verify(directory))
