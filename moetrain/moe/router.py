"""Routers in which each token chooses its experts by learned scores.

Every router, here and in ``assign.py``, is called with the tokens [T, D], their ids [T], and perhaps a ``Choice`` to
repeat: weights and losses then still come from the scores, so that gradients are right, and only the choice is given.
A replay draws the same random numbers and saves the same tensors for the backward pass as the pass it repeats: the
choice itself is made on detached scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.routing import Choice, Routing, make_routing


class TopKRouter(nn.Module):
    """Keep the K largest scores (Shazeer et al. 2017, arXiv:1701.06538, section 2.1).

    With ``renormalize`` the weights are the softmax over the K kept scores (Mixtral, arXiv:2401.04088, section 2.1);
    without, each keeps its share of the softmax over all experts (Switch, arXiv:2101.03961, equation 2).

    Args:
        jitter: in training the scores see the input times U(1 - jitter, 1 + jitter) (Switch, section 2.2).
        num_groups, top_groups: only experts of the ``top_groups`` best of ``num_groups`` groups may be chosen
            (see ``best_groups``); None: all.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        jitter: float = 0.0,
        num_groups: int | None = None,
        top_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.top_k = top_k
        self.renormalize = renormalize
        self.jitter = jitter
        self.num_groups, self.top_groups = num_groups, top_groups

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        if self.jitter and self.training:
            x_TD = x_TD * torch.empty_like(x_TD, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
        logit_TE = scores(x_TD, self.weight)
        prob_TE = logit_TE.softmax(-1)
        eligible_TE = prob_TE.detach()
        if self.num_groups is not None and self.top_groups is not None:
            allowed_TE = best_groups(eligible_TE, num_groups=self.num_groups, top_groups=self.top_groups)
            eligible_TE = eligible_TE.masked_fill(~allowed_TE, float("-inf"))
        expert_TK = eligible_TE.topk(self.top_k, -1).indices if replay is None else replay.expert_TK
        weight_TK = prob_TE.gather(1, expert_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return make_routing(
            expert_TK,
            weight_TK=weight_TK,
            num_experts=logit_TE.shape[-1],
            logit_TE=logit_TE,
            prob_TE=prob_TE,
        )


class GShardRouter(nn.Module):
    """The two best experts; the second is called with probability min(1, 2 g2) (arXiv:2006.16668, algorithm 1).

    g1 and g2 are renormalised over the two. The balance loss counts first choices, as in the paper. In evaluation the
    second expert is always called, so that the answer does not depend on chance.
    """

    def __init__(self, d_model: int, *, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        logit_TE = scores(x_TD, self.weight)
        prob_TE = logit_TE.softmax(-1)
        expert_TK = prob_TE.detach().topk(2, -1).indices if replay is None else replay.expert_TK
        weight_TK = prob_TE.gather(1, expert_TK)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        sent_TK = None if replay is None else replay.sent_TK
        if self.training:
            second_T = weight_TK[:, 1].detach()
            # drawn for a replay as well: what draws after the router must find the generator as it was the first time
            called_T = torch.rand_like(second_T) < 2 * second_T
        if self.training and replay is None:
            sent_TK = torch.stack([torch.ones_like(called_T), called_T], dim=-1)
        return make_routing(
            expert_TK,
            weight_TK=weight_TK,
            num_experts=logit_TE.shape[-1],
            logit_TE=logit_TE,
            prob_TE=prob_TE,
            sent_TK=sent_TK,
            balance_TK=torch.tensor([True, False], device=x_TD.device).expand_as(expert_TK),
        )


class NoisyTopKRouter(nn.Module):
    """Top-k of scores with learned noise (Shazeer et al. 2017, arXiv:1701.06538, sections 2.1 and 4, appendix A).

    H = x W_g + N(0, 1) softplus(x W_noise), softmax over the K largest of H; both matrices start at 0 (appendix A),
    so that all experts start equal. No noise in evaluation. Its own losses, both squared coefficients of variation
    over the experts: ``importance`` of the summed weights, ``load`` of the smooth estimate of the number of tokens.
    """

    starts_at_zero = True

    def __init__(self, d_model: int, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.top_k = top_k

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        clean_TE = scores(x_TD, self.weight)
        logit_TE = clean_TE
        spread_TE = F.softplus(scores(x_TD, self.noise_weight))
        if self.training:
            logit_TE = clean_TE + torch.randn_like(clean_TE) * spread_TE
        expert_TK = logit_TE.detach().topk(self.top_k, -1).indices if replay is None else replay.expert_TK
        weight_TK = logit_TE.gather(1, expert_TK).softmax(-1)
        importance_E = torch.zeros_like(logit_TE).scatter(1, expert_TK, weight_TK).sum(0)
        losses = {"importance": squared_variation(importance_E)}
        if self.training:
            losses["load"] = squared_variation(_smooth_load(clean_TE, logit_TE, spread_TE, top_k=self.top_k))
        return make_routing(
            expert_TK,
            weight_TK=weight_TK,
            num_experts=logit_TE.shape[-1],
            logit_TE=logit_TE,
            prob_TE=logit_TE.softmax(-1),
            losses=losses,
        )


class SigmoidBiasRouter(nn.Module):
    """Balance without a loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    s = sigmoid(score); the K largest of s + b are chosen, and weigh s over the sum of the chosen s, times ``scale``.
    After each optimizer step b_i grows by ``update_rate`` where expert i had fewer copies than the mean over the global
    batch, and shrinks where it had more (``after_step``). b takes part in the choice alone: it has no gradient.

    Args:
        num_groups, top_groups: as for ``TopKRouter``, by s + b.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        update_rate: float,
        scale: float,
        num_groups: int | None = None,
        top_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        # no buffer: an engine that casts buffers to bf16 would swallow steps of 0.001
        self.bias_E = torch.zeros(num_experts)
        self.top_k, self.update_rate, self.scale = top_k, update_rate, scale
        self.num_groups, self.top_groups = num_groups, top_groups

    def forward(self, x_TD: Tensor, token_T: Tensor | None = None, replay: Choice | None = None) -> Routing:
        self.bias_E = self.bias_E.to(x_TD.device)
        logit_TE = scores(x_TD, self.weight)
        score_TE = logit_TE.sigmoid()
        biased_TE = score_TE.detach() + self.bias_E
        if self.num_groups is not None and self.top_groups is not None:
            allowed_TE = best_groups(biased_TE, num_groups=self.num_groups, top_groups=self.top_groups)
            biased_TE = biased_TE.masked_fill(~allowed_TE, float("-inf"))
        expert_TK = biased_TE.topk(self.top_k, -1).indices if replay is None else replay.expert_TK
        weight_TK = score_TE.gather(1, expert_TK)
        weight_TK = self.scale * weight_TK / weight_TK.sum(-1, keepdim=True)
        return make_routing(
            expert_TK,
            weight_TK=weight_TK,
            num_experts=logit_TE.shape[-1],
            logit_TE=logit_TE,
            # for the optional balance loss: the scores' shares (DeepSeek-V3, equation 18)
            prob_TE=score_TE / score_TE.sum(-1, keepdim=True),
        )

    @torch.no_grad()
    def after_step(self, count_E: Tensor) -> None:
        """Move the bias against the load of the whole global batch, [E]."""
        load_E = count_E.float()
        self.bias_E += self.update_rate * torch.sign(load_E.mean() - load_E)


def scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, or in float64 for a float64 input.

    Also in a bf16 run: near-ties in bf16 flip the chosen expert from step to step, and the balance loss then chases
    noise.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


def best_groups(score_TE: Tensor, *, num_groups: int, top_groups: int) -> Tensor:
    """Which experts lie in the best groups of neighbours, bool [T, E].

    A group's score is the sum of its two best experts' (DeepSeek-V3, arXiv:2412.19437, section 2.1.2); of its one
    expert, if it has only one.
    """
    tokens, experts = score_TE.shape
    score_TGe = score_TE.view(tokens, num_groups, experts // num_groups)
    group_TG = score_TGe.topk(min(2, score_TGe.shape[-1]), -1).values.sum(-1)
    chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, group_TG.topk(top_groups, -1).indices, True)
    return chosen_TG.unsqueeze(-1).expand_as(score_TGe).reshape(tokens, experts)


def squared_variation(value_E: Tensor) -> Tensor:
    """(standard deviation / mean) squared, of the population."""
    # the floor keeps an all-zero load, which no token gives, from dividing by zero
    return value_E.var(correction=0) / value_E.mean().square().clamp(min=1e-10)


def _smooth_load(clean_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, *, top_k: int) -> Tensor:
    """How many tokens each expert would get, as a smooth function of the scores (Shazeer et al., equations 8 to 10).

    P(x, i) is the probability that expert i stays among the K best when its own noise is drawn anew: its noisy score
    must beat the K-th largest of the others'.
    """
    if top_k == clean_TE.shape[-1]:
        return torch.full_like(clean_TE[0], clean_TE.shape[0])
    best_TK = noisy_TE.topk(top_k + 1, -1).values
    within_TE = noisy_TE >= best_TK[:, top_k - 1 : top_k]
    bar_TE = torch.where(within_TE, best_TK[:, top_k : top_k + 1], best_TK[:, top_k - 1 : top_k])
    return torch.special.ndtr((clean_TE - bar_TE) / spread_TE).sum(0)
