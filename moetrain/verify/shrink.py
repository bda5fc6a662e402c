"""The user's own settings, made small enough for processes on a CPU. What a layout could get wrong stays. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from moetrain.config.freeze import flatten, to_dict
from moetrain.config.launch.settings import LaunchConfig
from moetrain.config.routers import NO_SCORES, TOP_K
from moetrain.config.schema import ModelConfig, MoEConfig, RunConfig
from moetrain.verify.layouts import Layout, global_batch

D_MODEL, D_FF, VOCAB, CONTEXT, HEADS, EXPERTS, MOST_EVERY, MOST_TOP_K = 32, 64, 128, 16, 4, 8, 4, 8
TOKENS = 20_000
"""Length of the random text, enough for every step to see other tokens."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the one process that layouts are held against divides a global batch.

    Attributes:
        accumulation: passes one after another.
        ranks: parts of each pass, each with a random generator of its own.
    """

    accumulation: int = 1
    ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """A setting whose meaning depends on the layout: no two splits of a batch compute the same.

    Attributes:
        setting: as a user writes it, with its value.
        reason: why, in a sentence.
        split: what of a layout matters to it.
    """

    setting: str
    reason: str
    split: Callable[[Layout], Split]


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """A small run like the user's.

    Attributes:
        run: the settings; layout and dtype are those of no layout in particular (see ``lay_out``).
        changed: dotted name -> (before, after), sizes and the like.
        dependences: what differs between layouts by definition.
    """

    run: RunConfig
    changed: dict[str, tuple[object, object]]
    dependences: list[Dependence]


def shrink(run: RunConfig, *, layouts: Sequence[Layout], steps: int) -> Shrunk:
    """A run like the user's, small, for all these layouts.

    Kept are the kinds of everything (router and its settings, norm, activation, positions, tying, shared experts,
    drops, losses and their scopes) and top_k, weight decay, betas and seed. Smaller are the sizes. Besides:

    - Expert dropout is 0: its masks are drawn for the rows that reach a rank, which are others on every layout.
    - The learning rate is 0.01 from the first step on, so that a wrong update stands out from the weights it changes.
    - A clip is at most 0.1, so that it takes hold, and Adam's eps at least 1e-3, about the size of a gradient then:
      with a smaller one, gradients that are 0 but for rounding (of the keys' biases, as softmax does not see a shift)
      would be blown up to whole steps of noise.
    - init_std grows as widths shrink, by the square root, so that signals and scores keep their size.
    """
    model = _model(run.model, layouts=layouts)
    optim, batch = run.optim, run.batch
    length = model.context
    if run.sequence_length < run.model.context:
        length = max(1, model.context * 3 // 4)  # shorter than the context, as the user's is
    small = replace(
        run,
        model=model,
        batch=replace(batch, global_batch=global_batch(layouts), micro_batch=None, sequence_length=length),
        optim=replace(optim, lr=0.01, eps=max(optim.eps, 1e-3), clip=min(optim.clip, 0.1)),
        schedule=replace(run.schedule, kind="constant", steps=steps, tokens=None, warmup_steps=0, warmup_tokens=None,
                         decay_steps=None, decay_tokens=None),
        launch=LaunchConfig(nodes=1, processes=1, timeout_seconds=300),
    )  # fmt: skip
    before, after = flatten(to_dict(run)), flatten(to_dict(small))
    changed = {
        name: (before[name], after[name])
        for name in after
        if name.startswith(("model.", "optim.", "batch.")) and name not in ("batch.micro_batch", "model.dtype")
        and before[name] != after[name]
    }  # fmt: skip
    return Shrunk(run=small, changed=changed, dependences=list(dependences(small)))


def lay_out(run: RunConfig, layout: Layout) -> RunConfig:
    """The shrunk run on a layout."""
    return replace(
        run,
        model=replace(run.model, dtype=layout.dtype),
        batch=replace(run.batch, micro_batch=run.batch.global_batch // (layout.ranks * layout.accumulation)),
        parallel=replace(run.parallel, expert_parallel=layout.expert_parallel, zero_stage=layout.zero_stage),
        launch=replace(run.launch, processes=layout.ranks),
    )


def dependences(run: RunConfig) -> Iterator[Dependence]:
    """The settings of a run that mean another thing on another layout. To a new such setting, a line here."""
    moe = run.model.moe
    if moe is None:
        return
    has_balance = moe.router not in NO_SCORES  # with a weight of 0 it is still logged
    table = (
        (has_balance and moe.balance_scope == "micro_batch", "balance_scope=micro_batch", _each_rank,
         "the balance loss counts the tokens of one rank's micro-batch"),
        (moe.capacity_factor is not None, f"capacity_factor={moe.capacity_factor}", _each_rank,
         "an expert's room, and so who is dropped, is counted in each micro-batch"),
        (moe.router == "expert_choice", "router=expert_choice", _each_rank,
         "experts choose among the tokens of a rank's micro-batch"),
        (moe.router == "sinkhorn", "router=sinkhorn", _each_rank,
         "choices are evened out over the tokens of a rank's micro-batch"),
        (moe.router == "balanced", "router=balanced", _each_rank,
         "the expert follows from a token's place in its micro-batch"),
        (moe.router == "gshard", "router=gshard", _each_rank, "its random numbers are drawn for each rank and step"),
        (moe.router == "noisy_top_k", "router=noisy_top_k", _each_rank,
         "its noise is drawn for each rank and step, and its own losses are taken of each micro-batch"),
        (bool(moe.jitter), f"jitter={moe.jitter}", _each_rank, "its random numbers are drawn for each rank and step"),
    )  # fmt: skip
    for holds, setting, split, reason in table:
        if holds:
            yield Dependence(setting=f"model.moe.{setting}", reason=reason, split=split)


def split_of(run: RunConfig, layout: Layout) -> Split:
    """How one process must divide the batch to compute what the settings mean on this layout.

    A run without any ``dependences`` is held against the whole batch in one pass. In bf16 there are always as many
    passes as the layout accumulates: each rounds its gradient, and the bounds would have to allow for that too.
    """
    splits = [dependence.split(layout) for dependence in dependences(run)]
    if layout.dtype == "bf16":
        splits.append(_each_pass(layout))
    return Split(
        accumulation=max((split.accumulation for split in splits), default=1),
        ranks=max((split.ranks for split in splits), default=1),
    )


def _each_pass(layout: Layout) -> Split:
    return Split(accumulation=layout.accumulation)


def _each_rank(layout: Layout) -> Split:
    return Split(accumulation=layout.accumulation, ranks=layout.ranks)


def _model(model: ModelConfig, *, layouts: Sequence[Layout]) -> ModelConfig:
    every = min(model.moe.every, MOST_EVERY) if model.moe else 1
    small = replace(
        model,
        vocab_size=min(model.vocab_size, VOCAB),
        context=min(model.context, CONTEXT),
        num_layers=min(model.num_layers, max(2, every if every > 2 else 2 * every)),
        d_ff=min(model.d_ff, D_FF),
        dtype="fp32",
        moe=_moe(model.moe, d_ff=model.d_ff, every=every, layouts=layouts) if model.moe else None,
    )
    if model.d_model <= D_MODEL:
        return small
    heads = next(n for n in (HEADS, 2, 1) if n <= model.num_heads)
    per_group = model.num_heads // (model.num_kv_heads or model.num_heads)
    kv_heads = heads if per_group == 1 else (1 if model.num_kv_heads == 1 else heads // 2 or 1)
    width = model.num_heads * (model.d_head or model.d_model // model.num_heads)
    return replace(
        small,
        d_model=D_MODEL,
        num_heads=heads,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        # heads wider, together, than the residual stream stay so
        d_head=None if model.d_head is None else D_MODEL // heads * (2 if width > model.d_model else 1),
        init_std=model.init_std * math.sqrt(model.d_model / D_MODEL),
    )


def _moe(moe: MoEConfig, *, d_ff: int, every: int, layouts: Sequence[Layout]) -> MoEConfig:
    num_experts, top_k = _experts(moe, layouts=layouts)
    return replace(
        moe,
        num_experts=num_experts,
        top_k=top_k,
        d_expert=None if moe.d_expert is None else min(moe.d_expert, D_FF if moe.d_expert >= d_ff else D_FF // 2),
        every=every,
        num_shared_experts=min(moe.num_shared_experts, 2),
        dropout=0.0,
    )


def _experts(moe: MoEConfig, *, layouts: Sequence[Layout]) -> tuple[int, int]:
    """How many experts, and how many of them answer: few, but enough for top_k, groups and every layout."""
    top_k = moe.top_k if moe.top_k in TOP_K.values() else min(moe.top_k, MOST_TOP_K)
    groups = moe.num_groups or 1
    step = math.lcm(groups, *(layout.expert_parallel for layout in layouts))
    least = min(moe.num_experts, max(EXPERTS, 2 * top_k, 2 * groups))
    for num_experts in range(step, moe.num_experts, step):
        in_reach = num_experts // groups * (moe.top_groups or groups)
        if num_experts >= least and in_reach >= top_k:
            return num_experts, num_experts if moe.router == "dense" else top_k
    return moe.num_experts, moe.top_k
