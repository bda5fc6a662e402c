"""The dense feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.moe.experts import GATED, activate


class FeedForward(nn.Module):
    """Two linear maps and an activation between them; a gated one takes two halves of the first map."""

    def __init__(self, d_model: int, *, d_ff: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.w_in = nn.Linear(d_model, 2 * d_ff if activation in GATED else d_ff, bias=bias)
        self.w_out = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.w_out(activate(self.w_in(x), activation=self.activation))
        return hidden
