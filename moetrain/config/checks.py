"""Rules across fields. All broken ones are told at once: field, value, rule, a way out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from moetrain.config.data import broken_rules as broken_data_rules
from moetrain.config.data import label_of
from moetrain.config.launch.rules import broken_rules as broken_launch_rules
from moetrain.config.launch.settings import KINDS, MANIFESTS, RUNNERS
from moetrain.config.routers import ROUTERS, broken_rules, resolve_router
from moetrain.config.schema import BatchConfig, ModelConfig, MoEConfig, RunConfig, ScheduleConfig
from moetrain.errors import ConfigError

CHOICES = {
    "model.activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu"),
    "model.moe.activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu"),
    "model.moe.router": tuple(ROUTERS),
    "model.moe.gate": ("sigmoid", "softmax"),
    "model.moe.hash_table": ("balanced", "random"),
    "model.moe.pooling": ("soft", "winner"),
    "model.moe.balance_scope": ("global_batch", "micro_batch", "sequence"),
    "model.moe.drop": ("position", "probability"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.positions": ("rope", "learned"),
    "model.qk_norm": ("head", "all"),
    "model.dtype": ("fp32", "bf16"),
    "schedule.kind": ("cosine", "linear", "wsd", "constant"),
    "prepare.duplicates": ("keep", "exact", "near"),
    "prepare.tokenizer_kind": ("bpe", "unigram"),
    "launch.kind": KINDS,
    "launch.runner": RUNNERS,
    "launch.kubernetes.manifest": MANIFESTS,
    "checkpoint.on_failure": ("stop", "go_on"),
    "preflight": ("auto", "full", "skip"),
    "log.wandb": ("auto", "online", "offline", "off"),
    "parallel.zero_stage": (0, 1, 2, 3),
    "parallel.recompute": ("none", "selective", "full"),
    "watch.spike": ("off", "warn", "skip", "rollback"),
}
PARTS = ("router", "experts", "dense")
"""Of a model, for learning rates and freezing."""
POSITIVE = (
    "model.vocab_size", "model.context", "model.num_layers", "model.d_model", "model.num_heads", "model.num_kv_heads",
    "model.d_head", "model.d_ff", "model.norm_eps", "model.rope_theta", "model.init_std", "model.moe.num_experts",
    "model.moe.top_k", "model.moe.d_expert", "model.moe.every", "model.moe.num_groups", "model.moe.top_groups",
    "model.moe.sinkhorn_iterations", "model.moe.weight_scale", "model.moe.capacity_factor",
    "model.moe.evaluation_capacity_factor", "model.moe.min_capacity", "batch.global_batch", "batch.micro_batch",
    "batch.sequence_length", "data.temperature", "data.max_epochs", "data.stream_block",
    "data.stream_window", "optim.router_lr_ratio", "optim.experts_lr_ratio", "optim.lr", "optim.eps",
    "schedule.steps", "schedule.tokens", "schedule.decay_steps",
    "schedule.decay_tokens", "parallel.expert_parallel", "launch.processes", "launch.timeout_seconds",
    "launch.nodes", "launch.lost_after_seconds", "launch.start_seconds", "launch.kubernetes.rdma_per_node",
    "launch.slurm.cpus_per_node", "launch.slurm.save_seconds",
    "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep",
    "checkpoint.keep_every_steps", "evaluate.every_steps", "evaluate.max_sequences", "log.every_steps",
    "log.dead_after_steps", "log.peak_tflops", "prepare.workers", "prepare.min_characters", "prepare.max_characters",
    "launch.stop_after_minutes", "watch.start_seconds", "watch.max_skips",
    "watch.spike_window", "watch.spike_deviations",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "model.moe.balance_weight", "model.moe.z_weight", "model.moe.importance_weight",
    "model.moe.load_weight", "model.moe.bias_update_rate", "model.moe.num_shared_experts",
    "optim.weight_decay", "optim.clip", "schedule.warmup_steps", "schedule.warmup_tokens", "checkpoint.keep_best",
    "launch.max_restarts", "watch.hang_seconds", "watch.straggler_steps", "watch.leave_out_before",
    "watch.max_rollbacks",
    "launch.slurm.gpus_per_node", "launch.kubernetes.gpus_per_node", "launch.kubernetes.retries",
)  # fmt: skip


def resolve(run: RunConfig, *, default_processes: int) -> RunConfig:
    """Fill in the settings left to be worked out, so that ``run.yaml`` says what happens.

    Args:
        default_processes: processes to start on each node when the user named no number.
    """
    processes = default_processes if run.launch.processes is None else run.launch.processes
    nodes = len(run.launch.hosts or ()) or 1 if run.launch.nodes is None else run.launch.nodes
    launch = replace(run.launch, processes=processes, nodes=nodes)
    length = run.model.context if run.batch.sequence_length is None else run.batch.sequence_length
    micro_batch = run.batch.micro_batch
    if micro_batch is None:
        micro_batch = max(1, run.batch.global_batch // max(1, launch.world_size))
    expert_parallel = run.parallel.expert_parallel
    if expert_parallel is None:
        expert_parallel = 1 if run.model.moe is None else math.gcd(processes, run.model.moe.num_experts)
    model = run.model if run.model.moe is None else replace(run.model, moe=resolve_router(run.model.moe))
    return replace(
        run,
        model=model,
        data=replace(run.data, name=label_of(run.data)),
        run_dir=f"runs/{run.name}" if run.run_dir is None else run.run_dir,
        batch=replace(run.batch, micro_batch=micro_batch, sequence_length=length),
        launch=launch,
        parallel=replace(run.parallel, expert_parallel=expert_parallel),
    )


def check(run: RunConfig, flat: dict[str, object]) -> None:
    """Hold a resolved run against every rule.

    Args:
        run: the settings, resolved.
        flat: the same by dotted name (``freeze.flatten``).

    Raises:
        ConfigError: with every broken rule.
    """
    problems = [*_single_fields(flat), *broken_data_rules(run.data), *broken_launch_rules(run.launch)]
    # rules across fields divide by numbers: they wait until each number by itself is sound
    if not problems:
        problems += [*_model(run.model), *_layout(run), *_batch(run), *_schedule(run.schedule), *_engine(run),
                     *_retention(run), *_freeze(run), *_watch(run)]  # fmt: skip
    if problems:
        raise ConfigError(problems)


def steps_in_run(schedule: ScheduleConfig, *, tokens_per_step: int) -> int:
    """Optimizer steps of the whole run."""
    return in_steps(schedule.steps, schedule.tokens, tokens_per_step=tokens_per_step) or 0


def in_steps(steps: int | None, tokens: int | None, *, tokens_per_step: int) -> int | None:
    """A length given in steps or in tokens, in steps; tokens are rounded up to whole steps."""
    return steps if tokens is None else -(-tokens // tokens_per_step)


def _single_fields(flat: dict[str, object]) -> Iterator[str]:
    for name, allowed in CHOICES.items():
        value = flat.get(name)
        if value is not None and value not in allowed:
            yield f"{name} is {value!r}, but must be one of {', '.join(map(str, allowed))}"
    for names, rule, holds in ((POSITIVE, "above 0", _is_positive), (NOT_NEGATIVE, "at least 0", _is_not_negative)):
        for name in names:
            value = flat.get(name)
            if isinstance(value, (int, float)) and not holds(value):
                yield f"{name} is {value:,}, but must be {rule}{'' if abs(value) < math.inf else ' and finite'}"
    for name in ("optim.beta1", "optim.beta2"):
        value = flat.get(name)
        if isinstance(value, float) and not 0 <= value < 1:
            yield f"{name} is {value}, but must lie in [0, 1)"
    for name, below in (("model.moe.dropout", 1), ("model.moe.jitter", 1)):
        value = flat.get(name)
        if isinstance(value, float) and not 0 <= value < below:
            yield f"{name} is {value}, but must lie in [0, {below}): 0 leaves it out"
    held_out = flat.get("data.held_out")
    if isinstance(held_out, float) and not 0 < held_out <= 0.5:
        yield f"data.held_out is {held_out}, but must lie in (0, 0.5]: it is a share of the documents"
    similarity = flat.get("prepare.similarity")
    if isinstance(similarity, float) and not 0 < similarity < 1:
        yield f"prepare.similarity is {similarity}, but must lie in (0, 1); for 1, set prepare.duplicates=exact"
    shortest, longest = flat.get("prepare.min_characters"), flat.get("prepare.max_characters")
    if isinstance(shortest, int) and isinstance(longest, int) and shortest > longest:
        yield f"prepare.min_characters is {shortest:,}, but must be at most prepare.max_characters, {longest:,}"
    duplicates = flat.get("prepare.duplicates")
    if flat.get("data.stream") and duplicates != "keep":
        yield (
            f"data.stream is true, but prepare.duplicates is {duplicates!r}, which looks at all the text before the "
            "first step: set prepare.duplicates=keep, or data.stream=false"
        )
    ratio = flat.get("schedule.min_lr_ratio")
    if isinstance(ratio, float) and not 0 <= ratio <= 1:
        yield f"schedule.min_lr_ratio is {ratio}, but must lie in [0, 1]"
    if not flat.get("data.text"):
        yield "data.text is empty, but must name at least one file, directory, glob or builtin corpus"
    for name in ("name", "run_dir"):
        if flat.get(name) == "":
            yield f"{name} is empty, but tells the run's directory: give it a value, or null"
    remote = flat.get("checkpoint.remote")
    if isinstance(remote, str):
        yield from _remote(remote)


def _remote(url: str) -> Iterator[str]:
    protocol, separator, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if (at and ":" in user) or "?" in rest or "#" in rest:
        # not shown: it goes into logs
        yield (
            "checkpoint.remote has a password or a query in it, but settings are written down and logged: leave the "
            "credentials to the environment (AWS_ACCESS_KEY_ID, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, …)"
        )
    elif not separator or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or not rest.strip("/"):
        yield (
            f"checkpoint.remote is {url!r}, but must be a URL with a place of this run's own, such as "
            "s3://bucket/runs/name; a local directory is run_dir=…"
        )


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _is_not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _freeze(run: RunConfig) -> Iterator[str]:
    for part in run.optim.freeze:
        if part not in PARTS:
            yield f"optim.freeze names {part!r}, but a model has {', '.join(PARTS)}"
    if run.model.moe is None and run.optim.freeze:
        yield f"optim.freeze is {run.optim.freeze}, but the model is dense, and nothing would be left: set it to []"
    elif set(PARTS) <= set(run.optim.freeze):
        yield "optim.freeze names every part of the model, but something must learn: leave one out"


def _model(model: ModelConfig) -> Iterator[str]:
    if model.d_head is None and model.d_model % model.num_heads:
        yield (
            f"model.d_model is {model.d_model}, but must be a multiple of model.num_heads, {model.num_heads}: "
            f"use {_near(model.d_model, model.num_heads)}, another number of heads, or set model.d_head"
        )
    elif model.positions == "rope" and (d_head := model.d_head or model.d_model // model.num_heads) % 2:
        yield f"model.d_head is {d_head}, but must be even for model.positions=rope: set model.d_head={d_head + 1}"
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads is {model.num_kv_heads}, but must divide model.num_heads, {model.num_heads}: "
            f"use one of {_divisors(model.num_heads)}"
        )
    if model.moe is not None:
        yield from _moe(model.moe, num_layers=model.num_layers)
        # torch's grouped matmul on CUDA wants rows of a multiple of 16 bytes
        step = 8 if model.dtype == "bf16" else 4
        for name, width in (("d_model", model.d_model), ("moe.d_expert", model.moe.d_expert or model.d_ff)):
            if width % step:
                yield (
                    f"model.{name} is {width}, but must be a multiple of {step} for an MoE model in {model.dtype}: "
                    f"use {width + step - width % step}"
                )


def _moe(moe: MoEConfig, *, num_layers: int) -> Iterator[str]:
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k is {moe.top_k}, but must be at most model.moe.num_experts, {moe.num_experts}: use fewer, "
            f"or {moe.top_k} experts"
        )
    yield from broken_rules(moe)
    if moe.top_k == 1 and moe.renormalize and moe.num_experts > 1:
        yield (
            "model.moe.renormalize is true, but must be false for model.moe.top_k=1: the one weight would always be 1, "
            "and the router would learn nothing from the loss"
        )
    if moe.capacity_factor is None and moe.evaluation_capacity_factor is None:
        for name, value, default in (("min_capacity", moe.min_capacity, 1), ("drop", moe.drop, "position")):
            if value != default:
                yield (
                    f"model.moe.{name} is {value}, but nothing is dropped without a capacity: leave it at {default}, "
                    "or set model.moe.capacity_factor or model.moe.evaluation_capacity_factor"
                )
    if moe.shared_gate and not moe.num_shared_experts:
        yield (
            "model.moe.shared_gate is true, but model.moe.num_shared_experts is 0: set it to false, or use shared "
            "experts"
        )
    if moe.every > num_layers:
        yield (
            f"model.moe.every is {moe.every}, but must be at most model.num_layers, {num_layers}: no block would be "
            "sparse; for a dense model use model/moe=none"
        )


def _layout(run: RunConfig) -> Iterator[str]:
    expert_parallel, world_size = run.parallel.expert_parallel or 1, run.launch.world_size
    node = run.launch.processes or 1
    if run.model.moe is None:
        if expert_parallel > 1:
            yield f"parallel.expert_parallel is {expert_parallel}, but the model is dense: use 1"
        if run.parallel.two_level_all_to_all:
            yield "parallel.two_level_all_to_all is true, but the model is dense: set it to false"
        return
    experts = run.model.moe.num_experts
    fitting = [n for n in _divisors(math.gcd(world_size, experts)) if node % n == 0 or n % node == 0]
    if world_size % expert_parallel:
        yield (
            f"parallel.expert_parallel is {expert_parallel}, but must divide the world size, {world_size}: "
            f"use one of {fitting}"
        )
    elif experts % expert_parallel:
        yield (
            f"model.moe.num_experts is {experts}, but must be a multiple of parallel.expert_parallel, "
            f"{expert_parallel}: use {_near(experts, expert_parallel, least=run.model.moe.top_k)}, "
            f"or an expert_parallel of {fitting}"
        )
    elif node % expert_parallel and expert_parallel % node:
        yield (
            f"parallel.expert_parallel is {expert_parallel}, but must divide launch.processes, {node}, or be a "
            f"multiple of it, so that experts are shared inside a node or among whole nodes: use one of {fitting}"
        )
    if run.parallel.two_level_all_to_all and expert_parallel <= node:
        yield (
            f"parallel.two_level_all_to_all is true, but parallel.expert_parallel is {expert_parallel}, and experts "
            f"are shared inside a node of {node} processes: set it to false"
        )


def _batch(run: RunConfig) -> Iterator[str]:
    batch: BatchConfig = run.batch
    micro_batch = batch.micro_batch or 1
    per_pass = micro_batch * run.launch.world_size
    if batch.global_batch % per_pass:
        yield (
            f"batch.global_batch is {batch.global_batch}, but must be a multiple of batch.micro_batch x world size, "
            f"{micro_batch} x {run.launch.world_size} = {per_pass}: use {_near(batch.global_batch, per_pass)}, or "
            "another micro_batch"
        )
    if batch.sequence_length and batch.sequence_length > run.model.context:
        yield (
            f"batch.sequence_length is {batch.sequence_length}, but must be at most model.context, "
            f"{run.model.context}: use less, or a longer context"
        )


def _schedule(schedule: ScheduleConfig) -> Iterator[str]:
    lengths = (
        ("steps", "tokens", schedule.steps, schedule.tokens),
        ("warmup_steps", "warmup_tokens", schedule.warmup_steps, schedule.warmup_tokens),
        ("decay_steps", "decay_tokens", schedule.decay_steps, schedule.decay_tokens),
    )
    for in_steps_name, in_tokens_name, steps, tokens in lengths:
        if steps is not None and tokens is not None:
            yield (
                f"schedule.{in_steps_name} is {steps:,} and schedule.{in_tokens_name} is {tokens:,}, "
                "but only one may be set: set the other to null"
            )
    steps, warmup = schedule.steps, schedule.warmup_steps
    if steps is not None and warmup is not None and warmup >= steps:
        yield (
            f"schedule.warmup_steps is {warmup:,}, but must be less than schedule.steps, {steps:,}, or the run ends in "
            f"its warm-up: use {steps // 10}, say"
        )
    if schedule.steps is None and schedule.tokens is None:
        yield "schedule.steps and schedule.tokens are both null, but one must say how long the run is: set one"
    for name, decay in (("decay_steps", schedule.decay_steps), ("decay_tokens", schedule.decay_tokens)):
        if schedule.kind != "wsd" and decay is not None:
            yield (
                f"schedule.{name} is {decay:,}, but schedule.kind is {schedule.kind}, and only wsd has a decay of its "
                "own: set it to null, or schedule.kind=wsd"
            )


def _engine(run: RunConfig) -> Iterator[str]:
    if run.parallel.zero_stage == 0 and run.model.dtype == "bf16":
        yield (
            "parallel.zero_stage is 0, but must be 1, 2 or 3 with model.dtype=bf16: DeepSpeed 0.19 takes a wrong first "
            "Adam step at stage 0 in bf16"
        )
    if run.parallel.zero_stage == 0 and run.parallel.offload_optimizer:
        yield (
            "parallel.offload_optimizer is true, but parallel.zero_stage is 0, where the optimizer works on the "
            "model's own weights: use 1, 2 or 3"
        )


def _retention(run: RunConfig) -> Iterator[str]:
    saves, evaluations = run.checkpoint.every_steps, run.evaluate.every_steps
    if run.checkpoint.keep_best and evaluations is None:
        yield (
            f"checkpoint.keep_best is {run.checkpoint.keep_best}, but evaluate.every_steps is null: no checkpoint "
            f"would have a held-out loss; set evaluate.every_steps={saves or 100}, or checkpoint.keep_best=0"
        )
    elif run.checkpoint.keep_best and saves and evaluations and saves % evaluations and evaluations % saves:
        yield (
            f"checkpoint.keep_best is {run.checkpoint.keep_best}, but evaluate.every_steps, {evaluations}, and "
            f"checkpoint.every_steps, {saves}, are no multiples of each other, and a checkpoint has a held-out loss "
            f"only where it was evaluated: set evaluate.every_steps={saves}, or checkpoint.keep_best=0"
        )
    every = run.checkpoint.keep_every_steps
    if every and saves and every % saves:
        yield (
            f"checkpoint.keep_every_steps is {every}, but must be a multiple of checkpoint.every_steps, {saves}, or "
            f"few such steps are saved: use {_near(every, saves)}"
        )


def _watch(run: RunConfig) -> Iterator[str]:
    timeout, watch = run.launch.timeout_seconds, run.watch
    if watch.hang_seconds is not None and watch.hang_seconds >= timeout:
        yield (
            f"watch.hang_seconds is {watch.hang_seconds:g}, but must be less than launch.timeout_seconds, {timeout}, "
            f"or the collective fails before the culprit is named: use {timeout // 2}, or a longer timeout"
        )
    if watch.straggler_ratio <= 1:
        yield f"watch.straggler_ratio is {watch.straggler_ratio:g}, but must be above 1: use 1.5"
    if watch.spike != "off" and watch.spike_window < 4:
        yield f"watch.spike_window is {watch.spike_window}, but must be at least 4 to know what is usual: use 64"


def _near(number: int, factor: int, *, least: int = 1) -> str:
    """The multiples of ``factor`` on both sides of ``number``."""
    above = math.ceil(number / factor) * factor
    return " or ".join(str(n) for n in (above - factor, above) if n >= least)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
