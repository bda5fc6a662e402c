"""What is worked out anew in the backward pass is what it was: same losses, gradients and choices, less kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from moetrain.config.routers import ROUTERS, loss_weights, resolve_router
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT
from moetrain.model.objective import MicroBatch, Objective
from moetrain.model.recompute import KINDS, Recompute
from moetrain.parallel.groups import make
from moetrain.parallel.topology import Topology

VOCABULARY, BATCH, LENGTH, D_MODEL, TOP_K = 64, 3, 8, 16, 2
MODEL = ModelConfig(vocab_size=VOCABULARY, context=LENGTH, d_model=D_MODEL, num_layers=2, num_heads=2, d_ff=24)
MOE = MoEConfig(num_experts=4, d_expert=24, every=2, dropout=0.1, num_shared_experts=1, shared_gate=True)
"""A dense block below a sparse one; the dropout draws after the router has drawn."""
OF_ROUTER = {
    "top_k": {"jitter": 0.1, "capacity_factor": 0.75, "drop": "probability"},
    "switch": {"top_k": 1},
    "hash": {"top_k": 1},
    "dense": {"top_k": 4},
    "sigmoid_bias": {"balance_weight": 0.02},
    "noisy_top_k": {"balance_weight": 0.02},
}
TABLE = torch.arange(VOCABULARY) % 4
ROWS = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def model_of(router: str) -> ModelConfig:
    return replace(MODEL, moe=resolve_router(replace(MOE, router=router, **OF_ROUTER.get(router, {}))))


def run(objective: Objective, rank: int) -> dict[str, Tensor]:
    # an uneven step before, or the balance loss would have no gradient
    objective.gpt.after_step(torch.tensor([[9, 5, 1, 2]]))
    torch.manual_seed(rank)
    losses = objective(MicroBatch(token_BS=ROWS[rank, :, :-1], target_BS=ROWS[rank, :, 1:]))
    after = torch.rand(())
    losses.total.backward()
    return {
        "total": losses.total.detach(),
        "count": torch.stack([load.count_E for load in losses.load]),
        "generator after the forward pass": after,
        "generator after the backward pass": torch.rand(()),
        **{name: each.grad for name, each in objective.named_parameters() if each.grad is not None},
    }


def _every_router(rank: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    answers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for expert_parallel in (1, 2):
        topology = Topology(world_size=2, rank=rank, expert_parallel=expert_parallel)
        groups = make(topology, device=torch.device("cpu"))
        for router in ROUTERS:
            model = model_of(router)
            for recompute in KINDS:
                gpt = build_model(model, local_experts=topology.local_experts(4), expert_group=groups.expert,
                                  expert_V=TABLE, recompute=recompute)  # fmt: skip
                initialize(gpt, init_std=0.3, seed=1)
                objective = Objective(gpt, loss_weights=loss_weights(model.moe))
                answers.setdefault(f"{router}, EP {expert_parallel}", {})[recompute] = run(objective, rank)
    return answers


def test_losses_and_gradients_are_bit_for_bit_those_of_keeping_everything(ranks) -> None:
    """Every router, noise, dropout and drops included, alone and with experts on two ranks."""
    for answers in ranks(2, _every_router):
        assert len(answers) == 2 * len(ROUTERS)
        for case, of_kind in answers.items():
            kept = of_kind["none"]
            assert any("experts.w_in" in name for name in kept)
            for kind in ("selective", "full"):
                assert of_kind[kind].keys() == kept.keys()
                for name, tensor in kept.items():
                    assert torch.equal(of_kind[kind][name], tensor), f"{case}, {kind}: {name}"


def _count_trips(rank: int) -> dict[str, list[int]]:
    topology = Topology(world_size=2, rank=rank, expert_parallel=2)
    groups = make(topology, device=torch.device("cpu"))
    trips, send = [], dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: (trips.append(1), send(*args, **kwargs))[1]
    found = {}
    for recompute in KINDS:
        gpt = build_model(replace(MODEL, moe=MOE), local_experts=topology.local_experts(4), expert_group=groups.expert,
                          recompute=recompute)  # fmt: skip
        initialize(gpt, init_std=0.3, seed=1)
        trips.clear()
        logits = gpt(ROWS[rank, :, :-1]).logit_BSV
        forward = len(trips)
        logits.sum().backward()
        found[recompute] = [forward, len(trips) - forward]
    dist.all_to_all_single = send
    return found


def test_selective_sends_nothing_a_second_time(ranks) -> None:
    # counts, rows and answers go; the gradients of rows and answers come back
    assert ranks(2, _count_trips)[0] == {"none": [3, 2], "selective": [3, 2], "full": [3, 5]}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_the_second_pass_repeats_the_choice_of_the_first(recompute: str) -> None:
    gpt = build_model(replace(MODEL, moe=MOE), recompute=recompute)
    initialize(gpt, init_std=0.3, seed=1)
    router = gpt.blocks[1].feed_forward.router
    chosen = []
    router.register_forward_hook(lambda module, args, routing: chosen.append(routing.expert_TK))
    with set_checkpoint_early_stop(False):  # which would leave the router before the hook
        loss = gpt(ROWS[0, :, :-1]).logit_BSV.square().sum()
    router.weight.data.neg_()  # by itself it would now choose the opposite
    loss.backward()
    assert len(chosen) == 2
    assert torch.equal(chosen[0], chosen[1])


def kept_bytes(gpt: GPT) -> int:
    """What autograd holds between the passes, parameters aside, each piece of memory once."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = gpt(ROWS[0, :, :-1])
        assert output.logit_BSV.requires_grad
        return sum(each.untyped_storage().nbytes() for pointer, each in held.items() if pointer not in ours)


def bytes_per_block(recompute: str, moe: MoEConfig | None) -> int:
    few, many = (
        kept_bytes(build_model(replace(MODEL, num_layers=layers, moe=moe), recompute=recompute)) for layers in (2, 4)
    )
    return (many - few) // 2


def test_less_is_kept_as_the_module_says() -> None:
    tokens = BATCH * LENGTH * D_MODEL * 4
    sparse = MoEConfig(num_experts=4, d_expert=56, top_k=TOP_K, num_shared_experts=1)
    kept = {kind: bytes_per_block(kind, sparse) for kind in KINDS}
    assert kept["full"] == tokens
    # input, normed tokens, rows, answers; and scores and places, which are narrow
    assert (2 + 2 * TOP_K) * tokens < kept["selective"] < (3 + 2 * TOP_K) * tokens
    assert kept["none"] > 5 * kept["selective"]
    dense = {kind: bytes_per_block(kind, None) for kind in KINDS}
    assert (dense["full"], dense["selective"]) == (tokens, 2 * tokens)
    assert dense["none"] > 5 * dense["selective"]


def test_without_gradients_nothing_is_kept_and_nothing_runs_twice() -> None:
    gpt = build_model(replace(MODEL, moe=MOE), recompute="full").eval()
    initialize(gpt, init_std=0.3, seed=1)
    calls = []
    gpt.blocks[1].attention.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        logits = gpt(ROWS[0, :, :-1]).logit_BSV
    assert not logits.requires_grad
    assert calls == [1]


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="'some', but must be one of none, selective, full"):
        Recompute.of("some")
