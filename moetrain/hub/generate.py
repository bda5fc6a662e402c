"""A trained model writes text: the newest checkpoint of a run, read by one process whatever the run's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moetrain.checkpoint import store
from moetrain.checkpoint.state import Fragment, load, newest_whole
from moetrain.checkpoint.store import Manifest
from moetrain.config.freeze import read_run
from moetrain.config.schema import ModelConfig, RunConfig
from moetrain.data.corpus import TOKENIZER
from moetrain.data.tokenizer import end_of_text, fingerprint, load_tokenizer, vocabulary_size
from moetrain.errors import CheckpointError, DataError
from moetrain.model.attention import KeyValues
from moetrain.model.build import build_model
from moetrain.model.gpt import GPT


def newest_or(run_dir: Path, *, step: int | None, warn: Callable[[str], None]) -> tuple[RunConfig, Path, Manifest]:
    """The settings of a run and its checkpoint of a step, held against its digests; None: the newest whole one.

    Raises:
        CheckpointError: there is none, or it is damaged.
        DataError: the tokenizer beside it is missing, or another one.
    """
    run, root = read_run(run_dir), run_dir / "checkpoints"
    if step is not None:
        found = {store.step_of(each): each for each in store.whole_checkpoints(root)}
        if step not in found:
            there = ", ".join(map(str, found)) or "none yet"
            raise CheckpointError(f"{run_dir} has no checkpoint of step {step}: there is {there}")
        directory, manifest = found[step], store.verify(found[step])
    else:
        newest = newest_whole(root, warn=warn)
        if newest is None:
            raise CheckpointError(f"{run_dir} has no whole checkpoint yet: train it first, e.g. moetrain train")
        directory, manifest = newest
    trained = manifest.data.get("tokenizer")
    if trained is not None and fingerprint(load_tokenizer(run_dir / TOKENIZER)) != trained:
        raise DataError(f"{run_dir / TOKENIZER} is not the tokenizer that {directory} was trained with: put that one "
                        "there again")  # fmt: skip
    return run, directory, manifest


def load_model(
    run_dir: Path, *, warn: Callable[[str], None], step: int | None = None, device: torch.device | None = None
) -> tuple[RunConfig, GPT]:
    """The model of a checkpoint, every expert in this process, in float32.

    Args:
        step: of the checkpoint; None: the newest whole one.
        device: None: the CPU.

    Raises:
        CheckpointError: there is none, or it does not fit its settings.
    """
    run, directory, _ = newest_or(run_dir, step=step, warn=warn)
    return run, read_model(directory, run.model, device=device)


def read_model(directory: Path, model: ModelConfig, *, device: torch.device | None = None) -> GPT:
    """The same of the checkpoint in ``directory``, whose model is ``model``; its digests are not read.

    Raises:
        CheckpointError: it does not fit.
    """
    # a hash router's table comes with the checkpoint; until then it only needs its size
    gpt = build_model(model, expert_V=torch.zeros(model.vocab_size, dtype=torch.int64))
    tensors = {f"{name}/fp32": parameter.detach() for name, parameter in gpt.named_parameters()}
    tensors |= {f"{name}/state": state for name, state in gpt.moe_state().items()}
    fragments = [Fragment(name, tensor.view(-1), 0, tensor.numel()) for name, tensor in tensors.items()]
    load(directory, fragments, group=None)
    return gpt.to(device).eval()


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, and when it is enough."""

    max_tokens: int = 120
    """Tokens at most, for each prompt."""
    temperature: float = 0.8
    """Divides the scores; 0: the likeliest token, always."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest that hold this much of the probability (Holtzman et al. 2019, arXiv:1904.09751)."""
    seed: int = 0
    """Same seed, same text. Prompt n of several draws as a single one would with seed + n."""
    stop: tuple[str, ...] = ()
    """Texts before which it ends."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A piece of text; it is complete: a character of several bytes comes out when its last byte is there."""

    row: int
    """Which prompt it goes on from."""
    text: str
    experts: tuple[int, ...] = ()
    """Those that the token behind it chose in the layer that is watched, best first; empty where none is."""


@torch.no_grad()
def generate(
    gpt: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    sampling: Sampling,
    context: int,
    cache: bool = True,
    watch: int | None = None,
) -> Iterator[Written]:
    """Write on from each prompt, piece by piece, until its document ends.

    Args:
        prompts: texts, each the beginning of a document, an empty one of a new one; or token ids, as they are.
        context: tokens the model looks back at most; from there on every token reads the whole window anew.
        cache: keep keys and values from token to token, and read the prompts together. Not for a model in which a
            token's experts depend on the tokens beside it (``config.routers.sees_others``).
        watch: number of an MoE block whose choices are told, from 0. A piece then comes one token later.
    """
    # rows of the embedding past the vocabulary are padding
    vocabulary, end = vocabulary_size(tokenizer), end_of_text(tokenizer)
    rows = [_Row(number, tokenizer, prompt, sampling=sampling) for number, prompt in enumerate(prompts)]
    reader = _Reader(gpt, rows, room=sampling.max_tokens + 1, context=context, cache=cache, watch=watch)
    pending: dict[int, str] = {}
    for _ in range(sampling.max_tokens):
        logit_BV, experts = reader.read()
        for number, text in pending.items():
            yield Written(row=number, text=text, experts=experts.get(number, ()))
        pending = {}
        for row in rows:
            if row.ended:
                continue
            chosen = _draw(logit_BV[row.number, :vocabulary], sampling, generator=row.generator)
            text = row.take(chosen, end=end)
            if text and watch is None:
                yield Written(row=row.number, text=text)
            elif text:
                pending[row.number] = text
        if all(row.ended for row in rows):
            break
    if pending:
        _, experts = reader.read()
        yield from (Written(row=number, text=text, experts=experts.get(number, ())) for number, text in pending.items())
    for row in rows:
        if rest := row.rest():
            yield Written(row=row.number, text=rest)


class _Row:
    """One text that is being written."""

    def __init__(self, number: int, tokenizer: Tokenizer, prompt: str | Sequence[int], *, sampling: Sampling) -> None:
        self.number = number
        if isinstance(prompt, str):
            prompt = [end_of_text(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False).ids]
        self.ids = list(prompt)
        self.ended = False
        self.generator = torch.Generator().manual_seed(sampling.seed + number)
        self._tokenizer, self._stop = tokenizer, sampling.stop
        # decoded together with the prompt: a decoder may treat the first token of a text as the first of a sentence
        self._shown = self._begin = len(tokenizer.decode(self.ids))

    def take(self, token: int, *, end: int) -> str:
        """One more token; the text that can be shown now."""
        if token == end:
            self.ended = True
            return ""
        self.ids.append(token)
        text = self._tokenizer.decode(self.ids).rstrip("\ufffd")
        found = [at for stop in self._stop if (at := text.find(stop, self._begin)) >= 0]
        if found:
            self.ended = True
            return self._show(text[: min(found)])
        # what may be the beginning of a stop is not shown before it is clear
        held = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        return self._show(text[: len(text) - held])

    def rest(self) -> str:
        """What was held back and turned out to be no stop."""
        if any(stop in self._tokenizer.decode(self.ids)[self._begin :] for stop in self._stop):
            return ""
        return self._show(self._tokenizer.decode(self.ids).rstrip("\ufffd"))

    def _show(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


class _Reader:
    """Reads what the rows have got since the last time; with a cache all of them in one pass, else each by itself."""

    def __init__(
        self, gpt: GPT, rows: Sequence[_Row], *, room: int, context: int, cache: bool, watch: int | None
    ) -> None:
        self._gpt, self._rows, self._context, self._watch = gpt, rows, context, watch
        self._device = gpt.device
        self._longest = max(len(row.ids) for row in rows)
        self._past = [KeyValues(length=self._longest + room) for _ in gpt.blocks] if cache else None
        # the shorter prompts begin later, so that all end at one place
        self._padding_B = self._tensor([self._longest - len(row.ids) for row in rows])

    def read(self) -> tuple[Tensor, dict[int, tuple[int, ...]]]:
        """Scores of the next token of each row, [B, V] in fp32 on the host; by row, the experts of its newest one."""
        if self._past is not None and all(len(row.ids) <= self._context for row in self._rows):
            return self._read_on(self._past)
        self._past = None
        logits: dict[int, Tensor] = {}
        experts: dict[int, tuple[int, ...]] = {}
        for row in self._rows:
            if not row.ended or self._watch is not None:
                output = self._gpt(self._tensor([row.ids[-self._context :]]))
                logits[row.number] = output.logit_BSV[0, -1].float().cpu()
                if self._watch is not None:
                    experts[row.number] = tuple(output.moe[self._watch].choice.expert_TK[-1].tolist())
        nothing = torch.zeros_like(next(iter(logits.values())))
        return torch.stack([logits.get(row.number, nothing) for row in self._rows]), experts

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _read_on(self, past: list[KeyValues]) -> tuple[Tensor, dict[int, tuple[int, ...]]]:
        begin = past[0].filled
        if begin == 0:
            token_BS = self._tensor([[row.ids[0]] * (self._longest - len(row.ids)) + row.ids for row in self._rows])
        else:
            # a row that has ended goes along, and nobody looks at it
            token_BS = self._tensor([[row.ids[-1]] for row in self._rows])
        place_S = torch.arange(begin, begin + token_BS.shape[1], device=self._device)
        seen_A = torch.arange(begin + token_BS.shape[1], device=self._device)
        mask_BSA = (seen_A >= self._padding_B[:, None, None]) & (seen_A <= place_S[:, None])
        # padding sees itself: a row of the softmax without anything would be NaN
        mask_BSA = mask_BSA | (seen_A == place_S[:, None])
        output = self._gpt(
            token_BS,
            position_BS=(place_S - self._padding_B[:, None]).clamp(0, self._context - 1),
            past=past,
            mask=mask_BSA.unsqueeze(1),
        )
        experts: dict[int, tuple[int, ...]] = {}
        if self._watch is not None:
            expert_TK = output.moe[self._watch].choice.expert_TK
            expert_BK = expert_TK.view(len(self._rows), -1, expert_TK.shape[1])[:, -1]
            experts = {row.number: tuple(expert_BK[row.number].tolist()) for row in self._rows}
        return output.logit_BSV[:, -1].float().cpu(), experts


def _draw(logit_V: Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logit_V.argmax())
    kept, ids = logit_V.topk(min(sampling.top_k or len(logit_V), len(logit_V)))
    # less the largest: divided by a small temperature, the scores themselves would overflow
    probability = ((kept - kept[0]) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        # the likeliest one stays whatever its probability
        before = probability.cumsum(-1) - probability
        probability = torch.where(before < sampling.top_p, probability, 0)
    return int(ids[torch.multinomial(probability, 1, generator=generator)])
