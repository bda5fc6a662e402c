"""Copies of checkpoints in memory, in a directory and on a real S3 server: whole there or not taken for whole."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
import torch.distributed as dist
from s3_server import BUCKET, serve

from moetrain.checkpoint import store
from moetrain.checkpoint.remote import Remote, RemoteError, catch_up, fetch_newest, missing, prune
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.state import Fragment
from moetrain.errors import CheckpointError, ConfigError

KEEP_TWO = store.Retention(keep=2)
KINDS = ["memory", "file", "s3"]


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A server of its own; its address and keys are in the environment, as a user's are."""
    with serve() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield
    fsspec.filesystem("memory").clear_instance_cache()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that nothing else uses, on each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return {"memory": f"memory://{uuid4().hex}/run", "file": f"file://{tmp_path}/there/run",
            "s3": f"s3://{BUCKET}/{uuid4().hex}/run"}[request.param]  # fmt: skip


on_every_store = pytest.mark.parametrize("url", KINDS, indirect=True)


def save(root: Path, step: int, *, loss: float | None = None, ranks: int = 2, text: str = "") -> Path:
    """A whole local checkpoint of arbitrary bytes."""
    partial = store.open_partial(root, step)
    for name in [*(f"__{rank}_0.distcp" for rank in range(ranks)), ".metadata"]:
        (partial / name).write_bytes(f"{name} of step {step} {text}".encode() * 200)
    files = [store.digest_file(path) for path in sorted(partial.iterdir())]
    return store.commit(root, manifest(step, files=files, held_out_loss=loss))


def manifest(step: int, **more: Any) -> store.Manifest:
    fields = {"tokens": 0, "seed": 0, "world_size": 2, "expert_parallel": 1, "run": {}, "data": {}, "files": []}
    return store.Manifest(**fields | {"step": step} | more)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def whole(remote: Remote) -> list[int]:
    return [each.step for each in remote.steps() if each.has_manifest]


def fetch(remote: Remote, root: Path, *, why: str = "") -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return fetch_newest(remote, root, foreign=lambda _: why, warn=warnings.append, say=lambda _: None), warnings


def store_behind(remote: Remote) -> tuple[Any, str]:
    """The store itself, by another way than the one that is tested."""
    files, path = fsspec.url_to_fs(remote.url)
    return files, path


@on_every_store
def test_a_checkpoint_comes_back_byte_for_byte(url, tmp_path):
    remote, root = Remote(url), tmp_path / "checkpoints"
    remote.probe()
    assert remote.steps() == []
    before = contents(save(root, 5))
    catch_up(remote, root, KEEP_TWO)
    assert missing(remote, root, KEEP_TWO) == []
    files, path = store_behind(remote)
    there = {name.rpartition("/")[2]: files.cat_file(name) for name in files.find(path)}
    assert there == before
    shutil.rmtree(root)
    found, warnings = fetch(remote, root)
    assert (found, warnings) == (root / "step_00000005", [])
    assert contents(found) == before
    store.verify(found)
    assert fetch(remote, root) == (None, []), "what is here is as new"
    assert [each.name for each in root.iterdir()] == ["step_00000005"]


@on_every_store
def test_one_whose_copy_was_cut_off_before_the_manifest_is_passed_over_and_copied_anew(url, tmp_path):
    remote, root = Remote(url), tmp_path / "checkpoints"
    save(root, 5)
    catch_up(remote, root, KEEP_TWO)
    newer = save(root, 10)
    remote.upload(newer, store.read_manifest(newer).files)
    assert whole(remote) == [5]
    found, warnings = fetch(remote, tmp_path / "elsewhere")
    assert found == tmp_path / "elsewhere/step_00000005"
    assert warnings == [
        f"checkpoint {url}/step_00000010 is not whole and passed over: {url}/step_00000010/manifest.json is missing"
    ]
    assert missing(remote, root, KEEP_TWO) == [newer]
    catch_up(remote, root, KEEP_TWO)
    assert whole(remote) == [5, 10]


@on_every_store
@pytest.mark.parametrize("damage", ["cut short", "changed", "missing", "manifest"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(url, tmp_path, damage):
    remote, root = Remote(url), tmp_path / "checkpoints"
    for step in (5, 10):
        save(root, step)
    assert [store.step_of(each) for each in missing(remote, root, KEEP_TWO)] == [10, 5]
    catch_up(remote, root, KEEP_TWO)
    files, path = store_behind(remote)
    place = f"{path}/step_00000010/{'manifest.json' if damage == 'manifest' else '__1_0.distcp'}"
    content = files.cat_file(place)
    if damage == "missing":
        files.rm_file(place)
    else:
        files.pipe_file(place, content[:-7] if damage != "changed" else content[:-1] + b"?")
    found, warnings = fetch(remote, tmp_path / "elsewhere")
    assert found == tmp_path / "elsewhere/step_00000005"
    said = {"cut short": f"has {len(content) - 7:,} bytes, but must have {len(content):,}", "changed": "has changed",
            "missing": "is missing", "manifest": "cannot be read: JSONDecodeError"}[damage]  # fmt: skip
    (warning,) = warnings
    assert f"{url}/step_00000010/{place.rpartition('/')[2]} {said}" in warning
    assert [each.name for each in store.whole_checkpoints(tmp_path / "elsewhere")] == ["step_00000005"]
    if damage != "changed":  # of the same size: it shows when it is read, not in a listing
        assert missing(remote, root, KEEP_TWO) == [root / "step_00000010"]
        catch_up(remote, root, KEEP_TWO)
        assert fetch(remote, tmp_path / "again")[0] == tmp_path / "again/step_00000010"


@on_every_store
def test_retention_holds_there_too_also_for_those_that_are_no_longer_here(url, tmp_path):
    remote, root = Remote(url), tmp_path / "checkpoints"
    retention = store.Retention(keep=1, every_steps=20, best=1)
    losses = {10: 3.0, 20: 2.0, 30: 1.0, 40: 1.5, 50: 1.7, 60: None}
    for step, loss in losses.items():
        save(root, step, loss=loss)
        store.prune(root, retention)
        catch_up(remote, root, retention)
        assert whole(remote) == [store.step_of(each) for each in store.whole_checkpoints(root)]
    assert whole(remote) == [20, 30, 40, 60]
    # a machine that begins with none of them, and a worse loss than one that only the store has
    shutil.rmtree(root)
    fetch(remote, root)
    assert [store.step_of(each) for each in store.whole_checkpoints(root)] == [60]
    for step, loss in {70: 5.0, 80: 6.0, 90: 7.0}.items():
        save(root, step, loss=loss)
        store.prune(root, retention)
        catch_up(remote, root, retention)
    assert [store.step_of(each) for each in store.whole_checkpoints(root)] == [60, 70, 80, 90]
    assert whole(remote) == [20, 30, 40, 60, 80, 90]
    assert missing(remote, root, retention) == [], "70, the best that is here, is not carried there again and again"
    files, path = store_behind(remote)
    assert len(files.find(path)) == 6 * 4


def test_the_manifest_goes_first_so_that_half_of_one_is_never_taken_for_whole(tmp_path, monkeypatch):
    remote, root = Remote(f"memory://{uuid4().hex}"), tmp_path / "checkpoints"
    save(root, 5)
    catch_up(remote, root, KEEP_TWO)

    def cut_off(*_: Any, **__: Any) -> None:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(type(store_behind(remote)[0]), "rm", cut_off)
    with pytest.raises(RemoteError, match="step_00000005 cannot be removed: ConnectionError: the line is dead"):
        remote.clear(5)
    assert whole(remote) == []
    monkeypatch.undo()
    assert len(remote.steps()[0].sizes) == 3
    prune(remote, root, KEEP_TWO)
    assert remote.steps() == []


@on_every_store
def test_a_step_that_is_saved_again_takes_the_place_of_the_one_there(url, tmp_path):
    remote, root = Remote(url), tmp_path / "checkpoints"
    save(root, 5, ranks=4)
    catch_up(remote, root, KEEP_TWO)
    before = contents(save(root, 5, ranks=1, text="again"))
    assert missing(remote, root, KEEP_TWO) == [root / "step_00000005"]
    catch_up(remote, root, KEEP_TWO)
    shutil.rmtree(root)
    found, _ = fetch(remote, root)
    assert found is not None
    assert contents(found) == before
    files, path = store_behind(remote)
    assert len(files.find(path)) == 3, "nothing of the four files before is left"


def test_a_sound_one_there_takes_the_place_of_a_damaged_one_here(tmp_path):
    remote, root = Remote(f"memory://{uuid4().hex}"), tmp_path / "checkpoints"
    before = contents(save(root, 5))
    catch_up(remote, root, KEEP_TWO)
    (root / "step_00000005/__0_0.distcp").write_bytes(b"half")
    assert fetch(remote, root)[0] == root / "step_00000005"
    assert contents(root / "step_00000005") == before


def test_one_of_another_run_is_refused_and_not_copied(tmp_path):
    remote, root = Remote(f"memory://{uuid4().hex}"), tmp_path / "checkpoints"
    save(root, 5)
    catch_up(remote, root, KEEP_TWO)
    with pytest.raises(CheckpointError, match=r"step_00000005 has seed 1, the run 2; .*another checkpoint.remote=…"):
        fetch(remote, tmp_path / "elsewhere", why="has seed 1, the run 2")
    assert not (tmp_path / "elsewhere").exists()


def test_when_the_line_breaks_while_copying_it_does_not_go_on_from_an_older_one(tmp_path, monkeypatch):
    remote, root = Remote(f"memory://{uuid4().hex}"), tmp_path / "checkpoints"
    for step in (5, 10):
        save(root, step)
    catch_up(remote, root, KEEP_TWO)

    def cut_off(*_: Any, **__: Any) -> None:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(type(store_behind(remote)[0]), "get_file", cut_off)
    with pytest.raises(
        RemoteError, match=r"step_00000010/.* cannot be copied to .*: ConnectionError: the line is dead"
    ):
        fetch(remote, tmp_path / "elsewhere")
    assert store.whole_checkpoints(tmp_path / "elsewhere") == []


def test_a_manifest_that_leads_out_of_its_directory_is_refused(tmp_path):
    remote, root = Remote(f"memory://{uuid4().hex}"), tmp_path / "checkpoints"
    save(root, 5)
    catch_up(remote, root, KEEP_TWO)
    files, path = store_behind(remote)
    place = f"{path}/step_00000005/manifest.json"
    files.pipe_file(place, files.cat_file(place).replace(b'".metadata"', b'"../../.metadata"'))
    found, (warning,) = fetch(remote, tmp_path / "elsewhere")
    assert found is None
    assert "'../../.metadata' is not the name of a file beside it" in warning
    assert not (tmp_path / ".metadata").exists()


def fragments(rank: int, value: float) -> list[Fragment]:
    return [Fragment("a.w/fp32", torch.full((5000,), value + rank), rank * 5000, 10_000)]


def _saves(rank: int, root: Path, url: str) -> list[list[str]]:
    there = Remote(url)
    saver = Saver(root, group=dist.new_group(backend="gloo"), retention=KEEP_TWO, asynchronous=True, remote=there)
    told = []
    for step in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            if step == 2 and rank == 1:
                patch.setattr(store_behind(there)[0], "put_file", _denied)
            saver.begin(fragments(rank, float(step)), manifest=manifest(step))
            outcome = saver.wait()
        assert outcome is not None
        assert outcome.failure is None, "here it is saved all the same"
        told.append(outcome.warnings)
        dist.barrier()
        assert whole(there) == {1: [1], 2: [1], 3: [2, 3]}[step], "the one that was missed comes with the next"
        dist.barrier()
    return told


def _denied(*_: Any, **__: Any) -> None:
    raise PermissionError("Access Denied")


@pytest.mark.parametrize("url", ["file", "s3"], indirect=True)
def test_each_rank_copies_its_own_files_and_one_that_cannot_keeps_all_from_committing(ranks, url, tmp_path):
    first, second = ranks(2, _saves, tmp_path / "checkpoints", url)
    assert first == second
    assert [len(warnings) for warnings in first] == [0, 1, 0]
    assert first[1][0] == (f"step 2 is saved, but not all copies are; the next save tries again: rank 1: {url}/"
                           "step_00000002/__1_0.distcp cannot be written: PermissionError: Access Denied")  # fmt: skip
    found, _ = fetch(Remote(url), tmp_path / "elsewhere")
    assert found is not None
    assert store.verify(found).step == 3


def message_of(action: Callable[[], Any], kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_said_before_the_training_and_not_made():
    assert "s3://nobody/run cannot be" in message_of(Remote("s3://nobody/run").probe)
    assert "nobody" not in " ".join(fsspec.filesystem("s3").ls("/"))


@pytest.mark.parametrize("fault", ["no server", "no credentials"])
def test_a_store_that_does_not_answer_is_said_before_the_training(monkeypatch, tmp_path, fault):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing may listen at this port
    if fault == "no server":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret of mine")
    fsspec.filesystem("s3").clear_instance_cache()
    message = message_of(Remote("s3://bucket/run").probe)
    fsspec.filesystem("s3").clear_instance_cache()
    assert message.startswith("s3://bucket/run cannot be listed")
    assert ("Could not connect" if fault == "no server" else "Unable to locate credentials") in message
    assert "secret of mine" not in message


def test_a_protocol_that_nobody_speaks_and_a_package_that_is_missing_are_two_things(monkeypatch):
    assert "fsspec knows no protocol s4" in message_of(lambda: Remote("s4://bucket/run"), ConfigError)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed, should it be
    assert 'pip install "moetrain[gs]"' in message_of(lambda: Remote("gs://bucket/run"), ConfigError)
