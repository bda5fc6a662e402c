"""What becomes of a model under the knife: its words, its weights, its moments, and where it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from as_typed import assert_told
from own_runs import STEP, write_own_run, write_tiny
from tokenizers import Tokenizer

from moetrain.archive.doctor import examine
from moetrain.archive.expected import expected_tensors
from moetrain.archive.stored import Stored
from moetrain.checkpoint import store
from moetrain.cli.options import Options, settings
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import ConfigError
from moetrain.hub.generate import load_model
from moetrain.surgery import plan
from moetrain.surgery.operate import alive, most_used, operate

DENSE = ModelConfig(vocab_size=300, context=16, num_layers=4, d_model=16, num_heads=2, d_ff=12, moe=None)
SPARSE = replace(DENSE, num_layers=2, moe=MoEConfig(num_experts=4, top_k=2, d_expert=8))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the state of the union is strong " * 3]), vocab_size=280)


@pytest.fixture
def own(tmp_path: Path, tokenizer: Tokenizer):
    def build(model: ModelConfig) -> Path:
        write_own_run(tmp_path / "own", model, tokenizer, moments=True)
        return tmp_path / "own"

    return build


def step_of(run_dir: Path) -> Stored:
    return Stored(run_dir / "checkpoints" / f"step_{STEP:08d}")


def read(run_dir: Path, name: str) -> torch.Tensor:
    stored = step_of(run_dir)
    return stored.read(name, 0, stored.tensors[name].numel)


def answers(run_dir: Path) -> Any:
    _, gpt = load_model(run_dir, warn=pytest.fail)
    tokens = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return gpt(tokens)


def assert_whole(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / f"step_{STEP:08d}"
    failed = [each.name for each in examine(checkpoint, expect=expected_tensors) if each.passed is False]
    # copies are what they are, until they have been trained
    assert set(failed) <= {"distinct experts"}


def assert_same_answers(one: Path, other: Path) -> None:
    before, after = answers(one).logit_BSV, answers(other).logit_BSV
    assert before.abs().max() > 1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def upcycled(run_dir: Path, out: Path, **how: int) -> Any:
    how = {"num_experts": 4, "top_k": 2, "every": 1} | how
    return operate(run_dir, out, change=lambda model: plan.upcycled(model, **how),
                   steps=lambda _, new: plan.upcycle(new), warn=pytest.fail)  # fmt: skip


def grown(run_dir: Path, out: Path, *, num_experts: int, top_k: int | None = None) -> Any:
    return operate(run_dir, out, change=lambda model: plan.grown(model, num_experts=num_experts, top_k=top_k),
                   steps=plan.grow, warn=pytest.fail)  # fmt: skip


def pruned(run_dir: Path, out: Path, keep: list[tuple[int, ...]]) -> Any:
    return operate(run_dir, out, change=lambda model: plan.pruned(model, num_experts=len(keep[0])),
                   steps=lambda old, _: plan.prune(old, keep=keep), warn=pytest.fail)  # fmt: skip


@pytest.mark.parametrize(("every", "top_k"), [(1, 2), (2, 3)])
def test_an_upcycled_model_begins_as_the_dense_one_ends(own, tmp_path, every, top_k):
    dense = own(DENSE)
    done = upcycled(dense, tmp_path / "new", every=every, top_k=top_k)
    assert_same_answers(dense, tmp_path / "new")
    assert done.after.loss == pytest.approx(done.before.loss, rel=1e-6)
    assert_whole(tmp_path / "new")
    assert all(min(share_E) > 0 for share_E in done.after.share_LE), "a router of zeros would send all to one"
    assert len(done.after.share_LE) == 4 // every


def test_every_expert_is_the_dense_block_with_its_moments(own, tmp_path):
    dense = own(DENSE)
    upcycled(dense, tmp_path / "new", every=2)
    for name in ("w_in", "w_out"):
        old, new = f"blocks.1.feed_forward.{name}.weight", f"blocks.1.feed_forward.experts.{name}"
        # 2 of 4 experts answer with weight 1/2 each: a mean gradient of 1/4, a variance of 1/8
        for kind, factor in (("fp32", 1.0), ("exp_avg", 1 / 4), ("exp_avg_sq", 1 / 8)):
            expected = torch.stack([read(dense, f"{old}/{kind}") * factor] * 4).flatten()
            torch.testing.assert_close(read(tmp_path / "new", f"{new}/{kind}"), expected, rtol=1e-6, atol=0)
    for name in ("embedding.weight", "blocks.0.feed_forward.w_in.weight", "blocks.1.attention.qkv.weight"):
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(read(tmp_path / "new", f"{name}/{kind}"), read(dense, f"{name}/{kind}"))


EXACT = {
    "top_k, all copies answer": (SPARSE, 12, 6),
    "softmax over all": (replace(SPARSE, moe=replace(SPARSE.moe, renormalize=False)), 8, 4),
    "sigmoid_bias, all copies answer": (replace(SPARSE, moe=replace(SPARSE.moe, router="sigmoid_bias")), 8, 4),
    "sigmoid_bias, copies wait": (replace(SPARSE, moe=replace(SPARSE.moe, router="sigmoid_bias")), 8, None),
    "noisy_top_k": (replace(SPARSE, moe=replace(SPARSE.moe, router="noisy_top_k")), 8, 4),
    "hash": (replace(SPARSE, moe=replace(SPARSE.moe, router="hash", top_k=1)), 8, None),
    "dense": (replace(SPARSE, moe=replace(SPARSE.moe, router="dense", top_k=4)), 8, None),
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_grown_model_says_the_same(own, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(plan, "JITTER", 0.0)
    model, num_experts, top_k = EXACT[kind]
    small = own(model)
    done = grown(small, tmp_path / "new", num_experts=num_experts, top_k=top_k)
    assert done.run.model.moe.num_experts == num_experts
    assert_same_answers(small, tmp_path / "new")
    assert done.after.loss == pytest.approx(done.before.loss, rel=1e-5)
    assert_whole(tmp_path / "new")
    if kind == "hash":
        assert all(min(share_E[::4]) > 0 for share_E in done.after.share_LE), "both copies have tokens"


@pytest.mark.parametrize("kind", [kind for kind in EXACT if "all" in kind])
def test_copies_that_answer_together_are_a_little_unlike(own, tmp_path, kind):
    model, num_experts, top_k = EXACT[kind]
    done = grown(own(model), tmp_path / "new", num_experts=num_experts, top_k=top_k)
    assert abs(done.after.loss - done.before.loss) < 0.02 * done.before.loss
    rows = read(tmp_path / "new", "blocks.0.feed_forward.router.weight/fp32").view(-1, 4, 16)
    off = (rows[0] - rows[1]).norm(dim=1) / rows[0].norm(dim=1)
    assert ((off > 0.005) & (off < 0.03)).all()


@pytest.mark.parametrize(("router", "copies"), [("top_k", 2), ("switch", 2), ("gshard", 4)])
def test_copies_part_the_tokens_and_choose_as_before(own, tmp_path, router, copies):
    moe = replace(SPARSE.moe, router=router, top_k=1 if router == "switch" else 2)
    small = own(replace(SPARSE, moe=moe))
    grown(small, tmp_path / "new", num_experts=4 * copies)
    before, after = answers(small), answers(tmp_path / "new")
    old_TK, new_TK = before.moe[0].choice.expert_TK, after.moe[0].choice.expert_TK
    same = (new_TK % 4 == old_TK).all(1)
    # of each direction, 5 in 100 tokens are near the border
    assert same.float().mean() > 0.8
    assert (new_TK // 4).unique().numel() == copies, "every copy has tokens"
    assert_whole(tmp_path / "new")
    # the same experts with the same weights: the same answer, up to the first token of a sequence that went elsewhere
    later_T = (after.moe[1].choice.expert_TK % 4 == before.moe[1].choice.expert_TK).all(1)
    untouched_BS = (same & later_T).view(8, 16).cumprod(1).bool()
    assert untouched_BS.float().mean() > 0.1
    off = (after.logit_BSV - before.logit_BSV).abs().amax(-1)[untouched_BS]
    # near the border, the weight of a single expert is shared with its copy
    assert (off < 1e-3).float().mean() > (0.5 if router == "switch" else 0.999)


def test_moments_of_copies_are_those_of_their_share(own, tmp_path):
    small = own(SPARSE)
    name = "blocks.0.feed_forward.experts.w_in"
    for out, top_k, second in (("parted", None, 1 / 2), ("together", 4, 1 / 4)):
        grown(small, tmp_path / out, num_experts=8, top_k=top_k)
        for kind, factor in (("fp32", 1.0), ("exp_avg", 1 / 2), ("exp_avg_sq", second)):
            once = read(small, f"{name}/{kind}") * factor
            torch.testing.assert_close(
                read(tmp_path / out, f"{name}/{kind}"), torch.cat([once, once]), rtol=1e-6, atol=0
            )
        share = read(tmp_path / out, "blocks.0.feed_forward.share_E/state")
        assert share.tolist() == pytest.approx([1 / 8] * 8)


def test_experts_that_nobody_chooses_are_not_missed(own, tmp_path):
    """Two of six experts whose scores are far below the others'."""
    model = replace(SPARSE, moe=replace(SPARSE.moe, num_experts=6, router="sigmoid_bias"))
    run_dir = own(model)
    keep = [(0, 2, 3, 5), (1, 2, 4, 5)]
    _bury(run_dir, keep)
    pruned(run_dir, tmp_path / "new", keep)
    assert_same_answers(run_dir, tmp_path / "new")
    assert_whole(tmp_path / "new")
    for layer, kept in enumerate(keep):
        for name in ("experts.w_in", "experts.w_out", "router.weight"):
            for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                old = read(run_dir, f"blocks.{layer}.feed_forward.{name}/{kind}").view(6, -1)
                new = read(tmp_path / "new", f"blocks.{layer}.feed_forward.{name}/{kind}").view(4, -1)
                assert torch.equal(new, old[list(kept)])
        assert read(tmp_path / "new", f"blocks.{layer}.feed_forward.share_E/state").sum() == pytest.approx(1)


def _bury(run_dir: Path, keep: list[tuple[int, ...]]) -> None:
    """Write the checkpoint again with a bias of -9 on the experts that are not to be kept."""
    from moetrain.archive.written import write_checkpoint

    stored, directory = step_of(run_dir), run_dir / "checkpoints" / f"step_{STEP:08d}"
    manifest = replace(store.read_manifest(directory), files=[])
    values = {name: read(run_dir, name) for name in stored.tensors}
    for layer, kept in enumerate(keep):
        bias = values[f"blocks.{layer}.feed_forward.router.bias_E/state"]
        bias[[expert for expert in range(6) if expert not in kept]] = -9.0
    directory.rename(run_dir / "was")

    def fill(intervals: Any) -> None:
        for name, each in values.items():
            intervals.write(name, 0, each)

    sizes = {name: each.numel() for name, each in values.items()}
    write_checkpoint(run_dir / "checkpoints", manifest, sizes=sizes, fill=fill)


def test_who_stays_is_who_is_used_most():
    share_LE = [[0.5, 0.0, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]]
    assert most_used(share_LE, num_experts=2) == [(0, 2), (2, 3)]
    assert list(alive(share_LE, least=0.01)) == [3, 4]
    assert list(alive(share_LE, least=0.9)) == [2, 2]


def test_the_run_goes_on_where_it_was(own, tmp_path):
    """The settings of its experiment are those of the checkpoint, which counts as one of this run."""
    small = own(SPARSE)
    done = grown(small, tmp_path / "new", num_experts=8)
    run, _ = settings(
        Options.read(["--config-dir", str(tmp_path / "new" / "configs"), f"experiment={done.experiment}"])
    )
    manifest = store.read_manifest(tmp_path / "new" / "checkpoints" / f"step_{STEP:08d}")
    assert store.foreign(manifest, run=run, data=manifest.data) == ""
    assert (manifest.step, manifest.has_moments, Path(str(run.run_dir))) == (STEP, True, tmp_path / "new")


@pytest.mark.parametrize(
    ("model", "make", "told"),
    [
        (SPARSE, upcycled, "has 4 experts already"),
        (replace(DENSE, bias=True), upcycled, "model.bias is true"),
        (DENSE, lambda run, out: upcycled(run, out, top_k=1), "top_k is 1, but must be from 2 to num_experts, 4"),
        (DENSE, lambda run, out: grown(run, out, num_experts=8), "the model is dense, but grow copies experts"),
        (SPARSE, lambda run, out: grown(run, out, num_experts=6), "num_experts is 6, but must be a multiple"),
        (SPARSE, lambda run, out: grown(run, out, num_experts=12), "copies that part the tokens must be 2, 4"),
        (SPARSE, lambda run, out: grown(run, out, num_experts=8, top_k=3), "top_k is 3, but must stay 2"),
        (SPARSE, lambda run, out: pruned(run, out, [(0,), (1,)]), "num_experts is 1, but must be from"),
        (replace(SPARSE, moe=replace(SPARSE.moe, router="hash", top_k=1)),
         lambda run, out: pruned(run, out, [(0,), (1,)]), "model.moe.router is hash, which uses every expert"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_and_leaves_nothing(own, tmp_path, model, make, told):
    with pytest.raises(ConfigError, match=told):
        make(own(model), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


class TestVerb:
    def test_it_tells_the_loss_before_and_after_and_how_to_go_on(self, own, tmp_path, moetrain_in_process):
        done = moetrain_in_process("surgery", str(own(DENSE)), "upcycle", f"out={tmp_path / 'new'}", "num_experts=4")
        assert done.returncode == 0, done.stderr
        assert "4 experts, top-2" in done.stdout
        before, after = (float(word) for word in done.stdout.split("there): ")[1].split()[0:3:2])
        assert before == after
        assert f"moetrain train --config-dir {tmp_path / 'new'}/configs experiment=new" in done.stdout

    def test_where_all_experts_live_prune_wants_a_number(self, tmp_path, moetrain_in_process):
        write_tiny(tmp_path / "run", tmp_path / "of tiny")
        words = ("surgery", str(tmp_path / "run"), "prune", f"out={tmp_path / 'new'}")
        assert_told(moetrain_in_process(*words), "every expert gets more than 0.01 of a fair share: say num_experts")
        assert moetrain_in_process(*words, "num_experts=2").returncode == 0

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (("run",), "1 paths are given, but it takes 2 (RUN, upcycle|grow|prune)"),
            (("run", "cut"), "'cut' is no operation: use one of upcycle, grow, prune"),
            (("run", "grow", "out=a"), "num_experts is not given"),
            (("run", "grow", "out=a", "num_experts=8", "every=2"), "every is 2, but does not belong to grow"),
            (("run", "prune", "out=a", "top_k=1"), "top_k is 1, but does not belong to prune: leave it out"),
            (("run", "prune", "out=a", "num_experts=0"), "num_experts is 0, but must be at least 1"),
            (("nowhere", "prune", "out=a"), "nowhere/run.yaml does not exist"),
        ],
    )
    def test_what_is_wrong_is_told(self, moetrain_in_process, words, told):
        assert_told(moetrain_in_process("surgery", *words), told)
