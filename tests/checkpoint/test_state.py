"""Intervals of global tensors, written by one layout and read by another."""

from __future__ import annotations

import enum
import importlib
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from moetrain.checkpoint import state, store
from moetrain.checkpoint.state import Fragment, load, newest_whole, save
from moetrain.errors import CheckpointError

SIZES = {"a.w/fp32": 3700, "b.w/exp_avg": 64, "c.bias/fp32": 1, "d.w_in/fp32": 2400, "e.w/exp_avg_sq": 7}
HALF = {"d.w_in/fp32"}
"""In bf16; the others in fp32."""

Layout = list[dict[str, tuple[int, int]]]
"""For each rank: name -> (begin, end) of its interval."""

# uneven; b on both ranks; c on one alone; d with the ranks the other way round; e in one element and the rest
ON_TWO: Layout = [
    {"a.w/fp32": (0, 3000), "b.w/exp_avg": (0, 64), "d.w_in/fp32": (800, 2400), "e.w/exp_avg_sq": (0, 1)},
    {"a.w/fp32": (3000, 3700), "b.w/exp_avg": (0, 64), "c.bias/fp32": (0, 1), "d.w_in/fp32": (0, 800),
     "e.w/exp_avg_sq": (1, 7)},
]  # fmt: skip
WHOLE = {name: (0, size) for name, size in SIZES.items()}
OTHERS: dict[str, Layout] = {
    "one": [WHOLE],
    "two, all on both": [WHOLE, WHOLE],
    "two, split elsewhere": [
        {"a.w/fp32": (0, 1), "d.w_in/fp32": (0, 1200), "b.w/exp_avg": (60, 64)},
        {"a.w/fp32": (1, 3700), "d.w_in/fp32": (1200, 2400), "b.w/exp_avg": (0, 60), "c.bias/fp32": (0, 1)},
    ],
    "three": [
        {"a.w/fp32": (0, 1234), "d.w_in/fp32": (0, 700), "e.w/exp_avg_sq": (0, 7)},
        {"a.w/fp32": (1234, 3001), "d.w_in/fp32": (700, 1500), "b.w/exp_avg": (0, 64)},
        {"a.w/fp32": (3001, 3700), "d.w_in/fp32": (1500, 2400), "b.w/exp_avg": (0, 64), "c.bias/fp32": (0, 1)},
    ],
}


def content(name: str, *, step: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(step * 100 + list(SIZES).index(name))
    return torch.randn(SIZES[name], generator=generator).to(torch.bfloat16 if name in HALF else torch.float32)


def fragments(held: dict[str, tuple[int, int]], *, step: int = 1) -> list[Fragment]:
    """As the engine holds them: each a view into the middle of a longer flat tensor."""
    found = []
    for name, (begin, end) in held.items():
        flat = torch.full((end - begin + 10,), 7.0, dtype=content(name).dtype)
        flat[5:-5] = content(name, step=step)[begin:end] if step else -1.0
        found.append(Fragment(name, flat.narrow(0, 5, end - begin), begin, SIZES[name]))
    return found


def manifest(step: int) -> store.Manifest:
    return store.Manifest(step=step, tokens=0, seed=0, world_size=2, expert_parallel=1, run={}, data={}, files=[])


def assert_loaded(held: dict[str, tuple[int, int]], found: list[Fragment], *, step: int = 1) -> None:
    for fragment in found:
        begin, end = held[fragment.name]
        expected = content(fragment.name, step=step)[begin:end]
        assert torch.equal(fragment.view, expected), fragment.name
        around = fragment.view.as_strided((end - begin + 10,), (1,), 0)
        assert (around[:5] == 7).all(), "what lies beside the view is not touched"
        assert (around[-5:] == 7).all()


def message_of(action: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def save_layout(rank: int, root: Path, *, step: int, layout: Layout = ON_TWO) -> Path:
    return save(root, fragments(layout[rank], step=step), manifest=manifest(step), group=dist.group.WORLD)


def load_layout(rank: int, directory: Path, *, layout: Layout) -> None:
    found = fragments(layout[rank], step=0)
    load(directory, found, group=dist.group.WORLD)
    assert_loaded(layout[rank], found)


def _save_and_load_elsewhere(rank: int, root: Path) -> None:
    directory = save_layout(rank, root, step=1)
    assert directory == root / "step_00000001"
    for name in ("two, all on both", "two, split elsewhere"):
        load_layout(rank, directory, layout=OTHERS[name])
    wrong = {"a.w/fp32": (0, 10), **({"f.w/fp32": (0, 1)} if rank == 1 else {})}
    views = [Fragment(name, torch.zeros(end), 0, SIZES.get(name, 1)) for name, (_, end) in wrong.items()]
    told = message_of(lambda: load(directory, views, group=dist.group.WORLD))
    assert "f.w/fp32" in told, "the rank that has all of its own says so too"


def _load(rank: int, directory: Path) -> None:
    load_layout(rank, directory, layout=OTHERS["three"])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "checkpoints"


@pytest.fixture
def saved(kept: Path, ranks: Any) -> Path:
    """A checkpoint of two ranks, written once, and held against two other splits by the same ranks."""
    directory = store.step_directory(kept, 1)
    if not directory.exists():
        ranks(2, _save_and_load_elsewhere, kept)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def test_what_two_ranks_saved_two_others_load_bit_by_bit(saved):
    names = sorted(path.name for path in saved.iterdir())
    assert names == [".metadata", "__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__1_1.distcp", "manifest.json"]
    assert {file.name for file in store.verify(saved).files} == set(names) - {"manifest.json"}


def test_three_ranks_load_it_bit_by_bit(saved, ranks):
    ranks(3, _load, saved)


def test_one_process_without_a_group_loads_it_bit_by_bit(saved):
    found = fragments(WHOLE, step=0)
    load(saved, found, group=None)
    assert_loaded(WHOLE, found)


def test_what_several_ranks_hold_is_written_once(saved):
    held_twice = SIZES["b.w/exp_avg"]
    numel = sum(SIZES.values())
    written = sum(path.stat().st_size for path in saved.glob("*.distcp"))
    bytes_of_values = 4 * numel - 2 * SIZES["d.w_in/fp32"]
    # each interval is a file of torch.save of its own inside, of some 1.3 KB beside the values
    assert bytes_of_values < written < bytes_of_values + 2000 * 9
    assert held_twice * 4 < 2000
    first, second = ((saved / f"__0_{number}.distcp").stat().st_size for number in (0, 1))
    assert first > 4 * 3000, "the longest tensor fills one file"
    assert second > 2 * 1600 + 4 * 64, "and the other takes the rest"
    index = state.read_index(saved)
    assert len(index.state_dict_metadata["b.w/exp_avg"].chunks) == 1


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("f.w/fp32", 4, "f.w/fp32"), ("b.w/exp_avg", 65, "b.w/exp_avg"), ("b.w/exp_avg", 63, "b.w/exp_avg")],
    ids=["missing", "longer in the model", "shorter in the model"],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(saved, name, size, message):
    told = message_of(lambda: load(saved, [Fragment(name, torch.zeros(size), 0, size)], group=None))
    assert told.startswith(f"{saved} does not fit this model: ")
    assert message in told
    assert "\n" not in told


class Trap:
    """Runs a command when unpickled, as an index from a stranger might."""

    def __init__(self, function: Any, *arguments: str) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return self.call


def hit(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["os.system", "eval", "a function of a package", "torch.load"])
def test_an_index_that_would_run_something_is_refused_and_runs_nothing(copy, tmp_path, kind, protocol):
    mark = str(tmp_path / "was_here")
    traps = {
        "os.system": Trap(os.system, f"touch {mark}"),
        "eval": Trap(eval, f"__import__('pathlib').Path({mark!r}).touch()"),
        "a function of a package": Trap(hit, mark),
        "torch.load": Trap(torch.load, mark),
    }
    with (copy / ".metadata").open("wb") as file:
        pickle.dump(traps[kind], file, protocol=protocol)
    told = message_of(lambda: load(copy, fragments(WHOLE, step=0), group=None))
    assert "which no checkpoint of moetrain holds" in told
    assert not Path(mark).exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"junk", pickle.dumps(3)])
def test_a_damaged_index_is_told(copy, content):
    (copy / ".metadata").write_bytes(content)
    assert message_of(lambda: load(copy, fragments(WHOLE, step=0), group=None)).startswith(f"{copy} does not fit")


def test_the_names_an_index_may_hold_are_there_in_this_torch():
    for module, names in state._INDEX_NAMES.items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_an_index_written_by_another_python_is_read(copy, module):
    """Python 3.13 pickles paths under another name than those before and after it."""
    index = (copy / ".metadata").read_bytes()
    written = "pathlib._local" if b"pathlib._local" in index else "pathlib"

    def as_text(name: str) -> bytes:
        return b"\x8c" + bytes([len(name)]) + name.encode()

    if as_text(written) in index:
        changed = index.replace(as_text(written), as_text(module))
        # protocol 4 frames say how long they are: without them the lengths do not matter
        while b"\x95" in changed[:16]:
            at = changed.index(b"\x95")
            changed = changed[:at] + changed[at + 9 :]
        (copy / ".metadata").write_bytes(changed)
    else:
        (copy / ".metadata").write_bytes(index.replace(f"c{written}\n".encode(), f"c{module}\n".encode()))
    assert module.encode() in (copy / ".metadata").read_bytes()
    load(copy, fragments(WHOLE, step=0), group=None)


class _OfEarly311(pickle._Pickler):
    """Pickles members of an enum as Python 3.11.0 to 3.11.3 do, Debian 12's among them: by name."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_an_index_written_by_an_early_python_3_11_is_read(copy):
    index = state._unpickle_index(copy / ".metadata")
    with (copy / ".metadata").open("wb") as file:
        _OfEarly311(file, protocol=4).dump(index)
    assert b"getattr" in (copy / ".metadata").read_bytes()
    load(copy, fragments(WHOLE, step=0), group=None)


@pytest.mark.parametrize("asked", [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "mro")])
def test_what_an_index_may_ask_for_by_name_is_a_member_of_one_enum(copy, asked):
    class Asks:
        def __reduce__(self) -> Any:
            return getattr, asked

    (copy / ".metadata").write_bytes(pickle.dumps(Asks()))
    told = message_of(lambda: load(copy, fragments(WHOLE, step=0), group=None))
    assert f"the index asks for {asked[1]} of" in told
    assert "which no checkpoint of moetrain does" in told


def _faults(rank: int, root: Path) -> dict[str, str]:
    save_layout(rank, root, step=1)
    told = {}

    def fails(name: str, **how: Any) -> None:
        told[name] = message_of(lambda: save_layout(rank, root, step=2, **how))
        if rank == 0:
            assert [path.name for path in store.whole_checkpoints(root)] == ["step_00000001"]
            store.verify(store.step_directory(root, 1))
        dist.barrier()

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    fails("rank 1 cannot write on")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for name, owner, function in (
        ("rank 0 cannot begin", 0, "open_partial"),
        ("rank 0 cannot read the index", 0, "digest_file"),
        ("rank 0 cannot commit", 0, "commit"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if rank == owner:
                patch.setattr(store, function, _full)
            fails(name)
    with_a_hole = [held | ({"a.w/fp32": (0, 2999)} if "c.bias/fp32" not in held else {}) for held in ON_TWO]
    fails("a hole", layout=with_a_hole)
    dist.barrier()
    save_layout(rank, root, step=2)
    assert store.verify(store.step_directory(root, 2)).step == 2
    found = fragments(WHOLE, step=0)
    load(store.step_directory(root, 2), found, group=dist.group.WORLD)
    assert_loaded(WHOLE, found, step=2)
    return told


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_rank_that_cannot_write_stops_all_ranks_and_leaves_what_was(ranks, tmp_path):
    root = tmp_path / "checkpoints"
    first, second = ranks(2, _faults, root)
    assert first == second, "all ranks tell the same"
    causes = {
        "rank 1 cannot write on": "(rank 1: OSError: [Errno 27] File too large; ",
        "rank 0 cannot begin": "(rank 0: OSError: [Errno 28] No space left on device; ",
        "rank 0 cannot read the index": "(rank 0: OSError: [Errno 28] No space left on device; ",
        "rank 0 cannot commit": "(rank 0: OSError: [Errno 28] No space left on device; ",
        "a hole": "(rank 0: ",
    }
    for name, cause in causes.items():
        assert first[name].startswith(f"the checkpoint could not be written to {root} {cause}"), first[name]
        assert "MiB are free on that disk); earlier checkpoints are untouched: free space or" in first[name]


def test_the_newest_whole_one_is_found_and_damaged_ones_are_named(saved, tmp_path):
    warnings: list[str] = []
    assert newest_whole(tmp_path, warn=warnings.append) is None
    for step in (1, 2, 3):
        directory = Path(shutil.copytree(saved, store.step_directory(tmp_path, step)))
        text = (directory / "manifest.json").read_text().replace('"step": 1', f'"step": {step}')
        (directory / "manifest.json").write_text(text)
    os.truncate(tmp_path / "step_00000002" / "__0_0.distcp", 100)
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    found = newest_whole(tmp_path, warn=warnings.append)
    assert found is not None
    assert (found[0].name, found[1].step) == ("step_00000001", 1)
    assert [warning.split(" is damaged and passed over: ")[0] for warning in warnings] == [
        "checkpoint step_00000003",
        "checkpoint step_00000002",
    ]
    assert "__0_0.distcp has 100 bytes" in warnings[1]


def test_two_intervals_of_one_tensor_on_a_rank_are_a_fault_of_ours(tmp_path):
    twice = [Fragment("a/fp32", torch.zeros(2), offset, 4) for offset in (0, 2)]
    with pytest.raises(AssertionError, match="two intervals of a/fp32"):
        load(tmp_path, twice, group=None)


def _load_unpickling_nothing(rank: int, root: Path) -> None:
    directory = save_layout(rank, root, step=1, layout=[WHOLE])
    found = fragments(WHOLE, step=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", _not_called)
        load(directory, found, group=None)
    assert_loaded(WHOLE, found)


def _not_called(*_: Any, **__: Any) -> None:
    raise AssertionError("torch.load was called")


def test_nothing_of_a_tensor_is_unpickled(ranks, tmp_path):
    ranks(1, _load_unpickling_nothing, tmp_path / "checkpoints")
