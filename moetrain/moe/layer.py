"""The MoE layer: router -> capacity -> dispatch -> experts -> combine, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.moe.assign import HashRouter
from moetrain.moe.balance import SCOPES, balance_loss, sequence_balance_loss, z_loss
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts, SharedExpert
from moetrain.moe.router import SigmoidBiasRouter
from moetrain.moe.routing import Choice, Routing, capacity_of, count, limit


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many copies an expert takes; those beyond it are left behind.

    Attributes:
        factor: times T K / E, in training; None: no limit.
        evaluation_factor: the same in evaluation.
        least: copies an expert takes at least.
        drop: which go first, ``position`` or ``probability`` (``routing.limit``).
    """

    factor: float | None = None
    evaluation_factor: float | None = None
    least: int = 1
    drop: str = "position"


@dataclass(frozen=True)
class Load:
    """What an operator wants to see of one layer, on the device, detached. Losses are unweighted."""

    count_E: Tensor
    """int64, token copies this rank's router sent to each expert, dropped ones included."""
    dropped: Tensor
    """int64 scalar, token copies that no expert took."""
    entropy: Tensor
    """float32 scalar, summed over this rank's tokens, nats; NaN for a router without scores."""
    chosen_E: Tensor
    """int64, those of them that the balance loss counts."""
    balance: Tensor
    """float32 scalar; NaN for a router without scores."""
    z: Tensor
    """float32 scalar; NaN for a router without scores."""


@dataclass(frozen=True)
class MoEOutput:
    """The answer of an MoE layer."""

    hidden_TD: Tensor
    """Same shape as the input."""
    losses: dict[str, Tensor]
    """Unweighted, by name: ``balance`` and ``z`` of every router with scores, and the router's own."""
    load: Load
    choice: Choice
    """What the router chose; the layer repeats it when it is handed back."""


class MoELayer(nn.Module):
    """A drop-in for a dense feed-forward.

    Args:
        router: picks the experts.
        experts: this rank's experts.
        dispatcher: brings tokens to the ranks of their experts.
        balance_scope: whose choices the balance loss counts. ``micro_batch``: those of this rank's micro-batch;
            ``sequence``: of each sequence by itself; ``global_batch``: of the whole global batch (Qiu et al. 2025,
            arXiv:2501.11873), namely the one of the step before. The choices of this step's later micro-batches are
            not known yet when the first one's gradient is taken; f one step old, which changes little from step to
            step, makes the gradient the same whatever the number of ranks and of micro-batches.
        capacity: room of the experts.
        shared: visited by every token; None: there is none.
        run: calls router, experts and shared expert, perhaps a second time in the backward pass instead of keeping
            what is inside; what travels between them is kept.
    """

    def __init__(
        self,
        router: nn.Module,
        *,
        experts: Experts,
        dispatcher: Dispatcher,
        balance_scope: str = "global_batch",
        capacity: Capacity | None = None,
        shared: SharedExpert | None = None,
        run: Callable[..., Any] = lambda function, *args: function(*args),
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatcher = dispatcher
        assert balance_scope in SCOPES, balance_scope
        self.balance_scope = balance_scope
        self.capacity = capacity or Capacity()
        self.run = run
        num_experts = dispatcher.ranks * len(experts.global_ids)
        # even at first: that has no gradient. No buffer, as the engine may cast buffers to bf16
        self.share_E = torch.full((num_experts,), 1 / num_experts)

    def forward(self, x: Tensor, token_BS: Tensor | None = None, replay: Choice | None = None) -> MoEOutput:
        """Args:
        x: [..., S, D].
        token_BS: ids of the tokens; the hash router needs them.
        replay: a choice to repeat, for recomputation and debugging; None: the router chooses.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        chosen = self._route(x_TD, None if token_BS is None else token_BS.flatten(), replay)
        routing = self._limited(chosen)
        rows = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.run(self.experts, rows.x_RD, rows.count_e)
        y_TD = self.dispatcher.combine(y_RD, rows.receipt)
        if self.shared is not None:
            y_TD = y_TD + self.run(self.shared, x_TD)
        chosen_E = _counted(routing)
        losses = routing.losses | self._losses(routing, chosen_E, length=x.shape[-2])
        load = _load(routing, losses, chosen_E=chosen_E)
        return MoEOutput(hidden_TD=y_TD.view_as(x), losses=losses, load=load, choice=chosen.choice)

    @property
    def wants_counts(self) -> bool:
        """Whether ``after_step`` makes a difference."""
        return self.balance_scope == "global_batch" or isinstance(self.router, SigmoidBiasRouter)

    @torch.no_grad()
    def after_step(self, count_E: Tensor) -> None:
        """Take note of the choices of the whole global batch (``Load.chosen_E``, summed), [E]."""
        self.share_E.copy_(count_E / count_E.sum())
        if isinstance(self.router, SigmoidBiasRouter):
            self.router.after_step(count_E)

    def state(self) -> dict[str, Tensor]:
        """What is kept from step to step beside the parameters; the same on every rank, filled in place by a load."""
        state = {"share_E": self.share_E} if self.balance_scope == "global_batch" else {}
        if isinstance(self.router, SigmoidBiasRouter):
            state["router.bias_E"] = self.router.bias_E
        elif isinstance(self.router, HashRouter):
            state["router.expert_V"] = self.router.expert_V
        return state

    def _route(self, x_TD: Tensor, token_T: Tensor | None, choice: Choice | None) -> Routing:
        def route(x_TD: Tensor) -> Routing:
            nonlocal choice
            routing: Routing = self.router(x_TD, token_T, choice)
            # for a second run: it must not choose anew
            choice = routing.choice
            return routing

        chosen: Routing = self.run(route, x_TD)
        return chosen

    def _limited(self, routing: Routing) -> Routing:
        factor = self.capacity.factor if self.training else self.capacity.evaluation_factor
        if factor is None:
            return routing
        tokens, top_k = routing.expert_TK.shape
        room = capacity_of(
            tokens=tokens, top_k=top_k, num_experts=routing.count_E.numel(), factor=factor, least=self.capacity.least
        )
        return limit(routing, capacity=room, drop=self.capacity.drop)

    def _losses(self, routing: Routing, chosen_E: Tensor, *, length: int) -> dict[str, Tensor]:
        if routing.prob_TE is None or routing.logit_TE is None:
            return {}
        if self.balance_scope == "sequence":
            balance = sequence_balance_loss(
                routing.prob_TE, routing.expert_TK, length=length, where_TK=routing.balance_TK
            )
        elif self.balance_scope == "global_batch" and self.training:
            self.share_E = self.share_E.to(routing.prob_TE.device)
            balance = balance_loss(routing.prob_TE, self.share_E)
        else:
            balance = balance_loss(routing.prob_TE, chosen_E / chosen_E.sum())
        return {"balance": balance, "z": z_loss(routing.logit_TE)}


def _counted(routing: Routing) -> Tensor:
    """Choices that the balance loss counts, [E]."""
    if routing.balance_TK is None:
        return routing.count_E
    return count(routing.expert_TK, num_experts=routing.count_E.numel(), where_TK=routing.balance_TK)


def _load(routing: Routing, losses: dict[str, Tensor], *, chosen_E: Tensor) -> Load:
    unknown = torch.full((), float("nan"), device=routing.count_E.device)
    entropy = unknown
    if routing.prob_TE is not None:
        prob_TE = routing.prob_TE.detach()
        # xlogy: an expert of probability 0 adds nothing, where 0 * log 0 would give NaN
        entropy = -prob_TE.xlogy(prob_TE).sum()
    return Load(
        count_E=routing.count_E,
        dropped=routing.count_E.sum() - routing.sent_E.sum(),
        entropy=entropy,
        chosen_E=chosen_E,
        balance=losses.get("balance", unknown).detach(),
        z=losses.get("z", unknown).detach(),
    )
