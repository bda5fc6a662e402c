"""A model of `transformers` as a run of ours: safetensors to a checkpoint that any layout can start from.

Read and written one tensor at a time. What comes out is a directory like a run's, of step 0 and without moments, with
an experiment beside it that trains on from there (``init.weights``).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moetrain.archive.expected import Expected, expected_tensors
from moetrain.archive.written import Intervals, made_whole, write_checkpoint
from moetrain.checkpoint.store import Manifest
from moetrain.config.checks import check, resolve
from moetrain.config.freeze import flatten, freeze, to_dict, write_run
from moetrain.config.schema import RunConfig
from moetrain.data.corpus import TOKENIZER
from moetrain.data.tokenizer import end_of_text, fingerprint, load_tokenizer, vocabulary_size
from moetrain.errors import CheckpointError, ConfigError, DataError
from moetrain.hub import parity
from moetrain.hub.export import INDEX, ONE_FILE
from moetrain.hub.families import Family, settings_of
from moetrain.hub.parity import Parity
from moetrain.hub.tensors import IGNORED, Part, parts_of

FLOATS = ("F32", "F16", "BF16", "F64")
"""How safetensors names the types that weights may have."""


FEWEST = 0.9
"""Of the rows of an embedding have a token, as a rule; the rest is padding."""


@dataclass(frozen=True)
class Adopted:
    """What was made."""

    run_dir: Path
    run: RunConfig
    family: str
    parity: Parity | None
    """None: nobody asked."""
    experiment: str
    """Name of the experiment in ``run_dir/configs`` that trains on."""


def adopt(source: Path, out: Path, *, check: bool, warn: Callable[[str], None]) -> Adopted:
    """Make a run directory of a model directory of `transformers`.

    Args:
        source: with config.json, *.safetensors and tokenizer.json.
        out: a directory that is not there yet.
        check: hold the result against what `transformers` makes of ``source``.

    Raises:
        ConfigError: config.json is not of a model that ours can be, or the place is taken.
        CheckpointError: files are missing or damaged, or tensors are missing, left over or of another shape.
        DataError: the tokenizer is missing, or is another model's.
    """
    parity.libraries("import")
    with made_whole(out) as partial:
        config = _read_json(source / "config.json")
        run, family = _settings(config, source, name=name_of(out))
        files = _files(source)
        parts = [_as_named(part, files) for part in parts_of(run.model, family)]
        expected = expected_tensors(to_dict(run))
        _hold_names(source, parts, files, tied=run.model.tie_embeddings)
        tokens = _hold_tokenizer(source, config, rows=run.model.vocab_size, warn=warn)
        shutil.copyfile(source / TOKENIZER, partial / TOKENIZER)
        place = replace(run, run_dir=str(out), data=replace(run.data, tokenizer=str(out.resolve() / TOKENIZER)))
        write_run(place, partial)
        manifest = Manifest(step=0, tokens=0, seed=run.seed, world_size=1, expert_parallel=1, run=to_dict(place),
                            data={"tokenizer": tokens}, files=[], has_moments=False)  # fmt: skip
        _write(partial / "checkpoints", manifest, expected, parts, files)
        _write_experiment(partial / "configs" / "experiment", place, source=source, out=out)
        held = parity.compared(partial, source, warn=warn) if check else None
        if held is not None and not held.holds:
            raise CheckpointError(f"our model makes something else of {source} than transformers does, and was "
                                  f"removed: {held}")  # fmt: skip
    return Adopted(out, place, family.architecture, parity=held, experiment=str(run.name))


def _settings(config: dict[str, Any], source: Path, *, name: str) -> tuple[RunConfig, Family]:
    try:
        model, family = settings_of(config)
        # masters are fp32 in any case: this is what is computed in
        told = str(config.get("dtype") or config.get("torch_dtype"))
        model = replace(model, dtype="bf16" if told == "bfloat16" else "fp32")
        run = resolve(replace(freeze({"name": name}), model=model), default_processes=1)
        check(run, flatten(to_dict(run)))
    except ConfigError as error:
        raise ConfigError([f"{source / 'config.json'}: {each}" for each in error.problems]) from None
    return run, family


def name_of(out: Path) -> str:
    """What a run in a directory is called: a word that needs no quotes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", out.resolve().name)


def _files(source: Path) -> dict[str, Path]:
    """Name of each tensor there is -> its file."""
    _, safetensors = parity.libraries("import")
    if (source / INDEX).is_file():
        weight_map = _read_json(source / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(each, str) for each in weight_map.values()):
            raise CheckpointError(f"{source / INDEX} has no weight_map: download it again")
        foreign = [each for each in weight_map.values() if Path(each).name != each]
        if foreign:
            raise CheckpointError(f"{source / INDEX} names {foreign[0]!r}, which is not a file beside it")
        names = sorted(set(weight_map.values()))
    elif (source / ONE_FILE).is_file():
        names = [ONE_FILE]
    else:
        what = "pickled weights alone, which are not read" if list(source.glob("*.bin")) else "no weights"
        raise CheckpointError(f"{source} holds {what}: name a directory with {ONE_FILE} or {INDEX}")
    found: dict[str, Path] = {}
    for name in names:
        path = source / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {INDEX} names it: download it again")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is cut short or damaged ({error}): download it again") from None
    return found


def _as_named(part: Part, files: dict[str, Path]) -> Part:
    """GPT-2's tensors are named with and without the name of the model before them."""
    bare = part.name.removeprefix("transformer.")
    return replace(part, name=bare) if part.name not in files and bare in files else part


def _hold_names(source: Path, parts: list[Part], files: dict[str, Path], *, tied: bool) -> None:
    _, safetensors = parity.libraries("import")
    missing = [part.name for part in parts if part.name not in files]
    wanted = {part.name for part in parts}
    ignored = (*IGNORED, *((r"lm_head\.weight",) if tied else ()))
    extra = [name for name in files if name not in wanted and not any(re.fullmatch(each, name) for each in ignored)]
    problems = [_told("missing", missing), _told("not part of such a model", extra)]
    shapes, types = [], []
    by_file: dict[Path, list[Part]] = {}
    for part in parts:
        if part.name in files:
            by_file.setdefault(files[part.name], []).append(part)
    for path, own in by_file.items():
        with safetensors.safe_open(str(path), framework="pt") as file:
            for part in own:
                found = file.get_slice(part.name)
                if tuple(found.get_shape()) != part.shape:
                    shapes.append(f"{part.name} {list(found.get_shape())} instead of {list(part.shape)}")
                elif found.get_dtype() not in FLOATS:
                    types.append(f"{part.name} {found.get_dtype()}")
    problems += [_told("of another shape", shapes), _told("no fp32, bf16 or fp16", types)]
    if any(problems):
        raise CheckpointError(f"{source} is not what its config.json says: {'; '.join(filter(None, problems))}")


def _told(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}" if names else ""


def _hold_tokenizer(source: Path, config: dict[str, Any], *, rows: int, warn: Callable[[str], None]) -> str:
    """Fingerprint of the tokenizer."""
    path = source / TOKENIZER
    tokenizer = load_tokenizer(path)
    if vocabulary_size(tokenizer) > rows:
        raise DataError(f"{path} has ids up to {vocabulary_size(tokenizer) - 1:,}, but the model has {rows:,} rows: it "
                        "is another model's tokenizer")  # fmt: skip
    if vocabulary_size(tokenizer) < FEWEST * rows:
        warn(f"{path} has {vocabulary_size(tokenizer):,} ids, but the model {rows:,} rows: is it another model's?")
    told = config.get("eos_token_id")
    ends = told if isinstance(told, list) else [told]
    if told is not None and end_of_text(tokenizer) not in ends:
        warn(f"config.json ends a text with token {told}, but {path} with {end_of_text(tokenizer)} "
             f"({tokenizer.id_to_token(end_of_text(tokenizer))}), and so do we")  # fmt: skip
    return fingerprint(tokenizer)


def _write(root: Path, manifest: Manifest, expected: Expected, parts: list[Part], files: dict[str, Path]) -> None:
    def fill(intervals: Intervals) -> None:
        given = set()
        for part, values in _values(parts, files):
            intervals.write(part.ours, part.begin, values.float().flatten())
            given.add(part.ours)
        for name, shape in expected.states.items():
            if f"{name}/state" not in given:
                # the shares of the experts, even at first
                intervals.write(f"{name}/state", 0, torch.full(shape, 1 / shape[0]).flatten())

    write_checkpoint(root, manifest, sizes=expected.tensors(("fp32",)), fill=fill)


def _values(parts: list[Part], files: dict[str, Path]) -> Iterator[tuple[Part, Tensor]]:
    """In the shape of ours."""
    _, safetensors = parity.libraries("import")
    file, opened = None, None
    for part in parts:
        if files[part.name] != opened:
            opened = files[part.name]
            # memory-mapped: what is not read costs nothing
            file = safetensors.safe_open(str(opened), framework="pt")
        values = file.get_tensor(part.name)
        if not values.isfinite().all():
            raise CheckpointError(f"{opened} holds NaN or infinity in {part.name}: download it again")
        yield part, values.T if part.transposed else values


def _write_experiment(directory: Path, run: RunConfig, *, source: Path, out: Path) -> None:
    directory.mkdir(parents=True)
    settings = {
        "name": f"{run.name}-on",
        "model": to_dict(run)["model"],
        "data": {"tokenizer": run.data.tokenizer},
        "init": {"weights": str(out.resolve())},
    }
    head = f"# @package _global_\n# Trains on from {source.resolve()}.\n"
    text = head + yaml.safe_dump(settings, sort_keys=False)
    (directory / f"{run.name}.yaml").write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist: name a directory that transformers has saved") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings: download it again")
    return content
