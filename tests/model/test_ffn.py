"""The dense feed-forward against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moetrain.model.ffn import FeedForward


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
def test_feed_forward_is_two_maps_and_a_nonlinearity(activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    net, x = FeedForward(3, d_ff=5, activation=activation, bias=bias).double(), torch.randn(7, 3, dtype=torch.float64)
    h = x @ net.w_in.weight.T + (net.w_in.bias if bias else 0)
    if activation in ("swiglu", "geglu"):
        gate = {"swiglu": F.silu, "geglu": F.gelu}[activation](h[:, :5])
        h = gate * h[:, 5:]
    else:
        h = {"gelu": F.gelu, "relu": F.relu}[activation](h)
    torch.testing.assert_close(net(x), h @ net.w_out.weight.T + (net.w_out.bias if bias else 0))
    assert len(list(net.parameters())) == (4 if bias else 2)
