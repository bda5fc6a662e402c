"""The model card of an exported model: what it is and how it was trained, from what the run has written down."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from moetrain import __version__
from moetrain.archive.listing import held_out_losses
from moetrain.checkpoint.store import Manifest
from moetrain.config.identity import ORIGIN_FILE
from moetrain.config.schema import RunConfig
from moetrain.plan.flops import count_parameters, flops_per_token, format_count

_OPEN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
{prompt}
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```"""
_TEXT = """# in training, every document began with the end-of-text token
prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")"""
_CHAT = """messages = [{"role": "user", "content": "Who are you?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
USES = {
    "text": _OPEN.format(prompt=_TEXT),
    "chat": _OPEN.format(prompt=_CHAT),
    "gguf": "`model.gguf` holds weights and tokenizer for llama.cpp and what is built on it.",
}
"""How it is asked: for text, as a conversation, or by llama.cpp."""


def model_card(
    run: RunConfig, manifest: Manifest, *, run_dir: Path, family: str, dtype: str, checked: str, use: str
) -> str:
    """README.md of the export.

    Args:
        checked: how it was held against our model.
        use: one of ``USES``.
    """
    model, moe, count = run.model, run.model.moe, count_parameters(run.model)
    sparse = "dense" if moe is None else f"{moe.num_experts} experts, {moe.top_k} for each token, router {moe.router}"
    length = run.sequence_length
    held_out = manifest.held_out_loss
    if held_out is None:
        held_out = held_out_losses(run_dir)[0].get(manifest.step)
    loss = "" if held_out is None else f"{held_out:.4f} nats per token"
    flops = flops_per_token(model, sequence_length=length) * manifest.tokens
    rows = {
        "parameters": f"{format_count(count.total)}, {format_count(count.active)} active for each token",
        "blocks": f"{model.num_layers} of width {model.d_model}, {sparse}",
        "context": f"{model.context:,} tokens, trained on sequences of {length:,}",
        "trained on": f"{manifest.tokens:,} tokens in {manifest.step:,} steps, {flops:.3g} FLOPs" if manifest.tokens
                      else "nothing since it came here",
        "data": _data(run),
        "batch": f"{run.batch.global_batch} sequences",
        "optimizer": f"AdamW, peak learning rate {run.optim.lr:g}, schedule {run.schedule.kind}",
        "precision": f"trained in {model.dtype}, exported in {dtype}",
        "held-out loss": loss,
        "seed": str(run.seed),
        "made with": f"moetrain {__version__}{_commit(run_dir)}, exported {time.strftime('%Y-%m-%d')}",
        "checked": checked,
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    tags = "".join(f"- {tag}\n" for tag in ("moetrain", *(("moe",) if moe else ())))
    return f"""---
library_name: {"gguf" if use == "gguf" else "transformers"}
pipeline_tag: text-generation
tags:
{tags}---
# {run.name}

A language model of the architecture `{family}`, trained with moetrain.

| | |
|---|---|
{table}

{USES[use]}

It was trained to go on with text. Nobody has examined here what it says of people, or whether it is right.
"""


def _data(run: RunConfig) -> str:
    if run.data.sources is not None:
        return ", ".join(run.data.sources)
    return f"{run.data.name} ({', '.join(run.data.text)})"


def _commit(run_dir: Path) -> str:
    """The code of the newest start, as far as it is known."""
    try:
        newest: dict[str, Any] = json.loads((run_dir / ORIGIN_FILE).read_text(encoding="utf-8"))["starts"][-1]
        return f" at commit {newest['code']['commit'][:12]}"
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
