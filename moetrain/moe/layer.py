"""The MoE layer: router -> dispatch -> experts -> combine, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from moetrain.moe.balance import balance_loss, z_loss
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.router import TopKRouter


@dataclass(frozen=True)
class Load:
    """What an operator wants to see of one layer, on the device, detached. Losses are unweighted."""

    count_E: Tensor
    """int64, token copies this rank sent to each expert."""
    dropped: Tensor
    """int64 scalar, token copies that no expert took."""
    entropy: Tensor
    """float32 scalar, summed over this rank's tokens, nats."""
    balance: Tensor
    """float32 scalar."""
    z: Tensor
    """float32 scalar."""


@dataclass(frozen=True)
class MoEOutput:
    """The answer of an MoE layer."""

    hidden_TD: Tensor
    """Same shape as the input."""
    balance_loss: Tensor
    """Unweighted."""
    z_loss: Tensor
    """Unweighted."""
    load: Load


class MoELayer(nn.Module):
    """A drop-in for a dense feed-forward.

    Args:
        router: picks the experts.
        experts: this rank's experts.
        dispatcher: brings tokens to the ranks of their experts.
        balance_group: ranks over which the balance loss counts tokens; None: this rank alone.
    """

    def __init__(
        self,
        router: TopKRouter,
        *,
        experts: Experts,
        dispatcher: Dispatcher,
        balance_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.balance_group = balance_group

    def forward(self, x: Tensor) -> MoEOutput:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD)
        rows = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(rows.x_RD, rows.count_e)
        y_TD = self.dispatcher.combine(y_RD, rows.receipt)
        balance = balance_loss(routing.prob_TE, routing.count_E, group=self.balance_group)
        z = z_loss(routing.logit_TE)
        prob_TE = routing.prob_TE.detach()
        load = Load(
            count_E=routing.count_E,
            dropped=routing.count_E.new_zeros(()),
            # xlogy: an expert of probability 0 adds nothing, where 0 * log 0 would give NaN
            entropy=-prob_TE.xlogy(prob_TE).sum(),
            balance=balance.detach(),
            z=z.detach(),
        )
        return MoEOutput(hidden_TD=y_TD.view_as(x), balance_loss=balance, z_loss=z, load=load)
