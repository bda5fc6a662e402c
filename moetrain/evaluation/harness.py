"""The lm-evaluation-harness on our own model, through its Python API; nothing is exported.

Its tasks see a language model of three abilities: the likelihood of a continuation, of a whole text, and text written
on until a stop. How a task cuts context and continuation into tokens is the harness's own code, the same one that it
uses for a model of `transformers`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from moetrain.data.tokenizer import end_of_text
from moetrain.errors import ConfigError, DataError
from moetrain.hub.generate import Sampling, generate
from moetrain.model.gpt import GPT


def run_tasks(
    gpt: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    context: int,
    cache: bool,
    include: Path | None,
    limit: int | None,
    shots: int | None,
    batch: int,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, as the harness names them.

    Args:
        tasks: names of tasks.
        context: tokens the model looks back at most.
        cache: as ``hub.generate.generate``.
        include: a directory of task files of one's own, besides those of the harness.
        limit: examples of each task; None: all.
        shots: solved examples before each; None: as the task says.
        batch: continuations read in one pass.

    Raises:
        ConfigError: the harness is not installed, or there is no such task.
        DataError: a task has failed.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError([f"tasks need lm_eval ({error}): pip install 'moetrain[lm_eval]'"]) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # the index of its own thousands of tasks takes many seconds: not where one's own directory has them all
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    if include is not None and not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=str(include))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        where = f" or in {include}" if include else "; include=DIR names a directory of your own"
        raise ConfigError([f"tasks names {each!r}, which is not in lm_eval{where}" for each in unknown])
    model = native_model(gpt, tokenizer, context=context, cache=cache, batch=batch)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0
        )
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise DataError(f"lm_eval could not run {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return {task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in results.items()}  # fmt: skip


def native_model(gpt: GPT, tokenizer: Tokenizer, *, context: int, cache: bool, batch: int) -> Any:
    """Our model as the harness wants one (``lm_eval.api.model.TemplateLM``)."""
    from lm_eval.api.model import TemplateLM

    class Native(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self._device = gpt.device
            # like a context that is empty in the harness: our documents begin with the token that ends them
            self._end = end_of_text(tokenizer)

        @property
        def eot_token_id(self) -> int:
            return self._end

        @property
        def max_length(self) -> int:
            return context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids: list[int] = tokenizer.encode(string, add_special_tokens=False).ids
            return ids

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            # long ones first, so that what is read together is alike in length
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            answers: dict[int, tuple[float, bool]] = {}
            for first in range(0, len(order), batch):
                chosen = order[first : first + batch]
                pairs = [(requests[i][1], requests[i][2]) for i in chosen]
                answers |= dict(zip(chosen, likelihoods(gpt, pairs, context=context), strict=True))
            return [answers[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            sums = []
            for (text,) in (request.args for request in requests):
                windows = map(make_disjoint_window, get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self._end, max_seq_len=context, context_len=1
                ))  # fmt: skip
                answers = self._loglikelihood_tokens([(None, before, after) for before, after in windows])
                sums.append(sum(each for each, _ in answers))
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [_write(gpt, tokenizer, *request.args, context=context, cache=cache) for request in requests]

    return Native()


def _write(gpt: GPT, tokenizer: Tokenizer, prompt: str, how: dict[str, Any], *, context: int, cache: bool) -> str:
    until = how.get("until") or []
    sampling = Sampling(
        max_tokens=int(how.get("max_gen_toks") or 256),
        temperature=float(how.get("temperature") or 0.0) if how.get("do_sample") else 0.0,
        stop=tuple(each for each in ([until] if isinstance(until, str) else until) if each),
    )
    # as the harness asks a model of transformers: no document begins, and there is room for what is written
    room = max(1, context - sampling.max_tokens)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids[-room:] or [end_of_text(tokenizer)]
    pieces = generate(gpt, tokenizer, [ids], sampling=sampling, context=context, cache=cache)
    return "".join(piece.text for piece in pieces)


@torch.no_grad()
def likelihoods(gpt: GPT, pairs: Sequence[tuple[list[int], list[int]]], *, context: int) -> list[tuple[float, bool]]:
    """For each context and continuation, the log likelihood of the latter in nats, and whether greedy choice gives it.

    Args:
        pairs: token ids; of what is longer than ``context`` and one, the end counts.
    """
    device = gpt.device
    wholes = [(before + after)[-(context + 1) :] for before, after in pairs]
    longest = max(map(len, wholes)) - 1
    # padded behind, where causal attention does not look
    token_BS = torch.zeros(len(wholes), longest, dtype=torch.int64, device=device)
    for row, whole in enumerate(wholes):
        token_BS[row, : len(whole) - 1] = torch.tensor(whole[:-1])
    logit_BSV: Tensor = gpt(token_BS).logit_BSV.float()
    answers = []
    for row, (whole, (_, after)) in enumerate(zip(wholes, pairs, strict=True)):
        wanted = torch.tensor(whole[len(whole) - min(len(after), len(whole) - 1) :], device=device)
        end = len(whole) - 1
        logit_SV = logit_BSV[row, end - len(wanted) : end]
        nats = -float(nn.functional.cross_entropy(logit_SV, wanted, reduction="sum"))
        answers.append((nats, bool((logit_SV.argmax(-1) == wanted).all())))
    return answers
