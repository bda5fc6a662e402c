"""Documents to token ids: in this process, or as ``python -m moetrain.stream.encode`` in several."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.corpus import token_dtype
from moetrain.data.tokenizer import batch_encoder, encode, end_of_text, load_tokenizer, vocabulary_size
from moetrain.parallel.pool import Task, Tell, do_tasks


class Encoder:
    """Encodes documents, each followed by the end of text.

    Args:
        path: of the tokenizer.json.
    """

    def __init__(self, path: Path) -> None:
        tokenizer = load_tokenizer(path)
        self._encode, self._end = batch_encoder(tokenizer), end_of_text(tokenizer)
        self.dtype = token_dtype(vocabulary_size(tokenizer))

    def __call__(self, texts: list[str]) -> npt.NDArray[Any]:
        """Their ids, one after the other."""
        encoded = encode(self._encode, texts)
        return np.insert(encoded.ids, np.cumsum(encoded.lengths), self._end).astype(self.dtype)


def to_text(tokens: npt.NDArray[Any]) -> str:
    """Ids for a line of JSON."""
    return base64.b64encode(tokens.tobytes()).decode()


def from_text(text: str, *, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """What ``to_text`` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


class Worker:
    """Does the tasks of one stream."""

    def __init__(self) -> None:
        self._encoder: Encoder | None = None

    def do(self, task: Task, tell: Tell) -> dict[str, Any]:
        """Do a task; returns the answer."""
        if self._encoder is None:
            self._encoder = Encoder(Path(task["tokenizer"]))
        return {"tokens": to_text(self._encoder(task["texts"]))}


if __name__ == "__main__":
    do_tasks(Worker().do)
