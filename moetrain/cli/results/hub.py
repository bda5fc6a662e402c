"""The verbs by which models go to `transformers` and come from it: export, import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.cli.options import paths_and_settings, warn
from moetrain.errors import ConfigError

HELP = {
    "export": """usage: moetrain export RUN out=DIR [format=gguf] [step=N] [dtype=…] [shard_gb=X] [check=false]

Writes the model of a run's newest whole checkpoint (or of step N) as a directory that transformers loads: safetensors,
config.json, tokenizer and a model card. It leaves as Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE, Llama, Qwen3 or
GPT-2, whichever says the same; where none does, every setting in the way is named.

  format      hf, as above; or gguf, one file for llama.cpp (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, Llama or Qwen3 with a
              tokenizer trained here; pip install 'moetrain[gguf]'), which is not held against ours
  dtype       of the weights, fp32, bf16 or fp16; without it, that of the run
  shard_gb    files of weights are no larger, 5 as a rule; so much memory is needed
  check       before it is done, the scores of transformers are held against ours, which takes the memory of one model
              in fp32; false leaves that out

examples:
  moetrain export runs/tiny out=tiny-hf dtype=bf16
  moetrain export runs/tiny out=tiny-gguf format=gguf dtype=fp16
""",
    "import": """usage: moetrain import PATH out=RUN_DIR [check=false]

Brings a model that transformers has saved (safetensors, config.json, tokenizer.json) here, as a checkpoint of step 0
that every layout can start from: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE, Llama, Qwen3 or GPT-2. What our model
cannot be, and every tensor that is missing, left over or of another shape, is named. Beside it lies an experiment that
trains on from there; moetrain says how.

  check       before it is done, our scores are held against those of transformers, which takes the memory of one model
              in fp32; false leaves that out

examples:
  moetrain import tiny-hf out=runs/imported
""",
}
FORMATS = ("hf", "gguf")


@dataclass(frozen=True, kw_only=True)
class _Export:
    out: str | None = None
    format: str = "hf"
    step: int | None = None
    dtype: str | None = None
    shard_gb: float = 5.0
    check: bool = True


@dataclass(frozen=True, kw_only=True)
class _Import:
    out: str | None = None
    check: bool = True


def export(words: Sequence[str]) -> int:
    """The verb `export`."""
    (run_dir,), wanted = paths_and_settings(words, _Export, paths=["RUN"])
    problems = []
    if wanted.format not in FORMATS:
        problems.append(f"format is {wanted.format!r}, but must be one of {', '.join(FORMATS)}")
    if wanted.format == "gguf" and wanted.shard_gb != _Export().shard_gb:
        problems.append(f"shard_gb is {wanted.shard_gb}, but format=gguf writes one file: leave it out")
    if wanted.dtype not in (None, "fp32", "bf16", "fp16"):
        problems.append(f"dtype is {wanted.dtype!r}, but must be one of fp32, bf16, fp16")
    if not wanted.shard_gb > 0:
        problems.append(f"shard_gb is {wanted.shard_gb}, but must be above 0")
    out = _out(wanted.out, problems, example="tiny-hf")
    from moetrain.archive.listing import in_bytes
    from moetrain.hub.export import export as write

    if wanted.format == "gguf":
        from moetrain.hub.gguf.export import export_gguf

        done = export_gguf(run_dir, out, step=wanted.step, dtype=wanted.dtype, warn=warn)
    else:
        done = write(run_dir, out, step=wanted.step, dtype=wanted.dtype, shard_bytes=int(wanted.shard_gb * 1e9),
                     check=wanted.check, warn=warn)  # fmt: skip
    files = "1 file" if done.files == 1 else f"{done.files} files"
    print(f"{done.directory}: {done.family}, {in_bytes(done.nbytes)} of weights in {files}")
    print(
        f"held against our model: {done.parity}"
        if done.parity
        else f"not held against our model ({'check=false' if wanted.format == 'hf' else 'format=gguf'})"
    )
    return 0


def import_(words: Sequence[str]) -> int:
    """The verb `import`."""
    (source,), wanted = paths_and_settings(words, _Import, paths=["PATH"])
    out = _out(wanted.out, [], example="runs/imported")
    from moetrain.hub.adopt import adopt
    from moetrain.plan.flops import count_parameters, format_count

    done = adopt(source, out, check=wanted.check, warn=warn)
    count = count_parameters(done.run.model)
    print(
        f"{out}: {done.family}, {format_count(count.total)} parameters, {format_count(count.active)} active per token"
    )
    print(f"held against transformers: {done.parity}" if done.parity else "not held against transformers (check=false)")
    print(f"to train on:  moetrain train --config-dir {out}/configs experiment={done.experiment} data.text=…")
    return 0


def _out(given: str | None, problems: list[str], *, example: str) -> Path:
    if not given:
        problems = [*problems, f"out is not given, but says where to write: e.g. out={example}"]
    if problems:
        raise ConfigError(problems)
    return Path(str(given))
