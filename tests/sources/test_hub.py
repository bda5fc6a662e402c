"""Datasets through `datasets`: a repository of parquet files on the disk stands in for one of the hub."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrain.errors import DataError
from moetrain.prepare.directory import prepared_directory
from moetrain.sources.hub import HubDataset, identity, parse
from moetrain.sources.text import inputs, records_of

CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - {split: train, path: en/train-*.parquet}
  - {split: test, path: en/test.parquet}
- config_name: fr
  data_files: fr/*.parquet
---
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    root = tmp_path / "repository"
    for name, texts in {
        "en/train-0.parquet": ["one", "two"],
        "en/train-1.parquet": ["three", None],
        "en/test.parquet": ["four"],
        "fr/a.parquet": ["un"],
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), root / name)
    (root / "README.md").write_text(CARD)
    return root


def read(pattern: str, *, column: str = "text") -> list[str]:
    (source,) = inputs([pattern])
    return [record.decode() for record in records_of(source, text_column=column, tell=lambda _: None)]


def test_rows_of_a_split_and_a_configuration_are_streamed_in_order(repository):
    assert read(f"hf:{repository}") == ["one", "two", "three", ""]
    assert read(f"hf:{repository}@test") == ["four"]
    assert read(f"hf:{repository}/fr") == ["un"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("hf:wikitext", HubDataset("wikitext", None, "train")),
        ("hf:allenai/c4/en@validation", HubDataset("allenai/c4", "en", "validation")),
        ("hf:HuggingFaceFW/fineweb", HubDataset("HuggingFaceFW/fineweb", None, "train")),
    ],
)
def test_a_name_is_taken_apart(pattern, expected):
    assert parse(pattern) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize("pattern", ["hf:", "hf:a/b/c/d", "hf:a//b"])
def test_what_is_no_name_is_refused(pattern):
    with pytest.raises(DataError, match=r"is written hf:OWNER/NAME\[/CONFIG\]\[@SPLIT\]"):
        parse(pattern)


def test_faults_name_the_dataset_and_a_way_out(repository):
    with pytest.raises(DataError, match=r"row 1 has no column 'body'; it has 'id', 'text'"):
        read(f"hf:{repository}", column="body")
    with pytest.raises(DataError, match=r"repository@dev cannot be read .*: check its name, configuration and split"):
        read(f"hf:{repository}@dev")
    with pytest.raises(DataError, match=r"cannot be read .*: check its name"):
        read(f"hf:{repository}/de")


def test_a_changed_dataset_is_another_one(repository, tmp_path):
    def name() -> Path:
        return prepared_directory(
            tmp_path, name="c", text=[f"hf:{repository}"], text_column="text", held_out=0.1, vocab_size=300,
            tokenizer=None,
        )  # fmt: skip

    before, told = name(), identity(parse(f"hf:{repository}"))
    assert name() == before
    pq.write_table(pa.table({"id": [0], "text": ["changed"]}), repository / "en" / "train-2.parquet")
    assert name() != before
    assert identity(parse(f"hf:{repository}")) != told
