"""What a run is: every setting, its type, default, meaning, unit and source.

Hydra composes the YAML files of ``configs/`` over these defaults; ``config.freeze`` turns the result into a
``RunConfig``; ``config.checks`` holds the rules across fields. ``None`` always means "worked out from the others",
and the line under the field says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moetrain.config.data import DataConfig, PrepareConfig
from moetrain.config.launch.settings import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse feed-forward blocks (``model.moe``; null makes every block dense)."""

    num_experts: int = 8
    """Experts in each MoE block, over all ranks."""
    top_k: int = 2
    """Experts that answer for each token."""
    d_expert: int | None = None
    """Hidden width of one expert. null: model.d_ff, as in Mixtral, Switch and GLaM."""
    every: int = 1
    """An MoE block in every nth block, the last of each n: 1 = all, 2 = every other (GShard, Switch, GLaM)."""
    activation: str | None = None
    """Activation inside the experts: swiglu, geglu, gelu, gelu_tanh or relu. null: model.activation."""
    router: str = "top_k"
    """How a token finds its experts: top_k (Mixtral), switch, gshard, noisy_top_k, expert_choice, sinkhorn, hash,
    sigmoid_bias (loss-free), dense, or balanced (even by force, for benchmarks). docs/routing.md compares them."""
    renormalize: bool | None = None
    """top_k: whether the weights of the chosen experts sum to 1 (Mixtral) or keep their softmax value. null: true."""
    jitter: float | None = None
    """top_k, switch: in training the scores see the input times U(1 - jitter, 1 + jitter). null: 0 and
    0.01."""
    num_groups: int | None = None
    """top_k, sigmoid_bias: groups of neighbouring experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). null:
    none."""
    top_groups: int | None = None
    """top_k, sigmoid_bias: groups whose experts a token may choose among. null: all."""
    importance_weight: float | None = None
    """noisy_top_k: weight of the importance loss (Shazeer et al. 2017, arXiv:1701.06538, section 4). null: 0.1."""
    load_weight: float | None = None
    """noisy_top_k: weight of the load loss (ibid., appendix A). null: 0.1."""
    sinkhorn_iterations: int | None = None
    """sinkhorn: rounds of scaling. null: 8."""
    gate: str | None = None
    """sinkhorn: weight of an answer, sigmoid of its score or softmax over the experts. null: sigmoid."""
    hash_table: str | None = None
    """hash: balanced (by how often each token occurs; Roller et al. 2021, arXiv:2106.04426) or random. null:
    balanced."""
    bias_update_rate: float | None = None
    """sigmoid_bias: step of the bias after each optimizer step (Wang et al. 2024, arXiv:2408.15664). null: 0.001."""
    weight_scale: float | None = None
    """sigmoid_bias: times the weights (DeepSeek-V3 uses 2.5). null: 1."""
    pooling: str | None = None
    """dense: soft, or winner (in evaluation the largest gate answers alone). null: soft."""
    balance_weight: float | None = None
    """Weight of the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, equation 4). null: 0.01 for top_k, switch
    and gshard, 0 for the rest."""
    balance_scope: str = "global_batch"
    """Whose choices the balance loss counts: global_batch (all tokens of the step before; the same gradient on every
    layout), micro_batch (of one rank) or sequence."""
    z_weight: float | None = None
    """Weight of the router z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5). null: 0.001 for top_k, else 0."""
    capacity_factor: float | None = None
    """An expert takes at most this times T K / E copies of a micro-batch of T tokens; the rest is dropped. Who is
    dropped depends on later tokens too, save with top_k=1 and drop=position. null: no limit, nothing is dropped."""
    evaluation_capacity_factor: float | None = None
    """The same in evaluation. null: no limit."""
    min_capacity: int = 1
    """Copies an expert takes at least, where there is a limit."""
    drop: str = "position"
    """Which copies go first: position (later tokens, and second choices of all tokens before first ones) or probability
    (smallest weight)."""
    allow_noncausal: bool = False
    """Whether routers that see later tokens in training may be used (expert_choice, sinkhorn)."""
    num_shared_experts: int = 0
    """Experts that every token visits besides (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066), each d_expert wide."""
    shared_gate: bool = False
    """Whether a learned sigmoid scales the shared experts' answer."""
    dropout: float = 0.0
    """Share of an expert's hidden units left out in training (expert dropout; 0.4 to fine-tune in Switch, table 4)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer."""

    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    context: int = 256
    """Longest sequence, in tokens."""
    num_layers: int = 4
    """Transformer blocks."""
    d_model: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245). null: num_heads."""
    d_head: int | None = None
    """Width of one head. null: d_model / num_heads."""
    d_ff: int = 1024
    """Hidden width of a dense feed-forward block."""
    activation: str = "swiglu"
    """swiglu or geglu (gated, three matrices; Shazeer 2020, arXiv:2002.05202), gelu, gelu_tanh (GPT-2's
    approximation of it) or relu (two matrices)."""
    norm: str = "rmsnorm"
    """rmsnorm or layernorm, before each sublayer and once at the end."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    positions: str = "rope"
    """rope (Su et al. 2021, arXiv:2104.09864) or learned (GPT-2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    qk_norm: str | None = None
    """RMSNorm of queries and keys before the rotation: head (of each head by itself, as in Qwen3) or all (of all heads
    at once, as in OLMoE). null: none."""
    bias: bool = False
    """Biases in the linear maps of attention and dense feed-forward, and in layernorm. Experts and router have none."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; maps into the residual stream are scaled by 1/sqrt(2 num_layers)
    (GPT-2, Radford et al. 2019, section 2.3)."""
    dtype: str = "fp32"
    """fp32, or bf16 with fp32 master weights."""
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    """The sparse blocks; null: none."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many tokens meet at each step."""

    global_batch: int = 16
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch: int | None = None
    """Sequences per forward pass on one rank. null: global_batch / world size, so that nothing is accumulated."""
    sequence_length: int | None = None
    """Tokens per sequence. null: model.context."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings of positions have none."""
    clip: float = 1.0
    """Largest global gradient norm, every expert counted once; 0: no clipping."""
    router_lr_ratio: float = 1.0
    """Learning rate of the routers, as a share of lr."""
    experts_lr_ratio: float = 1.0
    """Learning rate of the experts, as a share of lr."""
    freeze: list[str] = field(default_factory=list)
    """Parts that stay as they are, of router, experts and dense (all but these two): [router, experts] freezes the
    sparse blocks, [dense] all but them (Shen et al. 2023, arXiv:2305.14705, compares what to freeze)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, and the learning rate on the way. Each length is given in steps or in tokens, not in both."""

    kind: str = "cosine"
    """After the warm-up: cosine, linear, wsd (constant, then linear decay; Hu et al. 2024, arXiv:2404.06395)
    or constant."""
    steps: int | None = 600
    """Optimizer steps in the run."""
    tokens: int | None = None
    """The same, in tokens."""
    warmup_steps: int | None = 30
    """Steps of linear warm-up."""
    warmup_tokens: int | None = None
    """The same, in tokens."""
    decay_steps: int | None = None
    """Length of the decay at the end; wsd only. null: a fifth of the run."""
    decay_tokens: int | None = None
    """The same, in tokens."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model lies over the ranks."""

    expert_parallel: int | None = None
    """Ranks that share one set of experts. null: the largest number that divides both the processes of a node and
    num_experts."""
    two_level_all_to_all: bool = False
    """Tokens go to the right place of their own node first, and from there to the other nodes, in fewer and longer
    messages; for expert_parallel above the processes of a node. The results are the same."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage (Rajbhandari et al. 2020, arXiv:1910.02054): 1 shards the optimizer, 2 gradients too, 3 also
    the weights (each is gathered where it is used)."""
    offload_optimizer: bool = False
    """Master weights, moments and the optimizer's step in the host's memory; needs zero_stage 1 or more."""
    recompute: str = "none"
    """Activations that the backward pass works out anew instead of keeping them: none, selective (all but what the
    experts got and answered, so that nothing travels twice) or full (all inside a block). The results are the same."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives a crash."""

    every_steps: int | None = 100
    """Save every n steps; null: not by steps. The last step is always saved."""
    every_minutes: float | None = None
    """Save when this many minutes have passed since the last save; null: not by time."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; false: training waits for the disk."""
    on_failure: str = "stop"
    """When a checkpoint cannot be written: stop, or go_on (warn, train on, try again at the next one). One that fails
    at the end of the run is an error in either case."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    keep_every_steps: int | None = None
    """Checkpoints whose step is a multiple of this stay for good; null: none."""
    keep_best: int = 0
    """How many of those with the lowest held-out loss stay; only a step that was evaluated on the way has one."""
    remote: str | None = None
    """URL of a place of this run's own where checkpoints are copied to and found again, e.g. s3://bucket/runs/name or
    gs://…: any that fsspec reaches. Credentials come from the environment, never from here. null: none."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What a run starts from, where it has no checkpoint of its own."""

    weights: str | None = None
    """Directory of a run (for its newest whole checkpoint) or of a checkpoint, whose weights this run starts from; the
    optimizer starts anew. null: weights drawn from the seed."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Going on from a checkpoint."""

    trust: bool = False
    """Go on, with a warning, where the checkpoint's resume certificate does not hold."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out loss."""

    every_steps: int | None = 100
    """Evaluate every n steps; null: only at the end."""
    max_sequences: int | None = 128
    """Sequences read in the evaluations on the way; the last one reads all. null: always all."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Numbers out."""

    every_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    dead_after_steps: int = 100
    """An expert that no token has chosen for this many steps is reported as dead."""
    wandb: str = "auto"
    """auto (online when logged in, else offline), online, offline or off."""
    wandb_project: str = "moetrain"
    """Project on Weights & Biases."""
    peak_tflops: float | None = None
    """Peak rate of one device in the run's dtype, for MFU. null: looked up by the device's name; unknown: no MFU."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What a run does about its own misfortunes; docs/incidents.md."""

    hang_seconds: float | None = None
    """When no rank has made any progress for so long, the culprit is named and the run stopped; 0: never. null: half of
    launch.timeout_seconds."""
    start_seconds: float = 1800.0
    """The same up to the end of the first step, and while saving or evaluating."""
    straggler_steps: int = 50
    """Steps over which a rank's own time is taken, without its waiting for others; 0: not at all."""
    straggler_ratio: float = 1.5
    """A rank is slow when its own time is this many times the median of the others'."""
    max_skips: int = 5
    """Steps in a row that may be skipped because their loss or gradient is no finite number; then the run goes back."""
    leave_out_before: int = 1
    """Batches before the first bad one that are left out with it: their updates may be the cause."""
    max_rollbacks: int = 3
    """How often, within a thousand steps, the run goes back to a checkpoint before it stops with an error."""
    spike: str = "warn"
    """A loss far above those before it: off, warn, skip (the update is not made; costs a wait for the device in every
    step) or rollback (to the newest checkpoint before; the batches are left out)."""
    spike_window: int = 64
    """Steps whose losses say what is usual."""
    spike_deviations: float = 10.0
    """How far above their median is a spike, in standard deviations worked out from their median absolute
    deviation."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    name: str | None = None
    """What the run is called. null: after the model, e.g. tiny or tiny-dense."""
    run_dir: str | None = None
    """Directory of everything the run writes. null: runs/NAME."""
    seed: int = 1234
    """Weights and data order are pure functions of it."""
    preflight: str = "auto"
    """What is checked before the first step: full (each node's facts, then speeds), skip, or auto: full, and on one
    machine without GPUs its facts alone, without a word where all is well."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence: ``batch.sequence_length``, else all of the model's context."""
        return self.batch.sequence_length or self.model.context


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What ``moetrain sample`` writes."""

    run_dir: str = "runs/tiny"
    """A run with a checkpoint."""
    step: int | None = None
    """Of the checkpoint. null: the newest whole one."""
    prompt: list[str] = field(default_factory=lambda: [""])
    """Text to go on from, once or several times; empty: a new document."""
    max_tokens: int = 120
    """Tokens to write at most."""
    temperature: float = 0.8
    """Divides the scores; 0: always the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest that hold this share of the probability, in (0, 1]."""
    seed: int = 0
    """Another seed, another text. The second of several prompts has the next seed, and so on."""
    stop: list[str] = field(default_factory=list)
    """Texts before which it ends, once or several times; a line break is written \\n."""
    colour: str = "none"
    """none, or experts: each token in the colour of the expert that it chose first."""
    layer: int | None = None
    """colour=experts: number of the MoE block, from 0. null: the one in the middle."""
