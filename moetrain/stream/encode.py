"""Documents to token ids: in this process, or as ``python -m moetrain.stream.encode`` in several.

A worker process reads a task from each line of its standard input and answers each with a line of JSON (see
``parallel/pool.py``); it ends when that input does.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.corpus import token_dtype
from moetrain.data.tokenizer import batch_encoder, encode, end_of_text, load_tokenizer, vocabulary_size
from moetrain.errors import DataError


class Encoder:
    """Encodes documents, each followed by the end of text.

    Args:
        path: of the tokenizer.json.
    """

    def __init__(self, path: Path) -> None:
        tokenizer = load_tokenizer(path)
        self._encode, self._end = batch_encoder(tokenizer), np.array([end_of_text(tokenizer)], dtype=np.uint32)
        self.dtype = token_dtype(vocabulary_size(tokenizer))

    def __call__(self, texts: list[str]) -> npt.NDArray[Any]:
        """Their ids, one after the other."""
        pieces = [piece for one in encode(self._encode, texts) for piece in (one.ids, self._end)]
        return np.concatenate([self._end[:0], *pieces]).astype(self.dtype)


def to_text(tokens: npt.NDArray[Any]) -> str:
    """Ids for a line of JSON."""
    return base64.b64encode(tokens.tobytes()).decode()


def from_text(text: str, *, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """What ``to_text`` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def main() -> None:
    """Do the tasks of standard input until it ends."""
    # whatever a library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    encoder: Encoder | None = None
    for line in sys.stdin:
        task = json.loads(line)
        try:
            encoder = encoder or Encoder(Path(task["tokenizer"]))
            answer: dict[str, Any] = {"done": {"tokens": to_text(encoder(task["texts"]))}}
        except DataError as error:
            answer = {"data_error": str(error)}
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
