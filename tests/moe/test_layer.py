"""The MoE layer against a loop over tokens and experts in float64, by hand, and against the dense block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.model.ffn import FeedForward
from moetrain.moe.balance import balance_loss, z_loss
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.router import SigmoidBiasRouter, TopKRouter

D_MODEL, D_EXPERT = 6, 5
ROUTER_ERROR = {"rtol": 1e-5, "atol": 3e-5}
"""The router computes in float32, whatever the rest of the layer does; values here are of size 1 to 100."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(
    num_experts: int,
    *,
    top_k: int,
    activation: str = "swiglu",
    renormalize: bool = True,
    d_model: int = D_MODEL,
    d_expert: int = D_EXPERT,
    balance_scope: str = "global_batch",
) -> MoELayer:
    router = TopKRouter(d_model, num_experts=num_experts, top_k=top_k, renormalize=renormalize)
    experts = Experts(d_model, d_expert=d_expert, activation=activation, global_ids=range(num_experts))
    layer = MoELayer(router, experts=experts, dispatcher=Dispatcher(None), balance_scope=balance_scope).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + seed))
    return layer


def plain_expert(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        width = w_out.shape[1]
        return w_out @ (F.silu(w_in[:width] @ x) * (w_in[width:] @ x))
    return w_out @ {"gelu": F.gelu, "relu": F.relu}[activation](w_in @ x)


@dataclass(frozen=True)
class Plain:
    """Copies of a layer's weights that the loop may differentiate."""

    router: Tensor
    w_in: Tensor
    w_out: Tensor

    def __call__(self, x_TD: Tensor, *, top_k: int, activation: str, renormalize: bool) -> Tensor:
        answers = []
        for x in x_TD:
            logits = self.router @ x
            best = logits.argsort(descending=True)[:top_k]
            weights = logits[best].softmax(0) if renormalize else logits.softmax(0)[best]
            answer = torch.zeros_like(x)
            for weight, expert in zip(weights, best.tolist(), strict=True):
                answer = answer + weight * plain_expert(x, self.w_in[expert], self.w_out[expert], activation)
            answers.append(answer)
        return torch.stack(answers)

    @classmethod
    def of(cls, layer: MoELayer) -> Plain:
        sources = (layer.router.weight, layer.experts.w_in, layer.experts.w_out)
        return cls(*(each.detach().clone().requires_grad_() for each in sources))


def assert_equals_the_loop(layer: MoELayer, x_TD: Tensor, *, top_k: int, activation: str, renormalize: bool) -> None:
    """Outputs, and the gradients of input, router and each expert."""
    ours, theirs, plain = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_(), Plain.of(layer)
    expected = plain(theirs, top_k=top_k, activation=activation, renormalize=renormalize)
    answer = layer(ours).hidden_TD
    torch.testing.assert_close(answer, expected, **ROUTER_ERROR)

    upstream = normal(*expected.shape, seed=7)
    (expected * upstream).sum().backward()
    (answer * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **ROUTER_ERROR)
    torch.testing.assert_close(layer.experts.w_in.grad, plain.w_in.grad, **ROUTER_ERROR)
    torch.testing.assert_close(layer.experts.w_out.grad, plain.w_out.grad, **ROUTER_ERROR)
    # renormalised over one expert the weight is always 1, and the router learns nothing from the answers
    torch.testing.assert_close(layer.router.weight.grad, plain.router.grad, **ROUTER_ERROR)


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (5, 3), (4, 4), (1, 1)])
def test_layer_is_a_loop_over_tokens_and_experts(
    num_experts: int, top_k: int, activation: str, renormalize: bool
) -> None:
    layer = make_layer(num_experts, top_k=top_k, activation=activation, renormalize=renormalize)
    assert_equals_the_loop(layer, normal(13, D_MODEL), top_k=top_k, activation=activation, renormalize=renormalize)


@pytest.mark.parametrize("tokens", [1, 3], ids=["one token", "fewer tokens than experts"])
def test_few_tokens_leave_experts_idle_with_gradients_of_zero(tokens: int) -> None:
    layer, x_TD = make_layer(8, top_k=2), normal(tokens, D_MODEL)
    assert_equals_the_loop(layer, x_TD, top_k=2, activation="swiglu", renormalize=True)
    idle = (layer(x_TD).load.count_E == 0).nonzero().flatten().tolist()
    assert idle
    for expert in idle:
        assert not layer.experts.w_in.grad[expert].any()
        assert not layer.experts.w_out.grad[expert].any()


def test_one_expert_may_take_every_token() -> None:
    layer, x_TD = make_layer(3, top_k=1, renormalize=False), normal(9, D_MODEL).abs()
    with torch.no_grad():
        layer.router.weight[:] = torch.tensor([[-0.1], [0.1], [-0.2]])
    assert layer(x_TD).load.count_E.tolist() == [0, 9, 0]
    assert_equals_the_loop(layer, x_TD, top_k=1, activation="swiglu", renormalize=False)


def test_two_tokens_by_hand() -> None:
    """The router gives token (1, 0) the shares 3/4 and 1/4, token (0, 1) equal ones.

    Expert 0: h = relu(2a + 6b), answer (h, h). Expert 1: h = relu(4a - b), answer (0, h).
    """
    layer = make_layer(2, top_k=2, activation="relu", d_model=2, d_expert=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]))
        layer.experts.w_in.copy_(torch.tensor([[[2.0, 6.0]], [[4.0, -1.0]]]))
        layer.experts.w_out.copy_(torch.tensor([[[1.0], [1.0]], [[0.0], [1.0]]]))
    answer = layer(torch.eye(2, dtype=torch.float64))
    # 3/4 (2, 2) + 1/4 (0, 4) and 1/2 (6, 6) + 1/2 (0, 0)
    torch.testing.assert_close(answer.hidden_TD.tolist(), [[1.5, 2.5], [3.0, 3.0]], **ROUTER_ERROR)
    assert answer.load.count_E.tolist() == [2, 2]
    assert answer.load.dropped.item() == 0
    # equal counts: 1, whatever the probabilities
    assert answer.losses["balance"].item() == pytest.approx(1.0)
    # log(3 + 1) = 2 log 2 and log(1 + 1): mean of the squares
    assert answer.losses["z"].item() == pytest.approx(2.5 * math.log(2) ** 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)
    assert answer.load.entropy.item() == pytest.approx(entropy)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
def test_one_expert_is_a_dense_net(activation: str) -> None:
    layer = make_layer(1, top_k=1, activation=activation)
    dense = FeedForward(D_MODEL, d_ff=D_EXPERT, activation=activation, bias=False).double()
    with torch.no_grad():
        dense.w_in.weight.copy_(layer.experts.w_in[0])
        dense.w_out.weight.copy_(layer.experts.w_out[0])
    x_moe, x_dense = normal(9, D_MODEL).requires_grad_(), normal(9, D_MODEL).requires_grad_()
    y_moe, y_dense = layer(x_moe).hidden_TD, dense(x_dense)
    torch.testing.assert_close(y_moe, y_dense)
    upstream = normal(9, D_MODEL, seed=1)
    y_moe.backward(upstream)
    y_dense.backward(upstream)
    torch.testing.assert_close(x_moe.grad, x_dense.grad)
    torch.testing.assert_close(layer.experts.w_in.grad[0], dense.w_in.weight.grad)
    torch.testing.assert_close(layer.experts.w_out.grad[0], dense.w_out.weight.grad)


def test_losses_are_those_of_the_routing_and_reach_the_router() -> None:
    layer, x_TD = make_layer(4, top_k=2), normal(13, D_MODEL)
    layer.after_step(torch.tensor([5, 3, 2, 0]))
    answer, routing = layer(x_TD), layer.router(x_TD)
    expected = balance_loss(routing.prob_TE, torch.tensor([0.5, 0.3, 0.2, 0.0]))
    torch.testing.assert_close(answer.losses["balance"], expected)
    torch.testing.assert_close(answer.losses["z"], z_loss(routing.logit_TE))
    for loss in (answer.losses["balance"], answer.losses["z"]):
        (gradient,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert gradient.abs().max() > 1e-4


def test_over_the_global_batch_the_shares_are_those_of_the_step_before() -> None:
    """Even at first, without a pull on the router; then whatever was handed over, in training alone."""
    layer, x_TD = make_layer(4, top_k=2), normal(13, D_MODEL)
    balance = layer(x_TD).losses["balance"]
    assert balance.item() == pytest.approx(1.0)
    assert torch.autograd.grad(balance, layer.router.weight)[0].abs().max() < 1e-7
    prob_TE = layer.router(x_TD).prob_TE
    layer.after_step(torch.tensor([26, 0, 0, 0]))
    torch.testing.assert_close(layer(x_TD).losses["balance"], 4 * prob_TE[:, 0].mean())
    layer.eval()
    answer = layer(x_TD)
    torch.testing.assert_close(answer.losses["balance"], balance_loss(prob_TE, answer.load.count_E / 26))


@pytest.mark.parametrize(("scope", "wants"), [("global_batch", True), ("micro_batch", False), ("sequence", False)])
def test_counts_of_the_batch_are_asked_for_by_what_needs_them_alone(scope: str, wants: bool) -> None:
    layer = make_layer(4, top_k=2, balance_scope=scope)
    assert layer.wants_counts == wants
    layer.router = SigmoidBiasRouter(D_MODEL, num_experts=4, top_k=2, update_rate=0.1, scale=1.0)
    assert layer.wants_counts


def test_over_the_global_batch_the_gradient_does_not_depend_on_the_cut_into_micro_batches() -> None:
    x_TD = normal(12, D_MODEL)
    gradients = {}
    for scope in ("global_batch", "micro_batch"):
        for micro_batches in (1, 3):
            layer = make_layer(4, top_k=2, balance_scope=scope)
            layer.after_step(torch.tensor([11, 1, 8, 4]))
            for x in x_TD.chunk(micro_batches):
                (layer(x).losses["balance"] / micro_batches).backward()
            gradients[scope, micro_batches] = layer.router.weight.grad
    torch.testing.assert_close(gradients["global_batch", 3], gradients["global_batch", 1], **ROUTER_ERROR)
    assert not torch.allclose(gradients["micro_batch", 3], gradients["micro_batch", 1], rtol=1e-2)


def test_over_a_micro_batch_the_shares_are_its_own() -> None:
    layer, x_TD = make_layer(4, top_k=2, balance_scope="micro_batch"), normal(13, D_MODEL)
    layer.after_step(torch.tensor([26, 0, 0, 0]))
    answer, prob_TE = layer(x_TD), layer.router(x_TD).prob_TE
    torch.testing.assert_close(answer.losses["balance"], balance_loss(prob_TE, answer.load.count_E / 26))


def test_what_the_operator_sees_is_no_part_of_the_graph() -> None:
    load = make_layer(4, top_k=2)(normal(13, D_MODEL)).load
    assert load.count_E.sum().item() == 26
    assert not any(each.requires_grad for each in (load.count_E, load.entropy, load.balance, load.z))


def test_entropy_is_finite_when_a_probability_is_zero() -> None:
    layer = make_layer(3, top_k=1)
    with torch.no_grad():
        layer.router.weight.mul_(1e4)
    answer = layer(normal(5, D_MODEL))
    assert (layer.router(normal(5, D_MODEL)).prob_TE == 0).any()
    assert answer.load.entropy.item() == pytest.approx(0.0, abs=1e-6)


def test_sequences_are_flattened_and_come_back_in_shape() -> None:
    layer, x_BSD = make_layer(4, top_k=2), normal(2, 5, D_MODEL)
    y_BSD = layer(x_BSD).hidden_TD
    assert y_BSD.shape == x_BSD.shape
    torch.testing.assert_close(y_BSD.flatten(0, 1), layer(x_BSD.flatten(0, 1)).hidden_TD)


def test_input_need_not_be_one_block_of_memory() -> None:
    layer, x_BSD = make_layer(4, top_k=2), normal(5, 2, D_MODEL).transpose(0, 1)
    assert not x_BSD.is_contiguous()
    ours, block = x_BSD.detach().requires_grad_(), x_BSD.contiguous().requires_grad_()
    (ours_grad,) = torch.autograd.grad(layer(ours).hidden_TD.square().sum(), ours)
    (block_grad,) = torch.autograd.grad(layer(block).hidden_TD.square().sum(), block)
    torch.testing.assert_close(layer(ours).hidden_TD, layer(block).hidden_TD)
    torch.testing.assert_close(ours_grad, block_grad)


@pytest.mark.parametrize("top_k", [1, 2])
def test_layer_is_causal(top_k: int) -> None:
    """A token's answer does not depend on those after it, although they share the experts' batches."""
    layer, x_BSD = make_layer(4, top_k=top_k), normal(1, 12, D_MODEL)
    before = layer(x_BSD).hidden_TD
    for changed in (11, 6, 1):
        other = x_BSD.clone()
        other[:, changed:] = normal(1, 12 - changed, D_MODEL, seed=changed)
        after = layer(other).hidden_TD
        torch.testing.assert_close(after[:, :changed], before[:, :changed], **ROUTER_ERROR)
        assert not torch.allclose(after[:, changed:], before[:, changed:], **ROUTER_ERROR)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_bf16_differs_from_float32_by_bf16_rounding_alone(activation: str) -> None:
    """Same choices, as the router is float32; answers within the eight roundings on the way, of 2^-9 each.

    Rounded are: the two halves of h, the nonlinearity, the product, the answer, the weight, and sums of these.
    """
    exact = make_layer(4, top_k=2, activation=activation, d_model=64, d_expert=32).float()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_((parameter / 8).bfloat16())
    rounded = make_layer(4, top_k=2, activation=activation, d_model=64, d_expert=32).bfloat16()
    rounded.load_state_dict(exact.state_dict())
    x_exact = normal(50, 64).bfloat16().float().requires_grad_()
    x_rounded = x_exact.detach().bfloat16().requires_grad_()

    y_exact, y_rounded = exact(x_exact), rounded(x_rounded)
    assert y_rounded.hidden_TD.dtype == torch.bfloat16
    assert torch.equal(y_rounded.load.count_E, y_exact.load.count_E)
    y_exact.hidden_TD.square().sum().backward()
    y_rounded.hidden_TD.square().sum().backward()
    pairs = [(y_rounded.hidden_TD, y_exact.hidden_TD), (x_rounded.grad, x_exact.grad)]
    pairs += [(mine.grad, theirs.grad) for mine, theirs in zip(rounded.parameters(), exact.parameters(), strict=True)]
    for mine, theirs in pairs:
        error = (mine.float() - theirs).norm() / theirs.norm()
        assert 0 < error < 8 * 2**-9
