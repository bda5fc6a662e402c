"""Checkpoints in an object store, or whatever else fsspec reaches: copies of the local ones. No torch.

URL/step_00002000/__0_0.distcp …   copied first, each held against its size
URL/step_00002000/manifest.json    copied last and removed first: without it, nothing there is taken for a checkpoint

Credentials come from the environment and from fsspec's and the store's own configuration; none passes through here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec

from moetrain.checkpoint import store
from moetrain.errors import CheckpointError, ConfigError, FormatError

_AT_ONCE = 8
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class RemoteStep:
    """What lies under the name of one step."""

    step: int
    sizes: dict[str, int]
    """Bytes of each file."""

    @property
    def has_manifest(self) -> bool:
        """Whether it was copied to its end."""
        return store.MANIFEST in self.sizes


class RemoteError(CheckpointError):
    """The store, the way to it or the disk here failed: of what is stored there it says nothing."""


class Remote:
    """The checkpoints of one run under a URL.

    Args:
        url: of their directory, e.g. s3://bucket/runs/name.

    Raises:
        ConfigError: fsspec does not know the protocol, or the package that speaks it is missing.
        RemoteError: from every method, with the URL and the store's own words.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            way_out = f'pip install "moetrain[{extra}]"' if extra else str(error)
            problem = f"checkpoint.remote is {url}, but no package here speaks {protocol}: {way_out}"
            raise ConfigError([problem]) from None
        except ValueError:
            raise ConfigError([f"checkpoint.remote is {url}, but fsspec knows no protocol {protocol}: use s3://…, "
                               "gs://… or another one of fsspec's"]) from None  # fmt: skip
        with self._said("cannot be opened"):
            self._files, self._root = fsspec.url_to_fs(self.url)

    def probe(self) -> None:
        """Read, write and remove something small, so that what is wrong shows before the training and not after."""
        with self._said("cannot be listed, written to and cleared"):
            self.steps()
            self._make_directory(self._root)
            self._files.pipe_file(f"{self._root}/.probe", b"moetrain")
            self._files.rm_file(f"{self._root}/.probe")

    def steps(self) -> list[RemoteStep]:
        """What is there, in the order of the steps, whole or not."""
        with self._said("cannot be listed"):
            found = []
            for path in self._listed(self._root):
                match = _STEP.fullmatch(_last(path))
                if match:
                    files = self._listed(path)
                    found.append(RemoteStep(int(match[1]), {_last(name): size for name, size in files.items()}))
            return sorted(found, key=lambda each: each.step)

    def manifest_bytes(self, step: int) -> bytes:
        """The manifest of a step as it is stored."""
        with self._said(f"/{_name(step)}/{store.MANIFEST} cannot be read"):
            content: bytes = self._files.cat_file(self._path(step, store.MANIFEST))
            return content

    def manifest(self, step: int) -> store.Manifest:
        """The manifest of a step."""
        return store.parse_manifest(self.manifest_bytes(step), path=f"{self.url}/{_name(step)}/{store.MANIFEST}")

    def clear(self, step: int) -> None:
        """Remove what lies under the name of a step, the manifest first."""
        with self._said(f"/{_name(step)} cannot be removed"):
            names = self._listed(self._path(step))
            if self._path(step, store.MANIFEST) in names:
                self._files.rm_file(self._path(step, store.MANIFEST))
            if names:
                self._files.rm(self._path(step), recursive=True)

    def upload(self, directory: Path, files: Iterable[store.FileDigest]) -> None:
        """Copy files of a local checkpoint, and hold each copy against its size."""
        step = store.step_of(directory)
        for each in files:
            store.check_file(directory, each, digest=False)
            self._put(directory, step, each.name, size=each.size)

    def commit(self, directory: Path) -> None:
        """Make a whole checkpoint of the files that were copied: with the manifest, in one object."""
        size = (directory / store.MANIFEST).stat().st_size
        self._put(directory, store.step_of(directory), store.MANIFEST, size=size)

    def fetch(self, there: RemoteStep, root: Path) -> Path:
        """Copy a checkpoint into a run, where it is whole at once or not at all. Every file is digested.

        Raises:
            CheckpointError: it is not whole, or does not arrive as its manifest says.
        """
        step, where = there.step, f"{self.url}/{_name(there.step)}"
        manifest = self.manifest(step)
        for each in manifest.files:
            if each.name not in there.sizes:
                raise CheckpointError(f"{where}/{each.name} is missing")
            if there.sizes[each.name] != each.size:
                raise CheckpointError(
                    f"{where}/{each.name} has {there.sizes[each.name]:,} bytes, but must have {each.size:,}"
                )
        with self._said(f"/{_name(step)} cannot be copied to {root}"):
            partial = store.open_partial(root, step)
            store.check_name(partial, manifest)

        def get(expected: store.FileDigest) -> None:
            with self._said(f"/{_name(step)}/{expected.name} cannot be copied to {partial}"):
                self._files.get_file(self._path(step, expected.name), str(partial / expected.name))
                if store.digest_file(partial / expected.name) != expected:
                    raise CheckpointError(f"{where}/{expected.name} has changed: its xxh128 is not the manifest's")

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as threads:
            list(threads.map(get, manifest.files))
        with self._said(f"/{_name(step)} cannot be copied to {root}"):
            return store.commit(root, manifest)

    def _put(self, directory: Path, step: int, name: str, *, size: int) -> None:
        with self._said(f"/{_name(step)}/{name} cannot be written"):
            self._make_directory(self._path(step))
            self._files.put_file(str(directory / name), self._path(step, name))
            self._files.invalidate_cache()
            arrived = self._files.info(self._path(step, name))["size"]
            if arrived != size:
                raise CheckpointError(f"{self.url}/{_name(step)}/{name} has {arrived:,} bytes after it was written, "
                                      f"but must have {size:,}")  # fmt: skip

    def _make_directory(self, path: str) -> None:
        # object stores, which fsspec speaks to asynchronously, have no directories: they would make a bucket, also one
        # that is there already by another spelling
        if not self._files.async_impl:
            self._files.makedirs(path, exist_ok=True)

    def _listed(self, path: str) -> dict[str, int]:
        # others write there too: what this process has seen before may be gone
        self._files.invalidate_cache()
        try:
            return {each["name"].rstrip("/"): int(each["size"] or 0) for each in self._files.ls(path, detail=True)}
        except FileNotFoundError:
            return {}

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/{_name(step)}" + (f"/{name}" if name else "")

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # every store has errors of its own
            separator = "" if what.startswith("/") else " "
            raise RemoteError(f"{self.url}{separator}{what}: {type(error).__name__}: {error}") from error


def fetch_newest(
    remote: Remote,
    root: Path,
    *,
    foreign: Callable[[store.Manifest], str],
    warn: Callable[[str], None],
    say: Callable[[str], None],
) -> Path | None:
    """Copy the newest whole checkpoint into the run, unless the run has one that is as new; None: nothing was copied.

    Args:
        root: directory of the run's checkpoints.
        foreign: why a checkpoint is not one of the run; empty when it is.
        warn: names those that are not whole and passed over.
        say: told before a copy begins.

    Raises:
        CheckpointError: the newest one is of another run.
        FormatError: another version of moetrain wrote the newest one.
        RemoteError: the store or the way to it failed. To go on from an older one would be to lose what is there.
    """
    own: int | None = None
    for there in reversed(remote.steps()):
        where = f"{remote.url}/{_name(there.step)}"
        try:
            if not there.has_manifest:
                raise CheckpointError(f"{where}/{store.MANIFEST} is missing")
            manifest = remote.manifest(there.step)
            why = foreign(manifest)
            if why:
                break
            own = _newest_whole_step(root) if own is None else own
            if there.step <= own:
                return None
            say(f"copying {where} to {root}")
            return remote.fetch(there, root)
        except (RemoteError, FormatError):
            raise
        except CheckpointError as error:
            warn(f"checkpoint {where} is not whole and passed over: {error}")
    else:
        return None
    raise CheckpointError(f"{where} {why}; set it back, or choose another checkpoint.remote=… for this run")


def missing(remote: Remote, root: Path, retention: store.Retention) -> list[Path]:
    """The run's checkpoints that belong at the remote place and are not there as they are here.

    The newest comes first: where the line is bad, it is the one to have.
    """
    local = {store.step_of(path): path for path in store.counted(root)}
    there = _counted(remote, root)
    losses: dict[int, float] = {}
    if retention.best:
        losses = _losses(remote, there) | store.held_out_losses(local.values())
    # one that the remote place would not keep, having better ones, is not carried there again and again
    going = store.going_steps(local.keys() | there.keys(), retention, losses=losses)
    return [
        path
        for step, path in sorted(local.items(), reverse=True)
        if step not in going and not (step in there and _is_copy(remote, there[step], path))
    ]


def prune(remote: Remote, root: Path, retention: store.Retention) -> None:
    """Remove the remote checkpoints that need not stay, and what was not copied to its end. Called after a copy."""
    there = _counted(remote, root)
    losses = _losses(remote, there) if retention.best else {}
    for step in sorted(store.going_steps(there, retention, losses=losses)):
        remote.clear(step)
    for each in remote.steps():
        if not each.has_manifest:
            remote.clear(each.step)


def catch_up(remote: Remote, root: Path, retention: store.Retention) -> None:
    """Copy what is missing there, from one process, and prune.

    Raises:
        CheckpointError: it could not be copied.
    """
    for directory in missing(remote, root, retention):
        files = store.read_manifest(directory).files
        remote.clear(store.step_of(directory))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload") as threads:
            list(threads.map(lambda each, to=directory: remote.upload(to, [each]), files))
        remote.commit(directory)
    prune(remote, root, retention)


def _counted(remote: Remote, root: Path) -> dict[int, RemoteStep]:
    newest = max((store.step_of(path) for path in store.counted(root)), default=-1)
    return {each.step: each for each in remote.steps() if each.has_manifest and each.step <= newest}


def _is_copy(remote: Remote, there: RemoteStep, directory: Path) -> bool:
    content = (directory / store.MANIFEST).read_bytes()
    files = store.parse_manifest(content, path=str(directory / store.MANIFEST)).files
    sizes_fit = all(there.sizes.get(each.name) == each.size for each in files)
    return sizes_fit and remote.manifest_bytes(there.step) == content


def _losses(remote: Remote, there: Iterable[int]) -> dict[int, float]:
    losses = {}
    for step in there:
        loss = remote.manifest(step).held_out_loss
        if loss is not None and loss == loss:
            losses[step] = loss
    return losses


def _newest_whole_step(root: Path) -> int:
    for directory in reversed(store.whole_checkpoints(root)):
        with contextlib.suppress(CheckpointError):
            return store.verify(directory).step
    return -1


def _name(step: int) -> str:
    return store.step_directory(Path(), step).name


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
