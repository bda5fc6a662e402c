"""Datasets of the Hugging Face hub, or directories laid out like one, through ``datasets``, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import DataError

PREFIX = "hf:"


@dataclass(frozen=True)
class HubDataset:
    """``hf:NAME[/CONFIG][@SPLIT]``."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{f'/{self.config}' if self.config else ''}@{self.split}"


def parse(pattern: str) -> HubDataset:
    """The dataset that a pattern names: OWNER/NAME, OWNER/NAME/CONFIG, or a directory and perhaps a configuration.

    Raises:
        DataError: it is none of these.
    """
    address, _, split = pattern.removeprefix(PREFIX).partition("@")
    local = Path(address).expanduser()
    parts = address.split("/")
    if address and local.is_dir():
        return HubDataset(name=str(local.absolute()), config=None, split=split or "train")
    if len(parts) > 1 and local.parent.is_dir() and address.startswith((".", "/", "~")):
        return HubDataset(name=str(local.parent.absolute()), config=local.name, split=split or "train")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"data.text names {pattern!r}, but a dataset is written hf:OWNER/NAME[/CONFIG][@SPLIT]")
    config = parts[2] if len(parts) == 3 else None
    return HubDataset(name="/".join(parts[:2]), config=config, split=split or "train")


def identity(dataset: HubDataset) -> str:
    """What tells the dataset's content from another's: changes with its files.

    Raises:
        DataError: it cannot be found.
    """
    with _Told(dataset):
        builder = _datasets().load_dataset_builder(dataset.name, dataset.config)
        files = builder.config.data_files or {}
        # where they are and, as an etag or a time of change, which version
        about = [(split, list(map(str, found)), found.origin_metadata) for split, found in sorted(files.items())]
        return f"{builder.config.name} {builder.hash} {about}"


def rows(dataset: HubDataset) -> Iterator[dict[str, Any]]:
    """Every row, streamed.

    Raises:
        DataError: it cannot be found or read, or has no such split.
    """
    with _Told(dataset):
        yield from _datasets().load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=True)


class _Told:
    """Turns whatever ``datasets`` raises into one line that names the dataset."""

    def __init__(self, dataset: HubDataset) -> None:
        self._dataset = dataset

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            first = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{self._dataset} cannot be read ({type(error).__name__}: {first}): check its name, configuration and "
                "split on huggingface.co, and the network; what is prepared already needs neither "
                "(data.prepared=DIRECTORY)"
            ) from error


def _datasets() -> Any:
    import datasets

    # its progress bars would draw over ours, and it would import torch for nothing
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False
    return datasets
