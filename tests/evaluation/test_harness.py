"""The harness on our model: the same answers as on the exported one, and as a plain computation."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from as_typed import assert_told
from own_runs import write_own_run
from tokenizers import Tokenizer

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import train_tokenizer
from moetrain.evaluation.harness import likelihoods
from moetrain.hub.export import export
from moetrain.hub.generate import Sampling, generate, load_model

MODEL = ModelConfig(vocab_size=300, context=24, num_layers=2, d_model=16, num_heads=2, d_ff=24,
                    moe=MoEConfig(num_experts=3, top_k=2, d_expert=8))  # fmt: skip
ROWS = [{"question": f"{a} plus {b}", "choices": [str(a + b), str(a * b + 7)], "answer": a % 2}
        for a in range(4) for b in range(3)]  # fmt: skip
TASKS = {
    "sums_choice": """
task: sums_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} is"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "sums_text": """
task: sums_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "the sum of {{question}} is what anybody can see who has a pencil at hand"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "sums_write": """
task: sums_write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}} is"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, regexes_to_ignore: ["\ufffd"]}]  # half a character at the end: we leave it out
""",
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the sum of 1 plus 2 is what anybody can see " * 3]), vocab_size=290)


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_own_run(tmp_path / "run", MODEL, tokenizer)
    return tmp_path / "run"


@pytest.fixture
def tasks(run_dir: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of task files, and their examples. To some of them, what our model writes is the answer."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tasks").mkdir()
    _, gpt = load_model(run_dir, warn=pytest.fail)
    prompts = [tokenizer.encode(f"{row['question']} is").ids for row in ROWS]
    how, written = Sampling(max_tokens=8, temperature=0, stop=("e",)), [""] * len(ROWS)
    for piece in generate(gpt, tokenizer, prompts, sampling=how, context=MODEL.context):
        written[piece.row] += piece.text
    rows = [row | {"written": text if i % 2 else "-"} for i, (row, text) in enumerate(zip(ROWS, written, strict=True))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("FILE", str(tmp_path / "rows.jsonl")))
    return tmp_path / "tasks"


def test_a_likelihood_is_the_sum_of_its_tokens(run_dir):
    _, gpt = load_model(run_dir, warn=pytest.fail)
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (torch.randint(0, 300, (before,), generator=generator).tolist(),
         torch.randint(0, 300, (after,), generator=generator).tolist())
        for before, after in ((1, 1), (5, 3), (23, 1), (20, 5), (40, 4), (1, 30))
    ]  # fmt: skip
    for (before, after), (nats, greedy) in zip(pairs, likelihoods(gpt, pairs, context=24), strict=True):
        whole, expected, best = (before + after)[-25:], 0.0, True
        for at in range(len(whole) - min(len(after), 24), len(whole)):
            with torch.no_grad():
                log_V = gpt(torch.tensor([whole[:at]])).logit_BSV[0, -1].log_softmax(-1)
            expected += float(log_V[whole[at]])
            best = best and int(log_V.argmax()) == whole[at]
        assert nats == pytest.approx(expected, rel=1e-5)
        assert greedy == best
    with torch.no_grad():
        likeliest = int(gpt(torch.tensor([[1, 2, 3]])).logit_BSV[0, -1].argmax())
    assert likelihoods(gpt, [([1, 2, 3], [likeliest])], context=24)[0][1]


def test_our_model_and_the_exported_one_get_the_same_marks(run_dir, tasks, tmp_path, moetrain_in_process):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'moetrain[lm_eval]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [f"tasks={name}" for name in TASKS]
    done = moetrain_in_process("evaluate", str(run_dir), *names, f"include={tasks}", "json=true", "micro_batch=3")
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)["tasks"]

    export(run_dir, tmp_path / "hf-model", step=None, dtype=None, shard_bytes=1 << 30, check=False, warn=pytest.fail)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "hf-model"), device="cpu", batch_size=3, max_length=24),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for task, metrics in ours.items():
        wanted = {name: value for name, value in theirs[task].items() if isinstance(value, int | float)}
        assert metrics == pytest.approx(wanted, rel=1e-4), task
    marks = {task: {name.partition(",")[0] for name in metrics} for task, metrics in ours.items()}
    assert {"acc", "acc_norm"} <= marks["sums_choice"]
    assert 0 < ours["sums_choice"]["acc,none"] < 1
    assert "bits_per_byte" in marks["sums_text"]
    assert 0 < ours["sums_write"]["exact_match,none"] < 1


def test_a_task_that_is_not_there_is_told(run_dir, tasks, moetrain_in_process, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="needs lm_eval: pip install 'moetrain[lm_eval]'")
    # the index of its own thousands of tasks takes seconds, and is not what is tested
    monkeypatch.setattr(lm_eval, "TaskManager", partial(lm_eval.TaskManager, include_defaults=False))
    assert_told(moetrain_in_process("evaluate", str(run_dir), "tasks=no_such_task", f"include={tasks}"),
                "tasks names 'no_such_task', which is not in lm_eval or in")  # fmt: skip


def test_without_the_harness_it_says_what_to_install(run_dir, moetrain_in_process, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_told(moetrain_in_process("evaluate", str(run_dir), "tasks=a"), "pip install 'moetrain[lm_eval]'")
