"""A trained model writes text: the newest checkpoint of a run, read by one process whatever the run's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from moetrain.checkpoint import store
from moetrain.checkpoint.state import Fragment, load, newest_whole
from moetrain.checkpoint.store import Manifest
from moetrain.config.freeze import read_run
from moetrain.config.schema import RunConfig
from moetrain.data.tokenizer import end_of_text, vocabulary_size
from moetrain.errors import CheckpointError
from moetrain.model.build import build_model
from moetrain.model.gpt import GPT


def newest_or(run_dir: Path, *, step: int | None, warn: Callable[[str], None]) -> tuple[RunConfig, Path, Manifest]:
    """The settings of a run and its checkpoint of a step, held against its digests; None: the newest whole one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    run, root = read_run(run_dir), run_dir / "checkpoints"
    if step is not None:
        found = {store.step_of(each): each for each in store.whole_checkpoints(root)}
        if step not in found:
            there = ", ".join(map(str, found)) or "none yet"
            raise CheckpointError(f"{run_dir} has no checkpoint of step {step}: there is {there}")
        return run, found[step], store.verify(found[step])
    newest = newest_whole(root, warn=warn)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no whole checkpoint yet: train it first, e.g. moetrain train")
    return run, *newest


def load_model(run_dir: Path, *, warn: Callable[[str], None], step: int | None = None) -> tuple[RunConfig, GPT]:
    """The model of a checkpoint, every expert in this process, in float32.

    Args:
        step: of the checkpoint; None: the newest whole one.

    Raises:
        CheckpointError: there is none, or it does not fit its settings.
    """
    run, directory, _ = newest_or(run_dir, step=step, warn=warn)
    # a hash router's table comes with the checkpoint; until then it only needs its size
    gpt = build_model(run.model, expert_V=torch.zeros(run.model.vocab_size, dtype=torch.int64))
    tensors = {f"{name}/fp32": parameter.detach() for name, parameter in gpt.named_parameters()}
    tensors |= {f"{name}/state": state for name, state in gpt.moe_state().items()}
    fragments = [Fragment(name, tensor.view(-1), 0, tensor.numel()) for name, tensor in tensors.items()]
    load(directory, fragments, group=None)
    return run, gpt.eval()


@torch.no_grad()
def generate(
    gpt: GPT,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    context: int,
) -> Iterator[str]:
    """Write on from a prompt, piece by piece, until the document ends.

    Args:
        prompt: empty: a new document.
        max_tokens: tokens at most.
        temperature: divides the scores; 0: the likeliest token, always.
        top_k: draw among this many likeliest tokens; 0: among all.
        seed: same seed, same text.
        context: tokens the model looks back at most.

    Yields:
        Text that is complete: a character of several bytes comes out when its last byte is there.
    """
    end = end_of_text(tokenizer)
    ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    generator = torch.Generator().manual_seed(seed)
    # rows of the embedding past the vocabulary are padding
    vocabulary = vocabulary_size(tokenizer)
    # decoded together with the prompt: a decoder may treat the first token of a text as the first of a sentence
    shown = len(tokenizer.decode(ids))
    for _ in range(max_tokens):
        logits = gpt(torch.tensor([ids[-context:]])).logit_BSV[0, -1].float()
        chosen = _draw(logits[:vocabulary], temperature=temperature, top_k=top_k, generator=generator)
        if chosen == end:
            break
        ids.append(chosen)
        text = tokenizer.decode(ids).rstrip("\ufffd")
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)


def _draw(logits: torch.Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    kept, ids = logits.topk(min(top_k or len(logits), len(logits)))
    # less the largest: divided by a small temperature, the scores themselves would overflow
    return int(ids[torch.multinomial(((kept - kept[0]) / temperature).softmax(-1), 1, generator=generator)])
