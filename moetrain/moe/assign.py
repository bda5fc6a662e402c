"""Routers in which the token's own learned choice does not decide, or not alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moetrain.moe.router import scores
from moetrain.moe.routing import Choice, Routing, make_routing


class ExpertChoiceRouter(nn.Module):
    """Each expert takes its C = T K / E best tokens (Zhou et al. 2022, arXiv:2202.09368, section 3).

    Perfectly balanced; a token may get none or all of the experts. **Not causal**: whether a token is taken depends on
    the other tokens of the batch, later ones included.
    """

    def __init__(self, d_model: int, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.top_k = top_k

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        logit_TE = scores(x_TD, self.weight)
        prob_TE = logit_TE.softmax(-1)
        tokens, experts = prob_TE.shape
        taken = min(tokens, max(1, tokens * self.top_k // experts))
        if replay is None:
            token_CE = prob_TE.detach().topk(taken, dim=0).indices
            chosen_TE = torch.zeros_like(prob_TE, dtype=torch.bool).scatter(0, token_CE, True)
        else:
            assert replay.sent_TK is not None
            chosen_TE = replay.sent_TK
        return make_routing(
            torch.arange(experts, device=x_TD.device).expand(tokens, experts),
            weight_TK=prob_TE * chosen_TE,
            num_experts=experts,
            logit_TE=logit_TE,
            prob_TE=prob_TE,
            chosen_TK=chosen_TE,
        )


class SinkhornRouter(nn.Module):
    """Choose by scores made doubly even, weigh by the raw ones (S-BASE: Clark et al. 2022, arXiv:2202.01169, app. B).

    In training exp(score) is scaled until every token's row and every expert's column has its fair sum; the K largest
    of that are chosen. In evaluation the raw scores choose. **Not causal** in training: the scaling sees the whole
    batch.

    Args:
        iterations: rounds of scaling.
        gate: ``sigmoid`` of the raw score as weight, or ``softmax`` over the experts.
    """

    def __init__(self, d_model: int, *, num_experts: int, top_k: int, iterations: int, gate: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.top_k, self.iterations, self.gate = top_k, iterations, gate

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        logit_TE = scores(x_TD, self.weight)
        prob_TE = logit_TE.softmax(-1)
        choice_TE = sinkhorn(logit_TE.detach(), iterations=self.iterations) if self.training else logit_TE.detach()
        expert_TK = choice_TE.topk(self.top_k, -1).indices if replay is None else replay.expert_TK
        weight_TE = logit_TE.sigmoid() if self.gate == "sigmoid" else prob_TE
        return make_routing(
            expert_TK,
            weight_TK=weight_TE.gather(1, expert_TK),
            num_experts=logit_TE.shape[-1],
            logit_TE=logit_TE,
            prob_TE=prob_TE,
        )


class HashRouter(nn.Module):
    """The expert is a fixed function of the token id (Roller et al. 2021, arXiv:2106.04426).

    Args:
        expert_V: int64, the expert of each token id (see ``hash_table``).
    """

    def __init__(self, expert_V: Tensor, *, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("expert_V", expert_V, persistent=False)
        self.num_experts = num_experts

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        assert token_T is not None, "the hash router chooses by token ids"
        expert_TK = self.expert_V[token_T.flatten()].unsqueeze(-1)
        return make_routing(
            expert_TK,
            weight_TK=torch.ones_like(expert_TK, dtype=torch.float32),
            num_experts=self.num_experts,
        )


class DenseRouter(nn.Module):
    """Every expert on every token: the classic mixture (Jacobs, Jordan, Nowlan, Hinton 1991).

    Args:
        pooling: ``soft``: the answers are weighed by the gate and added up; ``winner``: so in training, while in
            evaluation the expert of the largest gate answers alone.
    """

    def __init__(self, d_model: int, *, num_experts: int, pooling: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.pooling = pooling

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        logit_TE = scores(x_TD, self.weight)
        prob_TE = logit_TE.softmax(-1)
        tokens, experts = prob_TE.shape
        if self.pooling == "winner" and not self.training:
            expert_TK = prob_TE.argmax(-1, keepdim=True)
            weight_TK = torch.ones_like(expert_TK, dtype=prob_TE.dtype)
        else:
            expert_TK = torch.arange(experts, device=x_TD.device).expand(tokens, experts)
            weight_TK = prob_TE
        return make_routing(expert_TK, weight_TK=weight_TK, num_experts=experts, logit_TE=logit_TE, prob_TE=prob_TE)


class BalancedRouter(nn.Module):
    """Copy n goes to expert n mod E, whatever the token: an even load for honest benchmarks. It learns nothing."""

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        copies = torch.arange(x_TD.shape[0] * self.top_k, device=x_TD.device)
        return make_routing(
            (copies % self.num_experts).view(-1, self.top_k),
            weight_TK=torch.full((x_TD.shape[0], self.top_k), 1 / self.top_k, device=x_TD.device),
            num_experts=self.num_experts,
        )


def sinkhorn(logit_TE: Tensor, *, iterations: int) -> Tensor:
    """Scale exp(logit) until rows sum to 1 and columns to T / E, in logarithms; rows are exact in the result."""
    tokens, experts = logit_TE.shape
    log_TE = logit_TE
    for _ in range(iterations):
        log_TE = log_TE - log_TE.logsumexp(0, keepdim=True) + math.log(tokens / experts)
        log_TE = log_TE - log_TE.logsumexp(1, keepdim=True)
    return log_TE.exp()


def hash_table(*, vocab_size: int, num_experts: int, seed: int, frequency_V: Tensor | None) -> Tensor:
    """The expert of each token id, [V] int64.

    Args:
        seed: of the random order of ids, and of the order of equals.
        frequency_V: how often each id occurs; the commonest ids are then dealt first, each to the expert with the
            least so far (the paper's balanced table). None: every expert gets as many ids, at random.
    """
    order_V = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    expert_V = torch.empty(vocab_size, dtype=torch.int64)
    if frequency_V is None:
        expert_V[order_V] = torch.arange(vocab_size) % num_experts
        return expert_V
    load = [0.0] * num_experts
    for token in order_V[frequency_V[order_V].argsort(descending=True, stable=True)].tolist():
        expert = min(range(num_experts), key=load.__getitem__)
        expert_V[token] = expert
        load[expert] += float(frequency_V[token])
    return expert_V
