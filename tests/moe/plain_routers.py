"""Every router by its paper's formula: loops over tokens, slow and plain, that autograd may go through.

A plain router gives for each token the experts that are called and the weights of their answers. It is handed the
random numbers that the router under test drew (``Case.draw``), None where it draws none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.moe.assign import BalancedRouter, DenseRouter, ExpertChoiceRouter, HashRouter, SinkhornRouter
from moetrain.moe.router import GShardRouter, NoisyTopKRouter, SigmoidBiasRouter, TopKRouter

D_MODEL, NUM_EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 5, 8, 2, 4, 2
TABLE = torch.tensor([3, 0, 5, 1, 1, 4, 2, 0, 7])
BIAS = torch.tensor([0.3, -0.2, 0.0, 0.5, -0.4, 0.1, 0.2, -0.1])
SCALE = 2.5
Called = list[dict[int, Tensor]]


@dataclass(frozen=True)
class Case:
    """A router and its formula.

    Attributes:
        draw: the random numbers of T tokens in training, in the order and shape in which the router draws them.
        weighs_with_noise: whether the weights, and not the choice alone, depend on these.
        causal: in training, in evaluation.
    """

    make: Callable[[], nn.Module]
    plain: Callable[..., Called]
    draw: Callable[[int], Tensor] | None = None
    weighs_with_noise: bool = False
    causal: tuple[bool, bool] = (True, True)


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i].item())[:count]


def best_in_groups(scores: Tensor) -> list[int]:
    """DeepSeek-V3, section 2.1.2: a group is as good as its two best experts together."""
    size = NUM_EXPERTS // GROUPS
    members = [list(range(group * size, (group + 1) * size)) for group in range(GROUPS)]
    together = torch.stack([sum(sorted(scores[ids].tolist())[-2:]) * torch.ones(()) for ids in members])
    allowed = [expert for group in best(together, TOP_GROUPS) for expert in members[group]]
    return sorted(allowed, key=lambda i: -scores[i].item())[:TOP_K]


def top_k(
    x_TD: Tensor,
    router: Any,
    *,
    noise: Tensor | None,
    renormalize: bool,
    k: int = TOP_K,
    grouped: bool = False,
    **_: Any,
) -> Called:
    """Mixtral 2.1: softmax over the kept scores; Switch equation 2: share of the softmax over all."""
    called = []
    for t, x in enumerate(x_TD):
        logits = router.weight @ (x if noise is None else x * noise[t])
        chosen = best_in_groups(logits.softmax(0)) if grouped else best(logits, k)
        weights = logits[chosen].softmax(0) if renormalize else logits.softmax(0)[chosen]
        called.append(dict(zip(chosen, weights, strict=True)))
    return called


def gshard(x_TD: Tensor, router: Any, *, noise: Tensor | None, **_: Any) -> Called:
    """GShard, algorithm 1, lines 10 to 19."""
    called = []
    for t, x in enumerate(x_TD):
        gates = (router.weight @ x).softmax(0)
        first, second = best(gates, 2)
        g1, g2 = gates[first] / (gates[first] + gates[second]), gates[second] / (gates[first] + gates[second])
        called.append({first: g1} | ({second: g2} if noise is None or 2 * g2 > noise[t] else {}))
    return called


def noisy_scores(x: Tensor, router: Any, *, normal_E: Tensor | None) -> Tensor:
    """Shazeer et al. 2017, equation 4."""
    clean = router.weight @ x
    return clean if normal_E is None else clean + normal_E * (1 + (router.noise_weight @ x).exp()).log()


def noisy_top_k(x_TD: Tensor, router: Any, *, noise: Tensor | None, **_: Any) -> Called:
    called = []
    for t, x in enumerate(x_TD):
        scores = noisy_scores(x, router, normal_E=None if noise is None else noise[t])
        chosen = best(scores, TOP_K)
        called.append(dict(zip(chosen, scores[chosen].softmax(0), strict=True)))
    return called


def sigmoid_bias(x_TD: Tensor, router: Any, *, grouped: bool = False, **_: Any) -> Called:
    """DeepSeek-V3, equations 12 to 16; times the scale."""
    called = []
    for x in x_TD:
        s = 1 / (1 + (-(router.weight @ x)).exp())
        chosen = best_in_groups(s + BIAS) if grouped else best(s + BIAS, TOP_K)
        total = sum(s[expert] for expert in chosen)
        called.append({expert: SCALE * s[expert] / total for expert in chosen})
    return called


def expert_choice(x_TD: Tensor, router: Any, **_: Any) -> Called:
    """Zhou et al. 2022, section 3.2: S = softmax over experts; each expert takes its k = n c / e best tokens."""
    shares = torch.stack([(router.weight @ x).softmax(0) for x in x_TD])
    called: Called = [{} for _ in x_TD]
    for expert in range(NUM_EXPERTS):
        for token in best(shares[:, expert], min(len(x_TD), max(1, len(x_TD) * TOP_K // NUM_EXPERTS))):
            called[token][expert] = shares[token, expert]
    return called


def sinkhorn(x_TD: Tensor, router: Any, *, training: bool, gate: str, **_: Any) -> Called:
    """Clark et al. 2022, appendix B: columns and rows scaled in turn to their fair sums."""
    logits = torch.stack([router.weight @ x for x in x_TD])
    plan = logits.detach().exp()
    for _ in range(8 if training else 0):
        plan = plan * (len(x_TD) / NUM_EXPERTS) / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    called = []
    for t, row in enumerate(plan):
        weights = 1 / (1 + (-logits[t]).exp()) if gate == "sigmoid" else logits[t].softmax(0)
        called.append({expert: weights[expert] for expert in best(row, TOP_K)})
    return called


def hash_table_router(x_TD: Tensor, router: Any, *, token_T: Tensor, **_: Any) -> Called:
    return [{int(TABLE[token]): x_TD.new_ones(())} for token in token_T]


def dense(x_TD: Tensor, router: Any, *, training: bool, pooling: str, **_: Any) -> Called:
    """Jacobs et al. 1991: y = sum_i p_i y_i; by the winner alone, in evaluation."""
    called = []
    for x in x_TD:
        gates = (router.weight @ x).softmax(0)
        if pooling == "winner" and not training:
            called.append({best(gates, 1)[0]: torch.ones_like(gates[0])})
        else:
            called.append(dict(enumerate(gates)))
    return called


def balanced(x_TD: Tensor, router: Any, **_: Any) -> Called:
    half = x_TD.new_tensor(1 / TOP_K)
    return [{(t * TOP_K + k) % NUM_EXPERTS: half for k in range(TOP_K)} for t in range(len(x_TD))]


E, EK = {"num_experts": NUM_EXPERTS}, {"num_experts": NUM_EXPERTS, "top_k": TOP_K}
GROUPED = {"num_groups": GROUPS, "top_groups": TOP_GROUPS}


def _jitter(tokens: int) -> Tensor:
    return torch.empty(tokens, D_MODEL).uniform_(0.5, 1.5)


def _learned(kind: type[nn.Module], **settings: Any) -> Callable[[], nn.Module]:
    return partial(kind, D_MODEL, **settings)


CASES = {
    "top_k": Case(_learned(TopKRouter, **EK, renormalize=True), partial(top_k, renormalize=True)),
    "top_k, raw": Case(_learned(TopKRouter, **EK, renormalize=False), partial(top_k, renormalize=False)),
    "top_k, groups": Case(
        _learned(TopKRouter, **EK, renormalize=True, **GROUPED), partial(top_k, renormalize=True, grouped=True)
    ),
    "top_k, jitter": Case(
        _learned(TopKRouter, **EK, renormalize=True, jitter=0.5), partial(top_k, renormalize=True), _jitter, True
    ),
    "switch": Case(
        _learned(TopKRouter, **E, top_k=1, renormalize=False, jitter=0.5),
        partial(top_k, renormalize=False, k=1),
        _jitter,
        True,
    ),
    "gshard": Case(_learned(GShardRouter, **E), gshard, lambda tokens: torch.rand(tokens, dtype=torch.float64)),
    "noisy_top_k": Case(
        _learned(NoisyTopKRouter, **EK),
        noisy_top_k,
        lambda tokens: torch.randn(tokens, NUM_EXPERTS, dtype=torch.float64),
        True,
    ),
    "sigmoid_bias": Case(_learned(SigmoidBiasRouter, **EK, update_rate=0.1, scale=SCALE), sigmoid_bias),
    "sigmoid_bias, groups": Case(
        _learned(SigmoidBiasRouter, **EK, update_rate=0.1, scale=SCALE, **GROUPED), partial(sigmoid_bias, grouped=True)
    ),
    "expert_choice": Case(_learned(ExpertChoiceRouter, **EK), expert_choice, causal=(False, False)),
    "sinkhorn": Case(
        _learned(SinkhornRouter, **EK, iterations=8, gate="sigmoid"),
        partial(sinkhorn, gate="sigmoid"),
        causal=(False, True),
    ),
    "sinkhorn, softmax": Case(
        _learned(SinkhornRouter, **EK, iterations=8, gate="softmax"),
        partial(sinkhorn, gate="softmax"),
        causal=(False, True),
    ),
    "hash": Case(partial(HashRouter, TABLE, **E), hash_table_router),
    "dense, soft": Case(_learned(DenseRouter, **E, pooling="soft"), partial(dense, pooling="soft")),
    "dense, winner": Case(_learned(DenseRouter, **E, pooling="winner"), partial(dense, pooling="winner")),
    "balanced": Case(partial(BalancedRouter, **EK), balanced),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(len(TABLE), (tokens,), generator=torch.Generator().manual_seed(seed))


def make_router(name: str, *, training: bool) -> nn.Module:
    """In float64, with weights as large as are needed for gates that differ."""
    router = CASES[name].make().double()
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + seed))
    if isinstance(router, SigmoidBiasRouter):
        router.bias_E = BIAS.clone()
    return router.train(training)


def plain_routing(
    name: str, x_TD: Tensor, router: nn.Module, *, token_T: Tensor, training: bool, seed: int = 0
) -> Called:
    """What the formula says, with the numbers that the router draws after ``torch.manual_seed(seed)``."""
    case, noise = CASES[name], None
    if training and case.draw is not None:
        torch.manual_seed(seed)
        noise = case.draw(len(x_TD))
    return case.plain(x_TD, router, noise=noise, training=training, token_T=token_T)
