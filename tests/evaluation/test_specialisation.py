"""Which tokens each expert takes: held against a plain count, and against choices whose nature is known."""

from __future__ import annotations

import collections
import json
import math

import pytest
import torch
from own_runs import write_tiny

from moetrain.data.build import open_corpus
from moetrain.data.tokenizer import load_tokenizer
from moetrain.evaluation.experts import TokenCounts
from moetrain.hub.generate import load_model
from moetrain.moe.routing import Choice
from moetrain.page.experts import read_experts

V, E, T = 40, 4, 40_000


def counted(token_T: torch.Tensor, expert_TK: torch.Tensor, *, sent_TK: torch.Tensor | None = None) -> TokenCounts:
    counts = TokenCounts(1, V, E)
    counts.add(token_T, torch.ones_like(token_T, dtype=torch.bool), [Choice(expert_TK=expert_TK, sent_TK=sent_TK)])
    return counts


@pytest.fixture
def token_T() -> torch.Tensor:
    return torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(0))


def test_a_hash_is_told_by_the_token_altogether_and_chance_not_at_all(token_T):
    assert counted(token_T, (token_T % E).unsqueeze(1)).told_by_token() == pytest.approx([1.0])
    by_chance = torch.randint(0, E, (T, 1), generator=torch.Generator().manual_seed(1))
    # without the correction it would be some (V - 1) (E - 1) / 2 T ln E = 0.001; of 2 T tokens half of that
    assert counted(token_T, by_chance).told_by_token()[0] < 3e-4
    few = counted(token_T[:800], by_chance[:800])
    assert few.told_by_token()[0] < 0.03, "20 occurrences each"


def test_what_half_the_tokens_tell(token_T):
    """Even tokens go to expert 0, odd ones to 1, 2 or 3 by chance: I = H(E) - H(E | token) is known."""
    by_chance = torch.randint(1, E, (T,), generator=torch.Generator().manual_seed(1))
    expert_T = torch.where(token_T % 2 == 0, torch.zeros_like(token_T), by_chance)
    of_expert = 0.5 * math.log(2) + 0.5 * math.log(6)
    told = 1 - 0.5 * math.log(3) / of_expert
    assert counted(token_T, expert_T.unsqueeze(1)).told_by_token() == pytest.approx([told], abs=0.01)


def test_copies_that_are_not_chosen_do_not_count():
    """Expert choice: every expert has a column for every token."""
    token_T = torch.arange(20) % 2
    sent_TE = torch.stack([token_T == 0, token_T == 1, token_T == 1, torch.zeros(20, dtype=torch.bool)], dim=1)
    layer = counted(token_T, torch.arange(E).expand(20, E), sent_TK=sent_TE).favourites(most=3)[0]
    assert [[(each.token, each.share, each.times) for each in best] for best in layer] == [
        [(0, 1.0, 2.0)], [(1, 1.0, 2.0)], [(1, 1.0, 2.0)], []]  # fmt: skip


def test_rare_tokens_do_not_stand_out():
    token_T = torch.cat([torch.zeros(500, dtype=torch.int64), torch.full((9,), 7)])
    expert_TK = torch.cat([torch.arange(500) % 2, torch.ones(9, dtype=torch.int64)]).unsqueeze(1)
    assert all(each.token != 7 for best in counted(token_T, expert_TK).favourites(most=5)[0] for each in best)


def test_a_few_choices_of_an_idle_expert_do_not_stand_out():
    token_T = torch.arange(4000) % 2
    expert_TK = torch.zeros(4000, 1, dtype=torch.int64)
    expert_TK[:8:2] = 1
    assert counted(token_T, expert_TK).favourites(most=3)[0][1] == []
    expert_TK[:10:2] = 1
    assert [each.token for each in counted(token_T, expert_TK).favourites(most=3)[0][1]] == [0]


def test_evaluate_counts_what_a_plain_loop_counts_and_the_report_reads_it(tmp_path, moetrain_in_process):
    run_dir = tmp_path / "run"
    write_tiny(run_dir, tmp_path / "of run")
    done = moetrain_in_process("evaluate", str(run_dir), "micro_batch=3")
    assert done.returncode == 0, done.stderr
    assert f"{run_dir}/experts.json" in done.stdout
    run, gpt = load_model(run_dir, warn=pytest.fail)
    ids, length = open_corpus(run, run_dir).first.held_out.tokens.tolist(), run.model.context
    seen: collections.Counter[int] = collections.Counter()
    chosen: list[collections.Counter[tuple[int, int]]] = [collections.Counter() for _ in range(2)]
    for begin in range(0, len(ids) - 1, length):
        piece = ids[begin : min(begin + length, len(ids) - 1)]
        seen.update(piece)
        with torch.no_grad():
            blocks = gpt(torch.tensor([piece])).moe
        for layer, block in enumerate(blocks):
            for token, experts in zip(piece, block.choice.expert_TK.tolist(), strict=True):
                chosen[layer].update((token, expert) for expert in experts)
    found, tokenizer = read_experts(run_dir), load_tokenizer(run_dir / "tokenizer.json")
    assert found is not None
    assert (found.step, found.tokens, len(found.sources)) == (7, len(ids) - 1, 1)
    told = 0
    for layer, experts in enumerate(found.favourites):
        copies = sum(chosen[layer].values())
        for expert, best in enumerate(experts):
            took = sum(n for (_, other), n in chosen[layer].items() if other == expert)
            assert found.all[layer][expert] == pytest.approx(took / copies)
            for each in best:
                (token,) = (token for token in seen if each["text"] in (tokenizer.decode([token]),
                                                                        tokenizer.id_to_token(token)))  # fmt: skip
                share = chosen[layer][token, expert] / seen[token]
                assert each["occurrences"] == seen[token] >= 10
                assert each["share"] == pytest.approx(share)
                assert each["times"] == pytest.approx(share / (took / sum(seen.values())))
                assert each["times"] > 1
                told += 1
    assert told > 6


def test_text_that_is_not_the_runs_own_is_not_kept(tmp_path, moetrain_in_process):
    write_tiny(tmp_path / "run", tmp_path / "of run")
    moetrain_in_process("evaluate", str(tmp_path / "run"), "split=train", "json=true")
    assert read_experts(tmp_path / "run") is None
    done = moetrain_in_process("evaluate", str(tmp_path / "run"), "json=true")
    assert json.loads(done.stdout)["split"] == "held_out", "the numbers for a script, and nothing else"
    assert read_experts(tmp_path / "run") is not None
