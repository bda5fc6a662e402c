"""Every planted fault is found by the check that is meant for it, on checkpoints of real engines."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.archive import stored as stored_module
from moetrain.archive.doctor import Check, examine
from moetrain.archive.expected import expected_tensors
from moetrain.archive.stored import Piece, Stored
from moetrain.checkpoint import state, store

W_IN, W_OUT = (f"blocks.1.feed_forward.experts.{name}" for name in ("w_in", "w_out"))
DENSE = "blocks.0.attention.qkv.weight"
ROUTER = "blocks.0.feed_forward.router"
PER_EXPERT = {W_IN: 2 * 32 * 32, W_OUT: 32 * 32}


def report(directory: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(directory, expect=expected_tensors)}


def failed(directory: Path) -> set[str]:
    return {name for name, check in report(directory).items() if check.passed is False}


@pytest.fixture
def checkpoint(real_runs: Path) -> Path:
    """One to damage, of two ranks that shared the experts."""
    return real_runs / "ep2" / "checkpoints" / "step_00000003"


def sign(directory: Path, **changed: Any) -> None:
    """Make the manifest fit the files: as a program that writes the wrong thing would."""
    manifest = store.read_manifest(directory)
    files = [store.digest_file(directory / each.name) for each in manifest.files]
    content = asdict(replace(manifest, files=files)) | changed
    (directory / store.MANIFEST).write_text(json.dumps(content))


def begin_of(directory: Path, piece: Piece) -> int:
    """Where in its file the values of an interval begin, as torch finds them."""
    with (directory / piece.file).open("rb") as file:
        file.seek(piece.position)
        record = io.BytesIO(file.read(piece.length))
    return piece.position + int(torch._C.PyTorchFileReader(record).get_record_offset("data/0"))


def poke(directory: Path, name: str, at: int, values: torch.Tensor) -> None:
    """Write values over those in the files, and sign."""
    stored = Stored(directory)
    for piece in stored.tensors[name].pieces:
        begin, end = max(at, piece.offset), min(at + values.numel(), piece.end)
        if begin < end:
            with (directory / piece.file).open("r+b") as file:
                file.seek(begin_of(directory, piece) + (begin - piece.offset) * values.itemsize)
                file.write(values[begin - at : end - at].numpy().tobytes())
    assert torch.equal(
        Stored(directory).read(name, at, at + values.numel()).view(torch.uint8), values.view(torch.uint8)
    )
    sign(directory)


def change_index(directory: Path, change: Callable[[Any], None]) -> None:
    index = state.read_index(directory)
    change(index)
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    sign(directory)


def drop_tensor(name: str) -> Callable[[Path], None]:
    return lambda directory: change_index(directory, lambda index: index.state_dict_metadata.pop(name))


def drop_interval(name: str) -> Callable[[Path], None]:
    return lambda directory: change_index(directory, lambda index: index.state_dict_metadata[name].chunks.pop())


def fill(name: str, value: float, *, at: int = 0, count: int | None = None) -> Callable[[Path], None]:
    def corrupt(directory: Path) -> None:
        numel = Stored(directory).tensors[name].numel
        poke(directory, name, at, torch.full((numel if count is None else count,), float(value)))

    return corrupt


def copy_expert(name: str, *, of: int, over: int) -> Callable[[Path], None]:
    def corrupt(directory: Path) -> None:
        size = PER_EXPERT[name.partition("/")[0]]
        poke(directory, name, over * size, Stored(directory).read(name, of * size, (of + 1) * size))

    return corrupt


def truncate(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 5000)


def flip_bit(directory: Path) -> None:
    """Of a weight's last digit: the value stays a plausible one."""
    piece = Stored(directory).tensors[f"{DENSE}/fp32"].pieces[0]
    at = begin_of(directory, piece)
    content = bytearray((directory / piece.file).read_bytes())
    content[at] ^= 1
    (directory / piece.file).write_bytes(content)


def swap_files(directory: Path) -> None:
    one, two = directory / "__0_0.distcp", directory / "__1_0.distcp"
    one.rename(directory / "beside")
    two.rename(one)
    (directory / "beside").rename(two)


def point_twice(directory: Path) -> None:
    """Two intervals of the index lead to the same place in a file."""

    def change(index: Any) -> None:
        own = [key for key in index.storage_data if key.fqn == f"{W_IN}/fp32"]
        index.storage_data[own[0]] = index.storage_data[own[1]]

    change_index(directory, change)


def grow_interval(directory: Path) -> None:
    """Its last interval reaches back into the one before."""

    def change(index: Any) -> None:
        found = index.state_dict_metadata[f"{W_IN}/exp_avg"]
        chunk = max(found.chunks, key=lambda each: each.offsets[0])
        key = next(k for k in index.storage_data if k.fqn == f"{W_IN}/exp_avg" and k.offset == chunk.offsets)
        moved = torch.Size([chunk.offsets[0] - 10])
        index.storage_data[replace(key, offset=moved)] = index.storage_data.pop(key)
        found.chunks[found.chunks.index(chunk)] = replace(chunk, offsets=moved)

    change_index(directory, change)


def add_tensor(directory: Path) -> None:
    def change(index: Any) -> None:
        index.state_dict_metadata["blocks.7.norm.weight/fp32"] = index.state_dict_metadata["norm.weight/fp32"]
        for key in [key for key in index.storage_data if key.fqn == "norm.weight/fp32"]:
            index.storage_data[replace(key, fqn="blocks.7.norm.weight/fp32")] = index.storage_data[key]

    change_index(directory, change)


def other_settings(**changed: Any) -> Callable[[Path], None]:
    def corrupt(directory: Path) -> None:
        run = store.read_manifest(directory).run
        moe = {key: value for key, value in changed.items() if key in run["model"]["moe"]}
        rest = {key: value for key, value in changed.items() if key not in moe}
        sign(directory, run=run | {"model": run["model"] | rest | {"moe": run["model"]["moe"] | moe}})

    return corrupt


def drop_from_manifest(directory: Path) -> None:
    files = [asdict(each) for each in store.read_manifest(directory).files if each.name != "__1_0.distcp"]
    content = json.loads((directory / store.MANIFEST).read_text())
    (directory / store.MANIFEST).write_text(json.dumps(content | {"files": files}))


EXPERT = PER_EXPERT[W_IN]
FAULTS: dict[str, tuple[Callable[[Path], Any], set[str], str]] = {
    "a file cut short": (truncate, {"files", "values"}, "__0_0.distcp has "),
    "a flipped bit": (flip_bit, {"files"}, "has changed: its xxh128 is not the one in manifest.json"),
    "a missing file": (lambda d: (d / "__1_0.distcp").unlink(), {"files", "values"}, "__1_0.distcp is missing"),
    "a missing index": (lambda d: (d / ".metadata").unlink(), {"files", "index"}, ".metadata is missing"),
    "swapped files": (swap_files, {"files", "values"}, "__1_0.distcp"),
    "a file that the manifest does not name": (drop_from_manifest, {"intervals"}, "which the manifest does not name"),
    "a missing parameter": (drop_tensor("norm.weight/fp32"), {"tensors", "size"}, "norm.weight/fp32 is missing"),
    "a missing router state": (drop_tensor(f"{ROUTER}.bias_E/state"), {"tensors"}, "bias_E/state is missing"),
    "a missing block of experts": (drop_tensor(f"{W_IN}/fp32"), {"tensors", "experts", "size"},
                                   f"{W_IN}/fp32: expert 0, 1, 2, 3 is missing"),
    "a tensor too many": (add_tensor, {"tensors", "intervals", "size"}, "blocks.7.norm.weight/fp32 is no tensor of"),
    "an expert copied over another": (copy_expert(f"{W_IN}/fp32", of=0, over=3), {"distinct experts"},
                                      f"{W_IN}/fp32: experts 0 and 3 are byte-equal"),
    "half an expert copied over another": (copy_expert(f"{W_OUT}/fp32", of=2, over=1), {"distinct experts"},
                                           f"{W_OUT}/fp32: experts 1 and 2 are byte-equal"),
    "the moments of an expert copied over another's": (copy_expert(f"{W_IN}/exp_avg", of=1, over=2),
                                                       {"distinct experts"}, "exp_avg: experts 1 and 2"),
    "a missing moment": (drop_tensor(f"{DENSE}/exp_avg_sq"), {"moments", "size"}, f"{DENSE}/exp_avg_sq is missing"),
    "a first moment set to 0": (fill(f"{DENSE}/exp_avg", 0), {"moments alive"}, f"{DENSE}/exp_avg: all 0"),
    "a second moment set to 0": (fill(f"{DENSE}/exp_avg_sq", 0), {"moments alive"}, f"{DENSE}/exp_avg_sq is 0 at"),
    "the second moment of one expert set to 0": (fill(f"{W_IN}/exp_avg_sq", 0, at=EXPERT, count=EXPERT),
                                                 {"moments alive"}, f"{W_IN}/exp_avg_sq (expert 1) is 0 at"),
    "a gap": (drop_interval(f"{DENSE}/fp32"), {"intervals", "size", "values"}, f"of {DENSE}/fp32"),
    "a gap in the experts": (drop_interval(f"{W_IN}/exp_avg"), {"intervals", "experts", "size", "values"},
                             "is missing, or part of it"),
    "intervals that overlap": (grow_interval, {"intervals", "experts", "values"}, f"of {W_IN}/exp_avg"),
    "two intervals in one place": (point_twice, {"intervals", "distinct experts"}, "share bytes of"),
    "NaN in a weight": (fill(f"{DENSE}/fp32", float("nan"), at=77, count=1), {"values"},
                        f"{DENSE}/fp32: 1 values are not finite"),
    "infinity in an expert": (fill(f"{W_OUT}/fp32", float("inf"), at=3000, count=2), {"values"},
                              f"{W_OUT}/fp32 (expert 2): 2 values are not finite"),
    "a second moment below 0": (fill(f"{DENSE}/exp_avg_sq", -1e-9, at=5, count=3), {"values"}, "3 values are below 0"),
    "settings of a wider model": (other_settings(d_model=64), {"tensors", "moments", "experts", "size"},
                                  "embedding.weight/fp32 has 4,096 elements, but must have 8,192"),
    "settings of more experts": (other_settings(num_experts=8), {"tensors", "moments", "experts", "size"},
                                 "experts.w_in/fp32: expert 4, 5, 6, 7 is missing"),
    "settings of fewer blocks": (other_settings(num_layers=1), {"tensors", "size"}, "is no tensor of this model"),
    "settings of no model": (other_settings(num_heads=0), {"settings"}, "model.num_heads is 0, but must be above 0"),
    "settings nobody knows": (other_settings(wings=2), {"settings"}, "'model.wings' is not a setting"),
    "an unreadable manifest": (lambda d: (d / "manifest.json").write_text("{"), {"manifest"}, "JSONDecodeError"),
    "a manifest of another format": (lambda d: sign(d, format=99), {"manifest"}, "has format 99"),
    "a manifest of another step": (lambda d: sign(d, step=4), {"manifest"}, "is of step 4, not of the directory's"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(checkpoint, fault):
    corrupt, expected, told = FAULTS[fault]
    corrupt(checkpoint)
    found = report(checkpoint)
    assert {name for name, check in found.items() if check.passed is False} == expected
    assert told in "\n".join(found[name].detail for name in expected)


@pytest.mark.parametrize("run", ["ep2", "dp2"])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_whole_one_passes_on_every_layout(real_runs, run, step):
    found = report(real_runs / run / "checkpoints" / f"step_{step:08d}")
    unchecked = {name for name, check in found.items() if check.passed is None}
    # a checkpoint of the first step can tell less
    assert unchecked == {"certificate"} | ({"moments alive", "distinct experts"} if step == 0 else set())
    assert all(check.passed for name, check in found.items() if name not in unchecked)
    assert found["experts"].detail == "2 blocks x 4 experts, each once"


@pytest.mark.parametrize("block", [1 << 22, 37])
def test_values_read_in_small_blocks_tell_the_same(checkpoint, monkeypatch, block):
    monkeypatch.setattr(stored_module, "BLOCK", block)
    assert failed(checkpoint) == set()
    copy_expert(f"{W_IN}/fp32", of=0, over=3)(checkpoint)
    fill(f"{W_IN}/exp_avg_sq", 0, at=EXPERT, count=EXPERT)(checkpoint)
    found = report(checkpoint)
    assert {name for name, check in found.items() if check.passed is False} == {"distinct experts", "moments alive"}
    assert "(expert 1)" in found["moments alive"].detail


def test_both_moments_lost_are_lost_memory_save_in_a_router_that_may_have_none(checkpoint):
    for moment in ("exp_avg", "exp_avg_sq"):
        fill(f"{ROUTER}.weight/{moment}", 0)(checkpoint)
    assert failed(checkpoint) == set()
    for moment in ("exp_avg", "exp_avg_sq"):
        fill(f"{DENSE}/{moment}", 0)(checkpoint)
    assert f"{DENSE}/exp_avg and exp_avg_sq: all 0" in report(checkpoint)["moments alive"].detail


def test_experts_that_no_token_has_reached_may_have_the_same_moments_none(checkpoint):
    for moment in ("exp_avg", "exp_avg_sq"):
        fill(f"{W_IN}/{moment}", 0, count=2 * EXPERT)(checkpoint)
    assert failed(checkpoint) == set()


def test_experts_that_begin_as_copies_are_whole_at_step_0(real_runs):
    directory = real_runs / "ep2" / "checkpoints" / "step_00000000"
    copy_expert(f"{W_IN}/fp32", of=0, over=1)(directory)
    assert failed(directory) == set()


def test_a_foreign_index_is_told_and_not_run(checkpoint, tmp_path):
    mark = tmp_path / "was_here"

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap()))
    sign(checkpoint)
    found = report(checkpoint)
    assert {name for name, check in found.items() if check.passed is False} == {"index"}
    assert "which no checkpoint of moetrain holds" in found["index"].detail
    assert not mark.exists()
    assert found["experts"] == Check("experts", None, "the index cannot be read")


def test_a_directory_of_another_step_is_told(checkpoint):
    other = checkpoint.with_name("step_00000009")
    checkpoint.rename(other)
    found = report(other)
    assert {name for name, check in found.items() if check.passed is False} == {"manifest"}
    assert "is of step 3, not of the directory's" in found["manifest"].detail


def test_a_directory_that_lost_everything_is_not_whole(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    assert failed(checkpoint) == {"manifest", "index"}


def test_a_file_beside_it_is_named_and_no_fault(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    found = report(checkpoint)["files"]
    assert found.passed
    assert found.detail.endswith("; not of it: notes.txt")


def test_a_second_moment_that_may_fade_first_is_no_fault(checkpoint):
    fill(f"{W_IN}/exp_avg_sq", 0, at=EXPERT, count=EXPERT)(checkpoint)
    run = store.read_manifest(checkpoint).run
    sign(checkpoint, run=run | {"optim": run["optim"] | {"beta1": 0.9, "beta2": 0.5}})
    assert report(checkpoint)["moments alive"].passed is None
    sign(checkpoint, run=run | {"optim": run["optim"] | {"beta1": 0.9, "beta2": 0.999}})
    assert report(checkpoint)["moments alive"].passed is False
