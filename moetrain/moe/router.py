"""Router: score every expert for every token, keep the best K.

Shape suffixes, one legend for the whole package:
    B sequences     S tokens of a sequence     T = B*S tokens on this rank     D model width     V vocabulary
    E experts in the layer     e experts on this rank     F hidden width of an expert
    K experts per token     N = T*K token copies     R copies received by this rank     P expert-parallel ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What the router decided for one batch of tokens."""

    expert_TK: Tensor
    """int64, which experts each token goes to, best first."""
    weight_TK: Tensor
    """float32, how much each expert's answer counts."""
    logit_TE: Tensor
    """float32, raw scores; the z-loss needs them."""
    prob_TE: Tensor
    """float32, softmax of the scores over all experts; the balance loss needs it."""
    count_E: Tensor
    """int64, token copies sent to each expert by this rank."""


class TopKRouter(nn.Module):
    """Keep the K largest scores (Shazeer et al. 2017, arXiv:1701.06538, section 2.1).

    With ``renormalize`` the weights are the softmax over the K kept scores (Mixtral, arXiv:2401.04088, section 2.1);
    without, each keeps its share of the softmax over all experts (Switch, arXiv:2101.03961, equation 2).
    """

    def __init__(self, d_model: int, *, num_experts: int, top_k: int, renormalize: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.top_k = top_k
        self.renormalize = renormalize

    def forward(self, x_TD: Tensor) -> Routing:
        # float32 even in a bf16 run: near-ties in bf16 flip the chosen expert from step to step,
        # and the balance loss then chases noise.
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            logit_TE = nn.functional.linear(x_TD.float(), self.weight.float())
        prob_TE = logit_TE.softmax(-1)
        weight_TK, expert_TK = prob_TE.topk(self.top_k, -1)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        # not bincount: on CUDA it waits for the device to learn the largest id
        copies_N = expert_TK.flatten()
        count_E = copies_N.new_zeros(logit_TE.shape[-1]).scatter_add_(0, copies_N, torch.ones_like(copies_N))
        return Routing(
            expert_TK=expert_TK,
            weight_TK=weight_TK,
            logit_TE=logit_TE,
            prob_TE=prob_TE,
            count_E=count_E,
        )
