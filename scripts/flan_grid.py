"""Flan-MoE in small (Shen et al. 2023, arXiv:2305.14705): dense against sparse, direct against instruction tuning.

    python scripts/flan_grid.py flan [--seeds 1 2]

A dense and a sparse model of equal active size are pre-trained on a dictionary (GCIDE, without what it has from
WordNet). Each is then tuned with the presets flan_moe_direct (one task), flan_moe (all tasks but two) and flan_moe_both
(that, then one of the two); the sparse one also with parts frozen. All are asked about words that none was tuned on.
Every run is an ordinary one in flan/runs, its marks lie in flan/scores; what is there is not made again. Prints tables
in Markdown and draws flan/flan_grid.png. See instruction_set.py for the data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import instruction_set
from debian_corpus import DICTIONARY, dictionary_entries, unpacked

ASKED = ("reverse", "category")
"""Tasks that instruction tuning does not see."""
TUNED = tuple(task for task in instruction_set.PHRASES if task not in ASKED)
SIZE = [
    "model.vocab_size=2048",
    "model.d_model=96",
    "model.num_layers=3",
    "model.d_ff=384",
    "batch.sequence_length=128",
]
"""Of both; 0.64 M parameters answer for each token, the sparse model has 1.64 M."""
MODELS = {"dense": ["model/moe=none"], "moe": ["model.moe.d_expert=192"]}
FROZEN = {"router": ("[router]", -1), "experts": ("[experts]", 1), "MoE": ("[router,experts]", 1)}
"""What optim.freeze is, and the sign of the loss less that with nothing frozen in the paper."""
PRESETS = {"direct": "flan_moe_direct", "instructed": "flan_moe", "both": "flan_moe_both"}
DICTIONARY_SHARE = 0.25
Scores = Mapping[str, Mapping[str, Any]]
"""By the name of a point."""


@dataclass(frozen=True)
class Point:
    """A run of the grid."""

    model: str
    seed: int
    setting: str
    task: str = ""
    frozen: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, str(self.seed), self.setting, self.task, self.frozen)))


@dataclass(frozen=True)
class Steps:
    """How long each kind of run is, and its peak rate."""

    base: int
    instructed: int
    task: int
    lr: float


def points(seeds: Sequence[int]) -> Iterator[Point]:
    """Every run, each after what it begins from; a seed is complete before the next one begins."""
    for seed in seeds:
        for model in MODELS:
            yield Point(model, seed, "base")
            yield Point(model, seed, "instructed")
            for task in ASKED:
                yield Point(model, seed, "direct", task)
                yield Point(model, seed, "both", task)
        yield from (Point("moe", seed, "instructed", frozen=part) for part in FROZEN)


def settings(point: Point, steps: Steps) -> list[str]:
    """What comes after `moetrain train`, run in the directory of the grid."""
    common = [f"name={point.name}", f"seed={point.seed}", *SIZE, *MODELS[point.model], "launch.processes=1",
              "log.wandb=off", "checkpoint.every_steps=null", "evaluate.every_steps=null",
              "preflight=skip"]  # fmt: skip
    if point.setting == "base":
        # documents apart as in tuning, where else it would be asked with other questions before its own
        return [*common, "data.name=dictionary", "data.text=data/dictionary.jsonl", "data.mask_documents=true",
                f"schedule.steps={steps.base}", f"schedule.warmup_steps={steps.base // 10}"]  # fmt: skip
    start = replace(point, setting="instructed" if point.setting == "both" else "base", task="", frozen="")
    length = steps.instructed if point.setting == "instructed" else steps.task
    tasks = [point.task] if point.task else TUNED
    frozen = [f"optim.freeze={FROZEN[point.frozen][0]}"] if point.frozen else []
    files = ",".join(f"data/train/{task}.jsonl" for task in tasks)
    return [f"experiment={PRESETS[point.setting]}", *common, *frozen, f"init.weights=runs/{start.name}",
            f"data.name={point.task or 'tuned'}", f"data.text=[{files}]",
            f"optim.lr={steps.lr}", f"schedule.steps={length}", f"schedule.warmup_steps={length // 10}"]  # fmt: skip


def moetrain(*words: str, out: Path) -> None:
    """Run a verb in the directory of the grid."""
    line = [sys.executable, "-m", "moetrain.cli", *words]
    code = subprocess.run(line, cwd=out, stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)  # it has said why


def make_data(out: Path) -> None:
    """The instructions, and the dictionary to pre-train on."""
    target = out / "data" / "dictionary.jsonl"
    if target.exists():
        return
    print(instruction_set.build(out / "data"), flush=True)
    with tempfile.TemporaryDirectory() as place:
        entries = [text for text in dictionary_entries(unpacked(DICTIONARY, Path(place)))
                   if "WordNet" not in text and instruction_set.share(text) < DICTIONARY_SHARE]  # fmt: skip
    beside = target.with_suffix(".jsonl.partial")
    beside.write_text("".join(json.dumps({"text": text}) + "\n" for text in entries), encoding="ascii")
    beside.replace(target)


def prepare_questions(out: Path, *, tokenizer: str) -> None:
    """The held-out rows of every task as tokens. None is trained on: how they are split in two does not matter."""
    if all((out / "asked" / task).exists() for task in instruction_set.PHRASES):
        return
    sources = ",".join(f"{task}:{{text:data/held_out/{task}.jsonl,prepared:asked/{task}}}"
                       for task in instruction_set.PHRASES)  # fmt: skip
    (out / "asked").mkdir(exist_ok=True)
    moetrain(
        "prepare", f"data.sources={{{sources}}}", "data.format=instruction", f"data.tokenizer={tokenizer}", out=out
    )


def score(point: Point, out: Path) -> dict[str, Any]:
    """The held-out loss of every task, nats per token of the answers, and how often two are answered word for word."""
    from moetrain.cli.main import main as verb

    run_dir = out / "runs" / point.name
    asked = [f"data={out / 'asked' / task}" for task in instruction_set.PHRASES]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = verb(["evaluate", str(run_dir), *asked, "split=train", "micro_batch=8", "json=true"])
    if code:
        sys.exit(code)
    losses = {source["name"]: source["loss"] for source in json.loads(told.getvalue())["sources"]}
    exact = {task: exact_match(run_dir, out / "data/held_out" / f"{task}.jsonl") for task in ASKED}
    return {"loss": losses, "exact": exact}


def exact_match(run_dir: Path, questions: Path) -> float:
    """The share of the questions that the model's likeliest answer, token by token, is right for."""
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.hub.generate import Sampling, generate, load_model
    from moetrain.instruct.template import ASSISTANT, CONTENT, TEMPLATE

    run, gpt = load_model(run_dir, warn=print)
    rows = [json.loads(line) for line in questions.read_text(encoding="ascii").splitlines()]
    begin = TEMPLATE[ASSISTANT].partition(CONTENT)[0]
    prompts = [TEMPLATE["user"].replace(CONTENT, row["prompt"]) + begin for row in rows]
    answers = [""] * len(rows)
    sampling = Sampling(max_tokens=16, temperature=0, stop=("\n",))
    for piece in generate(gpt, load_tokenizer(run_dir / "tokenizer.json"), prompts, sampling=sampling,
                          context=run.model.context):  # fmt: skip
        answers[piece.row] += piece.text
    return sum(said.strip() == row["response"] for said, row in zip(answers, rows, strict=True)) / len(rows)


def hold_together(out: Path, steps: Steps) -> None:
    """End where the points that are there were made with other steps: they would stand in one table."""
    path = out / "steps.json"
    if path.exists() and (was := json.loads(path.read_text(encoding="ascii"))) != asdict(steps):
        sys.exit(f"{out} was made with {was}, not {asdict(steps)}: give the same, or another directory")
    path.write_text(json.dumps(asdict(steps)), encoding="ascii")


def run(out: Path, seeds: Sequence[int], steps: Steps) -> dict[str, dict[str, Any]]:
    """Make every point that is not there; the marks of all."""
    (out / "scores").mkdir(parents=True, exist_ok=True)
    hold_together(out, steps)
    make_data(out)
    found: dict[str, dict[str, Any]] = {}
    for point in points(seeds):
        target = out / "scores" / f"{point.name}.json"
        if not target.exists():
            print(f"moetrain train {' '.join(settings(point, steps))}", flush=True)
            moetrain("train", *settings(point, steps), out=out)
            prepare_questions(out, tokenizer=f"runs/{point.name}/tokenizer.json")
            beside = target.with_suffix(".json.partial")
            beside.write_text(json.dumps(score(point, out), indent=1), encoding="ascii")
            beside.replace(target)
        found[point.name] = json.loads(target.read_text(encoding="ascii"))
    return found


Value = Callable[[Scores, str, int], float]
"""What a row of the table tells of a model with a seed, in nats per token."""


def loss(setting: str, task: str = "") -> Value:
    """The loss on a task that tuning left out: of the run for it, or of the one for all."""

    def value(scores: Scores, model: str, seed: int) -> float:
        tasks = [task] if task else ASKED
        own = [Point(model, seed, setting, each if setting in ("direct", "both") else "") for each in tasks]
        return sum(scores[point.name]["loss"][each] for point, each in zip(own, tasks, strict=True)) / len(tasks)

    return value


def gained(before: str, after: str) -> Value:
    """By how much the loss is lower, over the tasks left out."""
    return lambda scores, model, seed: loss(before)(scores, model, seed) - loss(after)(scores, model, seed)


ROWS: tuple[tuple[str, Value, int], ...] = (
    ("pre-trained, asked as it is", loss("base"), 0),
    *((f"direct: tuned on `{task}` alone", loss("direct", task), 1) for task in ASKED),
    *((f"instruction-tuned, `{task}` never seen", loss("instructed", task), -1) for task in ASKED),
    *((f"both: instruction-tuned, then `{task}`", loss("both", task), -1) for task in ASKED),
    ("what instruction tuning gains, zero-shot (mean)", gained("base", "instructed"), 1),
    ("what it gains before a task (mean)", gained("direct", "both"), 1),
)
"""What is told, and the sign of sparse less dense in the paper; 0: it says nothing."""


def verdict(differences: Sequence[float], expected: int) -> str:
    """Whether all differences point where the paper's do."""
    if expected == 0:
        return ""
    if all(difference * expected > 0 for difference in differences):
        return "as there"
    return "against it" if all(difference * expected < 0 for difference in differences) else "mixed"


def table(scores: Scores, seeds: Sequence[int]) -> Iterator[str]:
    """Dense against sparse; each number a mean over the seeds, differences of each seed beside it."""
    yield "| | dense | MoE | MoE - dense | of each seed | the paper | here |"
    yield "|---|--:|--:|--:|--:|---|---|"
    for title, value, expected in ROWS:
        dense, moe = ([value(scores, model, seed) for seed in seeds] for model in MODELS)
        apart = [one - other for one, other in zip(moe, dense, strict=True)]
        sign = {0: "", 1: "above 0", -1: "below 0"}[expected]
        yield (f"| {title} | {mean(dense):.3f} | {mean(moe):.3f} | {mean(apart):+.3f} | "
               f"{', '.join(f'{each:+.3f}' for each in apart)} | {sign} | {verdict(apart, expected)} |")  # fmt: skip


def exact_table(scores: Scores, seeds: Sequence[int]) -> Iterator[str]:
    """Answers that are right word for word."""
    yield "| right word for word | " + " | ".join(f"`{task}`, dense | `{task}`, MoE" for task in ASKED) + " |"
    yield "|---|" + "--:|" * (2 * len(ASKED))
    for setting in ("direct", "instructed", "both"):
        cells = []
        for task in ASKED:
            for model in MODELS:
                own = [Point(model, seed, setting, "" if setting == "instructed" else task) for seed in seeds]
                cells.append(f"{mean([scores[point.name]['exact'][task] for point in own]):.1%}")
        yield f"| {setting} | {' | '.join(cells)} |"


def apart_when_frozen(scores: Scores, seeds: Sequence[int], part: str) -> dict[str, list[float]]:
    """How far the loss of the instruction-tuned sparse model is above that with nothing frozen, with each seed: on the
    tasks tuned on (``tuned``), and on each that it has never seen."""

    def instructed(seed: int, tasks: Sequence[str], *, frozen: str) -> float:
        return mean([scores[Point("moe", seed, "instructed", frozen=frozen).name]["loss"][task] for task in tasks])

    groups = {"tuned": TUNED} | {task: (task,) for task in ASKED}
    return {title: [instructed(seed, tasks, frozen=part) - instructed(seed, tasks, frozen="") for seed in seeds]
            for title, tasks in groups.items()}  # fmt: skip


def frozen_table(scores: Scores, seeds: Sequence[int]) -> Iterator[str]:
    """The sparse model instruction-tuned with parts of it frozen."""
    yield f"| frozen | tasks tuned on | {' | '.join(f'`{task}`, never seen' for task in ASKED)} | the paper | here |"
    yield "|---|--:|" + "--:|" * len(ASKED) + "---|---|"
    for part, (_, expected) in FROZEN.items():
        apart = apart_when_frozen(scores, seeds, part)
        cells = [", ".join(f"{each:+.3f}" for each in own) for own in apart.values()]
        here = verdict([each for own in apart.values() for each in own], expected)
        sign = "above 0" if expected > 0 else "slightly below 0"
        yield f"| {part} | {' | '.join(cells)} | {sign} | {here} |"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw(scores: Scores, seeds: Sequence[int], path: Path) -> None:
    """Both tables: a point for each seed, grey where the paper's would lie."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(3, 2))
    rows = [(title.replace("`", ""), value, expected) for title, value, expected in ROWS[1:-2]]
    for at, (_, value, expected) in enumerate(rows):
        left.barh(at, expected * 0.1, height=0.8, color="0.92")
        own = [value(scores, "moe", seed) - value(scores, "dense", seed) for seed in seeds]
        left.plot(own, [at] * len(own), "o", color="C0")
    left.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    left.set_xlabel("MoE - dense (nats per token)")
    for at, (part, (_, expected)) in enumerate(FROZEN.items()):
        right.barh(at, expected * 0.2, height=0.8, color="0.92")
        for number, (title, own) in enumerate(apart_when_frozen(scores, seeds, part).items()):
            label = "tasks tuned on" if title == "tuned" else f"{title}, never seen"
            right.plot(own, [at + 0.2 * (number - 1)] * len(own), "o", color=f"C{number + 1}",
                       label=None if at else label)  # fmt: skip
    right.set_yticks(range(len(FROZEN)), [f"{part} frozen" for part in FROZEN])
    right.set_xlabel("less nothing frozen (nats per token)")
    figure.legend(frameon=False, fontsize="small", loc="outside upper right", ncols=3)
    left.locator_params(axis="x", nbins=5)
    for panel in (left, right):
        panel.axvline(0, color="0.4", linewidth=1)
        panel.invert_yaxis()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--instructed-steps", type=int, default=180)
    parser.add_argument("--task-steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3, help="of tuning, for so small a model")
    given = parser.parse_args()
    steps = Steps(base=given.base_steps, instructed=given.instructed_steps, task=given.task_steps, lr=given.lr)
    scores = run(given.out, given.seeds, steps)
    for part in (table, exact_table, frozen_table):
        print("\n" + "\n".join(part(scores, given.seeds)))
    draw(scores, given.seeds, given.out / "flan_grid.png")
    print(f"\n{given.out / 'flan_grid.png'}")


if __name__ == "__main__":
    main()
