"""Tune an exported model to preferences with TRL: by DPO, or by a reward model and RLOO.

    moetrain export runs/tiny out=tiny-hf
    python scripts/preferences.py dpo tiny-hf pairs.jsonl tiny-dpo
    python scripts/preferences.py reward tiny-hf pairs.jsonl tiny-reward
    python scripts/preferences.py rloo tiny-hf pairs.jsonl tiny-rloo --reward tiny-reward
    moetrain import tiny-dpo out=runs/tiny-dpo

Each row of pairs.jsonl has the texts prompt, chosen and rejected. The last pairs are held out; what the model makes of
them is told before and after. DPO: Rafailov et al. 2023, arXiv:2305.18290; the reward model has the loss of Bradley and
Terry, as in Ouyang et al. 2022, arXiv:2203.02155; RLOO, for which the prompts alone count: Ahmadian et al. 2024,
arXiv:2402.14740. What comes out is fp32, with the tokenizer of the model it was made
from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "chosen", "rejected")
RATES = {"dpo": 1e-6, "reward": 1e-4, "rloo": 1e-6}
"""Peak learning rates, where none is given."""
SHOWN = {"dpo": ("loss", "rewards/margins", "rewards/accuracies"), "reward": ("loss", "margin", "accuracy"),
         "rloo": ("reward", "kl")}  # fmt: skip
ANSWERS = 4
"""Of RLOO, to each prompt."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    options = arguments(sys.argv[1:])
    try:
        if not 0 < options.held_out < 1:
            raise ValueError(
                f"--held-out is {options.held_out}, but must lie in (0, 1): some pairs are learnt, some not"
            )
        if options.out.exists():
            raise ValueError(f"{options.out} exists already: name another directory, or remove it first")
        if not (options.model / "config.json").is_file():
            raise ValueError(f"{options.model} has no config.json: name a directory that moetrain export has written")
        if (options.reward is not None) != (options.how == "rloo"):
            raise ValueError("--reward names a reward model, which rloo needs and nothing else does")
        tune(options, read_pairs(options.pairs))
    except (ValueError, OSError, ImportError) as error:
        print(f"preferences: {error}", file=sys.stderr)
        sys.exit(2)


def arguments(words: list[str]) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=sorted(RATES))
    parser.add_argument("model", type=Path, help="a directory that moetrain export has written")
    parser.add_argument("pairs", type=Path, help="json lines with prompt, chosen and rejected")
    parser.add_argument("out", type=Path, help="a directory that is not there yet")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step, on each device")
    parser.add_argument("--lr", type=float, help="peak learning rate; without it, 1e-6, and 1e-4 for reward")
    parser.add_argument("--beta", type=float, default=0.1, help="not of reward: how dear it is to leave the old model")
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="share of the pairs that is not learnt, the last ones"
    )
    parser.add_argument("--reward", type=Path, help="of rloo: a directory that reward has written")
    parser.add_argument("--tokens", type=int, default=128, help="of rloo: of an answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Rows of texts, in order.

    Raises:
        ValueError: a row lacks a text, or there are fewer than two.
    """
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is no JSON: {error}") from None
            wrong = [name for name in COLUMNS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
            if wrong:
                raise ValueError(f"{path}:{number} must be an object with the texts {', '.join(COLUMNS)}, but has no "
                                 f"text {', '.join(wrong)}")  # fmt: skip
            pairs.append({name: row[name] for name in COLUMNS})
    if len(pairs) < 2:
        raise ValueError(f"{path} has {len(pairs)} pairs, but some are learnt and some held out: two at least")
    return pairs


def as_learnt(pair: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """A pair as the model saw text in training: in its chat template, or behind the token that begins a document."""
    if tokenizer.chat_template is None:
        return pair | {"prompt": tokenizer.bos_token + pair["prompt"]}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": pair[name]}] for name, role in roles.items()}


def tune(options: argparse.Namespace, pairs: list[dict[str, str]]) -> None:
    """Train, tell, and write the directory ``options.out``."""
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"needs trl ({error}): pip install 'moetrain[trl]'") from None
    from datasets import Dataset
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoTokenizer

    architecture = AutoConfig.from_pretrained(options.model)
    if options.how == "reward" and type(architecture) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(f"transformers has no reward model of the architecture {architecture.model_type}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.how == "rloo" and options.tokens >= tokenizer.model_max_length:
        raise ValueError(f"--tokens is {options.tokens}, but must leave room for a prompt in the model's context of "
                         f"{tokenizer.model_max_length}")  # fmt: skip
    rows = [as_learnt(pair, tokenizer) for pair in pairs]
    learnt = max(1, math.floor(len(rows) * (1 - options.held_out)))
    config, trainer_of = {"dpo": (trl.DPOConfig, trl.DPOTrainer), "reward": (trl.RewardConfig, trl.RewardTrainer),
                          "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[options.how]  # fmt: skip
    given = {} if options.reward is None else {"reward_funcs": str(options.reward)}
    with tempfile.TemporaryDirectory() as place:
        trainer = trainer_of(
            model=str(options.model),
            args=config(**settings(options, place, context=tokenizer.model_max_length)),
            train_dataset=Dataset.from_list(rows[:learnt]),
            eval_dataset=Dataset.from_list(rows[learnt:]),
            processing_class=tokenizer,
            **given,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    tell(options.how, before, after, pairs=len(rows) - learnt)
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        shutil.copyfile(options.model / name, partial / name)
    os.rename(partial, options.out)
    if options.how != "reward":
        print(f"to take it back:  moetrain import {options.out} out=runs/{options.out.name}")


def settings(options: argparse.Namespace, place: str, *, context: int) -> dict[str, Any]:
    """What the trainers of TRL are told.

    Args:
        place: a directory for what the trainer writes on its way.
        context: tokens that the model looks back at.
    """
    import torch

    own = {
        "dpo": {"beta": options.beta, "max_length": context},
        "reward": {"max_length": context},
        "rloo": {"beta": options.beta, "max_completion_length": options.tokens, "num_generations": ANSWERS},
    }[options.how]
    rows = options.batch * (ANSWERS if options.how == "rloo" else 1)
    return own | {
        "output_dir": place,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "learning_rate": RATES[options.how] if options.lr is None else options.lr,
        "bf16": torch.cuda.is_available(),
        "seed": options.seed,
        "save_strategy": "no",
        "report_to": "none",
    }


def tell(how: str, before: dict[str, float], after: dict[str, float], *, pairs: int) -> None:
    """A line for each number: before, after."""
    print(f"{pairs} held-out pairs")
    for name in (each for each in SHOWN[how] if f"eval_{each}" in after):  # no kl where nothing holds it back
        print(f"{name.rpartition('/')[2]:12} {before[f'eval_{name}']:8.4f} before  {after[f'eval_{name}']:8.4f} after")


if __name__ == "__main__":
    main()
