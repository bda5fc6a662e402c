"""The scripts run."""

from __future__ import annotations

import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_the_texts_of_debians_packages_are_taken_apart(tmp_path):
    from debian_corpus import dictionary_entries, kernel_documents

    (tmp_path / "a.dict.dz").write_bytes(
        gzip.compress(b"Aback \\a*back\\, adv.\n   Backward.\n\nAbaft, prep.\n   Behind.\n")
    )
    assert list(dictionary_entries(tmp_path)) == ["Aback \\a*back\\, adv.\n   Backward.", "Abaft, prep.\n   Behind."]
    for name, text in {"a.rst.gz": "one", "b.txt": "two", "html/c.txt": "no", "translations/d.rst": "no", "e.png": "no",
                       "f.rst": "  "}.items():  # fmt: skip
        path = tmp_path / "doc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert list(kernel_documents(tmp_path / "doc")) == ["one", "two"]


def test_the_comparison_of_routers_names_settings_that_pass_the_checks():
    from compare_routers import ROUTERS

    from moetrain.cli.main import main
    from moetrain.config.routers import ROUTERS as THERE_ARE

    assert set(ROUTERS) == set(THERE_ARE) - {"balanced"}
    for router, own in ROUTERS.items():
        assert main(["train", f"model.moe.router={router}", f"name={router}", *own, "--dry-run"]) == 0


def test_the_sweep_script_finds_what_a_killed_sweep_left(tmp_path):
    from expert_count_sweep import at_work, done
    from made import a_sweep

    assert done(tmp_path) == 0
    sweep = a_sweep(tmp_path, seeds=1, unfinished=2)
    sweep.runs[-1].status = "running"
    sweep.write()
    lock = sweep.run_dir(sweep.runs[-1]) / "lock"
    lock.parent.mkdir()
    lock.write_text("4711 host\n")
    assert (done(tmp_path), at_work(tmp_path)) == (16, [4711])


def a_wordnet(root: Path) -> Path:
    """Two nouns and two adjectives; of one of them no occurrence was counted."""
    files = {
        "data.noun": "02084071 05 n 02 dog 0 domestic_dog 0 002 @ 02083346 n 0000 ~ 02083346 n 0000 | a tame wolf; "
        '"the dog barked"; "a good dog"  \n'
        "02083346 05 n 01 canine 1 001 ~ 02084071 n 0000 | a mammal with long muzzles  \n",
        "data.adj": "01247240 00 a 01 hot(p) 0 001 ! 01251128 a 0101 | of high temperature  \n"
        "01251128 00 a 02 cold 1 chilly 0 001 ! 01247240 a 0101 | of low temperature  \n",
        "index.noun": "dog n 2 2 @ ~ 2 1 02084071 02083346  \ncanine n 1 1 ~ 1 0 02083346  \n",
        "index.adj": "hot a 1 1 ! 1 7 01247240  \ncold a 1 1 ! 1 3 01251128  \n",
    }
    for name, text in files.items():
        (root / name).write_text(f"  1 This software and database is provided\n{text}")
    return root


def test_wordnet_and_the_chats_become_questions_and_answers(tmp_path):
    from instruction_set import chat_rows, wordnet_rows

    found = {(row.task, row.about): row.response for row in wordnet_rows(a_wordnet(tmp_path))}
    assert found == {
        ("define", "dog"): "a tame wolf", ("reverse", "a tame wolf"): "dog", ("speech", "dog"): "noun",
        ("category", "dog"): "animal", ("synonym", "dog"): "domestic dog", ("kind", "dog"): "canine",
        ("use", "dog"): "the dog barked", ("fill", "the ___ barked"): "dog",
        ("define", "hot"): "of high temperature", ("reverse", "of high temperature"): "hot",
        ("speech", "hot"): "adjective", ("opposite", "hot"): "cold",
        ("define", "cold"): "of low temperature", ("reverse", "of low temperature"): "cold",
        ("speech", "cold"): "adjective", ("opposite", "cold"): "hot", ("synonym", "cold"): "chilly",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "chats.whl", "w") as wheel:
        wheel.writestr("data/english/ai.yml", "conversations:\n- ['What is AI?', A branch., 42]\n")
        wheel.writestr("data/german/ai.yml", "conversations:\n- ['Was?', Das.]\n")
    rows = [(row.prompt, row.response) for row in chat_rows(tmp_path / "chats.whl")]
    assert rows == [("What is AI?", "A branch."), ("A branch.", "42")]


def test_what_is_asked_of_a_word_is_held_out_in_all_tasks_or_in_none(tmp_path):
    from instruction_set import HELD_OUT_SHARE, Row, write

    words = [f"word{n}" for n in range(400)]
    counts = write((Row(task, word, "x", word) for word in words for task in ("define", "use")), tmp_path)
    about = {
        (split, task): {each for line in (tmp_path / split / f"{task}.jsonl").read_text().splitlines()
                        for each in words if f"'{each}'" in json.loads(line)["prompt"]}
        for split in ("train", "held_out") for task in ("define", "use")
    }  # fmt: skip
    for split in ("train", "held_out"):
        assert about[split, "define"] == about[split, "use"]
    assert about["train", "use"] | about["held_out", "use"] == set(words)
    assert not about["train", "use"] & about["held_out", "use"]
    assert counts["use"] == (len(about["train", "use"]), len(about["held_out", "use"]))
    assert 0.5 < counts["use"][1] / (400 * HELD_OUT_SHARE) < 1.5


def test_the_grid_of_flan_moe_names_runs_that_pass_the_checks_and_begin_from_one_another(capsys):
    from flan_grid import ASKED, Point, Steps, points, settings

    from moetrain.cli.main import main

    steps = Steps(base=20, instructed=10, task=5, lr=1e-3)
    grid = list(points([3]))
    assert len(grid) == len({point.name for point in grid}) == 2 * 6 + 3
    begun = set()
    for point in grid:
        given = dict(word.partition("=")[::2] for word in settings(point, steps))
        assert given.get("init.weights", "runs/") in {"runs/", *begun}, "it comes after what it begins from"
        begun.add(f"runs/{given['name']}")
        if point.task != ASKED[1]:
            assert main(["train", *settings(point, steps), "--dry-run"]) == 0, capsys.readouterr().err
    both = settings(Point("moe", 3, "both", "reverse"), steps)
    assert {"init.weights=runs/moe-3-instructed", "data.text=[data/train/reverse.jsonl]"} <= set(both)
    tuned = next(word for word in settings(Point("moe", 3, "instructed"), steps) if word.startswith("data.text"))
    assert "define" in tuned
    assert not any(task in tuned for task in ASKED)


def test_a_grid_is_not_gone_on_with_in_another_length(tmp_path):
    from flan_grid import Steps, hold_together

    steps = Steps(base=20, instructed=10, task=5, lr=1e-3)
    hold_together(tmp_path, steps)
    hold_together(tmp_path, steps)
    with pytest.raises(SystemExit, match="give the same, or another directory"):
        hold_together(tmp_path, replace(steps, base=30))


def test_the_tables_of_the_grid_tell_differences_and_where_they_point(tmp_path):
    from flan_grid import FROZEN, TUNED, draw, exact_table, frozen_table, points, table

    tuned, scores = dict.fromkeys(TUNED, 3.0), {}
    own = {"base": 5.0, "direct": 2.0, "instructed": 4.0, "both": 1.5}
    for point in points([1, 2]):
        # sparse: worse direct and zero-shot with both seeds, better afterwards with one
        sparse = {"direct": 0.25, "instructed": 0.125, "both": -0.5 if point.seed == 1 else 0.25}.get(point.setting, 0)
        value = own[point.setting] + (sparse if point.model == "moe" else 0.0) + 0.125 * bool(point.frozen)
        scores[point.name] = {"loss": tuned | {"reverse": value, "category": value},
                              "exact": {"reverse": 0.25, "category": 0.5}}  # fmt: skip
    rows = {line.split(" | ")[0].strip("| "): line.strip("|").split("|")[1:] for line in table(scores, [1, 2])}
    rows = {title: [cell.strip() for cell in cells] for title, cells in rows.items()}
    assert rows["direct: tuned on `reverse` alone"] == [
        "2.000", "2.250", "+0.250", "+0.250, +0.250", "above 0", "as there"]  # fmt: skip
    assert rows["both: instruction-tuned, then `category`"] == [
        "1.500", "1.375", "-0.125", "-0.500, +0.250", "below 0", "mixed"]  # fmt: skip
    assert rows["what it gains before a task (mean)"] == [
        "0.500", "0.875", "+0.375", "+0.750, +0.000", "above 0", "mixed"]  # fmt: skip
    assert rows["instruction-tuned, `reverse` never seen"][-1] == "against it"
    frozen = {line.split(" | ")[0].strip("| "): line for line in frozen_table(scores, [1, 2])}
    assert set(FROZEN) <= set(frozen)
    for part, words in (("router", "slightly below 0 | mixed |"), ("experts", "above 0 | mixed |")):
        assert frozen[part].endswith(f"| +0.000, +0.000 | +0.125, +0.125 | +0.125, +0.125 | {words}")
    assert list(exact_table(scores, [1, 2]))[-1] == "| both | 25.0% | 25.0% | 50.0% | 50.0% |"
    draw(scores, [1, 2], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000
