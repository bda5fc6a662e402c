"""What is compared, what passes, and what a difference is put down to: on traces made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.verify.compare import Reference, compare
from moetrain.verify.layouts import parse
from moetrain.verify.reference import StepTrace, Trace, Whole
from moetrain.verify.spec import BOUNDS

LAYOUT = parse("ranks4_ep2_zero1_acc2")
ROUTER, EXPERTS = "blocks.0.feed_forward.router.weight", "blocks.0.feed_forward.experts.w_in"


def make(*, noise: float = 0.0) -> tuple[Trace, Reference]:
    """A trace of random numbers, itself and with relative noise, as another order of sums would give."""
    gpt = build_model(ModelConfig(vocab_size=16, context=8, num_layers=1, d_model=8, num_heads=2, d_ff=16,
                                  moe=MoEConfig(num_experts=4)))  # fmt: skip
    initialize(gpt, init_std=0.1, seed=1)
    generator = torch.Generator().manual_seed(0)
    weights = {name: parameter.detach().flatten() for name, parameter in gpt.named_parameters()}
    gradient = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    start = {f"{name}/fp32": weight for name, weight in weights.items()}
    after = {f"{name}/{kind}": gradient[name] for name in weights for kind in ("fp32", "exp_avg", "exp_avg_sq")}
    after["blocks.0.feed_forward.router.bias_E/state"] = torch.tensor([0.1, -0.1, 0.1, -0.1])
    norm = math.sqrt(sum(float(each.square().sum()) for each in gradient.values()))
    steps = [
        StepTrace(language=4.0 - step, aux={"blocks.0.feed_forward balance": 1.2}, norms=[norm]) for step in (1, 2)
    ]
    snapshots = {step: Whole(tensors=tensors) for step, tensors in ((0, start), (1, after), (2, after))}
    trace = Trace(steps=steps, gradient=Whole(tensors=gradient), after=snapshots)
    found = Trace(
        steps=[replace(each, norms=each.norms * 4) for each in steps],
        gradient=Whole(tensors={name: each * (1 + noise) for name, each in gradient.items()}),
        after={step: Whole(tensors=dict(whole.tensors)) for step, whole in trace.after.items()},
    )
    return found, Reference.of(trace, gpt=gpt)


def first_of(found: Trace, reference: Reference, layout: str = LAYOUT.name) -> tuple[str, int, str]:
    difference = compare(found, reference, layout=parse(layout)).difference
    assert difference is not None
    return difference.what, difference.step, difference.hint


def part(tensor: torch.Tensor, expert: int) -> torch.Tensor:
    return tensor.view(4, -1)[expert]


def test_rounding_passes_and_ten_times_the_bound_does_not():
    result = compare(*make(noise=1e-6), layout=LAYOUT)
    assert result.difference is None
    for column in ("dense", "router", "expert"):
        assert result.errors[column] == pytest.approx(1e-6, rel=0.1)
    assert compare(*make(noise=10 * BOUNDS["fp32"]["dense"]), layout=LAYOUT).difference is not None


@pytest.mark.parametrize(
    ("factor", "hint"),
    [
        (2.0, "2.00 times too large: multiplied by expert_parallel or the copies of an expert or accumulation?"),
        (0.25, "4.00 times too small: divided by the ranks?"),
        (1.5, "1.500 times the right one"),
    ],
)
def test_one_experts_gradient_is_told_by_its_global_id(factor, hint):
    found, reference = make()
    found.gradient.tensors[EXPERTS] = found.gradient.tensors[EXPERTS].clone()
    part(found.gradient.tensors[EXPERTS], 2).mul_(factor)
    assert first_of(found, reference) == (f"gradient of {EXPERTS}, expert 2", 1, hint)


def test_a_gradient_that_is_wrong_but_by_no_factor_has_no_hint():
    found, reference = make()
    found.gradient.tensors[ROUTER] = found.gradient.tensors[ROUTER].flip(0)
    assert first_of(found, reference) == (f"gradient of {ROUTER}", 1, "")


def test_experts_in_each_others_places_are_told():
    found, reference = make()
    swapped = found.after[0].tensors[f"{EXPERTS}/fp32"].view(4, -1)[[1, 0, 2, 3]].flatten()
    found.after[0].tensors[f"{EXPERTS}/fp32"] = swapped
    what, step, hint = first_of(found, reference)
    assert (what, step) == (f"initial value of {EXPERTS}, expert 0", 0)
    assert hint == "it is that of expert 1: are the experts in their places?"


def test_initial_values_are_the_same_to_the_bit():
    found, reference = make()
    found.after[0].tensors[f"{ROUTER}/fp32"] = found.after[0].tensors[f"{ROUTER}/fp32"] * (1 + 2e-7)
    assert first_of(found, reference)[:2] == (f"initial value of {ROUTER}", 0)


def test_a_part_that_no_rank_holds_and_copies_that_differ_are_told():
    found, reference = make()
    missing = torch.full_like(found.after[1].tensors[f"{EXPERTS}/exp_avg"], math.nan)
    found.after[1].tensors[f"{EXPERTS}/exp_avg"] = missing
    assert first_of(found, reference)[0] == f"first moment of {EXPERTS}, expert 0"
    found, reference = make()
    found.after[2].torn.add(f"{ROUTER}/fp32")
    assert first_of(found, reference) == (f"weight of {ROUTER}", 2, "ranks hold different copies of it")


def test_the_state_of_a_router_is_compared():
    found, reference = make()
    found.after[2].tensors["blocks.0.feed_forward.router.bias_E/state"] = torch.tensor([0.1, 0.1, 0.1, -0.1])
    assert first_of(found, reference)[:2] == ("state of the router, blocks.0.feed_forward.router.bias_E", 2)


def test_a_routers_loss_comes_before_what_follows_from_it():
    found, reference = make()
    steps = [replace(found.steps[0], aux={"blocks.0.feed_forward balance": 0.3}, language=9.0), found.steps[1]]
    what, step, hint = first_of(replace(found, steps=steps), reference)
    assert (what, step) == ("router's loss, blocks.0.feed_forward balance", 1)
    assert hint == "4.00 times too small: divided by the ranks?"


def counted(reference: Reference, *, dense: float = 1.0, experts: tuple[float, ...] = (1.0,) * 4) -> float:
    """The norm of the gradient with these weights of its parts, expert by expert."""
    square = 0.0
    for name, gradient in reference.trace.gradient.tensors.items():
        is_expert = ".experts." in name
        parts = [gradient] if not is_expert else [part(gradient, expert) for expert in range(4)]
        weights = experts if is_expert else (dense,)
        square += sum(weight * float(each.square().sum()) for weight, each in zip(weights, parts, strict=True))
    return math.sqrt(square)


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        ({"experts": (0.0, 0.0, 1.0, 1.0)}, "a rank's own experts are counted, and those of other ranks missed?"),
        ({"experts": (0.0,) * 4}, "no expert is counted?"),
        ({"experts": (2.0,) * 4}, "each expert is counted on every rank that has a copy?"),
        ({"dense": 4.0}, "dense gradients are counted on every rank?"),
        ({"dense": 3.3}, ""),
    ],
)
def test_a_norm_says_what_it_left_out_or_counted_twice(weights, hint):
    found, reference = make()
    wrong = replace(found.steps[0], norms=[counted(reference, **weights)] * 4)
    assert first_of(replace(found, steps=[wrong, found.steps[1]]), reference) == ("gradient norm", 1, hint)


def test_norms_that_differ_between_ranks_are_told():
    found, reference = make()
    right = found.steps[0].norms[0]
    wrong = replace(found.steps[0], norms=[right, right, right, 2 * right])
    assert first_of(replace(found, steps=[wrong, found.steps[1]]), reference)[2] == "the ranks tell different norms"


def test_in_bf16_the_bounds_are_wide_and_tensors_are_compared_after_the_first_step_alone():
    found, reference = make(noise=1e-2)
    found.after[2].tensors[f"{ROUTER}/fp32"] = found.after[2].tensors[f"{ROUTER}/fp32"] * 2
    assert compare(found, reference, layout=parse("ranks4_ep2_zero1_acc2_bf16")).difference is None
    assert compare(found, reference, layout=LAYOUT).difference is not None


def test_a_gradient_that_is_rounding_is_held_against_the_others():
    found, reference = make()
    tiny = torch.full_like(reference.trace.gradient.tensors[ROUTER], 1e-9)
    reference.trace.gradient.tensors[ROUTER] = tiny
    found.gradient.tensors[ROUTER] = -tiny
    assert compare(found, reference, layout=LAYOUT).difference is None
