"""A sentencepiece model as a tokenizer of the ``tokenizers`` library, proved against sentencepiece itself.

Unigram (Kudo 2018, arXiv:1804.10959) as it is; of BPE the merges are found again: any two pieces that make a third,
in the order of its score. One difference stays: before a text that begins with a space, sentencepiece puts another
one, this does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moetrain.errors import DataError

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_SPACE = "\u2581"

_PROBES = (
    "The quick brown fox jumps over the lazy dog. It's 1984, isn't it?",
    "two  spaces,   three\tand a tab\nand a line",
    "caf\u00e9 na\u00efve \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600 \ufb01ne \u2460",
    "def f(x): return x ** 2  # code",
)


def read_sentencepiece(path: Path) -> Tokenizer:
    """Convert a ``.model`` file.

    Raises:
        DataError: sentencepiece or protobuf is missing, the file is damaged or of another kind, or what comes out does
            not give sentencepiece's ids.
    """
    try:
        library: Any = importlib.import_module("sentencepiece")
        messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise DataError(f"{path} needs sentencepiece: pip install 'moetrain[sentencepiece]'") from error
    model = messages.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        processor = library.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # protobuf and sentencepiece raise several kinds
        raise DataError(f"{path} is no sentencepiece model ({error})") from error
    tokenizer = Tokenizer(_model(model, path=path))
    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    # not split at spaces: a model may have pieces of several of them, and no other piece reaches over one
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    own = [piece.piece for piece in model.pieces if piece.type in (_CONTROL, _USER, _UNKNOWN)]
    special = {piece.piece for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN)}
    tokenizer.add_tokens([AddedToken(text, special=text in special, normalized=False) for text in own])
    tokenizer.encode_special_tokens = True
    _prove(tokenizer, processor, path=path)
    # as it will be read again: JSON does not keep the last digit of a score
    return Tokenizer.from_str(tokenizer.to_str())


def _model(model: Any, *, path: Path) -> Any:
    kind, unknown = model.trainer_spec.model_type, model.trainer_spec.unk_id
    has_bytes = any(piece.type == _BYTE for piece in model.pieces)
    if kind == _UNIGRAM:
        return models.Unigram([(piece.piece, piece.score) for piece in model.pieces], unknown, byte_fallback=has_bytes)
    if kind != _BPE:
        raise DataError(f"{path} is a sentencepiece model of words or characters: only Unigram and BPE are read")
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    return models.BPE(
        vocab,
        list(_merges(model, vocab)),
        unk_token=model.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=has_bytes,
    )


def _merges(model: Any, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    joinable = {piece.piece for piece in model.pieces if piece.type not in (_UNKNOWN, _CONTROL, _BYTE)}
    pairs = [
        (-piece.score, vocab[piece.piece[:cut]], vocab[piece.piece[cut:]], piece.piece[:cut], piece.piece[cut:])
        for piece in model.pieces
        if piece.piece in joinable
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in joinable and piece.piece[cut:] in joinable
    ]
    for _, _, _, one, other in sorted(pairs):
        yield one, other


def _prove(tokenizer: Tokenizer, processor: Any, *, path: Path) -> None:
    pieces = [processor.id_to_piece(number).replace(_SPACE, " ") for number in range(processor.get_piece_size())]
    some = pieces[:: max(1, len(pieces) // 2000)]
    for text in (*_PROBES, " ".join(piece.strip() for piece in some if piece.strip() and "<" not in piece)):
        expected, found = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise DataError(
                f"{path} cannot be taken over as it is (other ids for {text[:60]!r}): give the tokenizer.json that "
                "transformers makes of it (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
            )
