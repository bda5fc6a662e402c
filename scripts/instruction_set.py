"""Instructions from two packages: chatterbot-corpus (PyPI; BSD) and WordNet 3.0 (Debian's wordnet-base; own licence).

    python scripts/instruction_set.py OUT        # OUT/train/TASK.jsonl and OUT/held_out/TASK.jsonl

WordNet's format is that of its manual page wndb(5WN). Of each word the commonest sense is taken, of words that occur in
the texts WordNet was counted on. What a synset gives is trained on or held out by its first word, the same in every
task, so that no task tells what another one asks. Needs Debian or Ubuntu with `apt-get update` done, and pip; nothing
is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from debian_corpus import unpacked

CHAT, WORDNET = "chatterbot-corpus==1.3.3", "wordnet-base"
HELD_OUT_SHARE = 0.125
TRAIN_ROWS, HELD_OUT_ROWS = 3000, 300
PHRASES = {
    "define": ("What does '{}' mean?", "Define the word '{}'.", "Give a dictionary definition of '{}'."),
    "reverse": ("Which word means: {}?", "Name the word for this: {}.", "What is the word for '{}'?"),
    "synonym": ("Give a synonym of '{}'.", "Which word means the same as '{}'?"),
    "opposite": ("What is the opposite of '{}'?", "Give an antonym of '{}'."),
    "kind": ("'{}' is a kind of what?", "Name something more general than '{}'."),
    "category": ("To which class of things does '{}' belong?", "Classify the word '{}'."),
    "speech": ("Is '{}' a noun, a verb, an adjective or an adverb?", "Which part of speech is '{}'?"),
    "use": ("Use the word '{}' in a sentence.", "Write an example with '{}'."),
    "fill": ("Which word is missing: {}", "Fill in the blank: {}"),
    "chat": ("{}",),
}
"""Ways to ask, for each task."""
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# lexnames(5WN), from 3 on: what the lexicographers sorted nouns and verbs into
CATEGORIES = """thing act animal artifact attribute body cognition communication event feeling food group location
motive object person phenomenon plant possession process quantity relation shape state substance time body change
cognition communication competition consumption contact creation emotion motion perception possession social stative
weather"""


@dataclass(frozen=True)
class Row:
    """A question, its answer, and what decides whether it is held out."""

    task: str
    about: str
    response: str
    key: str

    @property
    def prompt(self) -> str:
        phrases = PHRASES[self.task]
        return phrases[int(share(f"{self.task} {self.about}") * len(phrases))].format(self.about)


@dataclass(frozen=True)
class Synset:
    """Words of one meaning, and what is said of them."""

    words: tuple[str, ...]
    category: int
    definition: str
    examples: tuple[str, ...]
    pointers: tuple[tuple[str, str, str, int, int], ...]
    """Symbol, part of speech and offset of the other synset, number of the word here and there (0: the whole)."""


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)


def synset(line: str) -> Synset:
    """A line of a data file."""
    facts, _, gloss = line.partition(" | ")
    fields = facts.split()
    num_words = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * num_words : 2]]
    rest = fields[5 + 2 * num_words :]
    pointers = [
        (rest[at], rest[at + 2], rest[at + 1], int(rest[at + 3][:2], 16), int(rest[at + 3][2:], 16))
        for at in range(0, 4 * int(fields[4 + 2 * num_words]), 4)
    ]
    definition, _, examples = gloss.strip().partition('; "')
    found = re.findall(r'"([^"]+)"', f'"{examples}')
    return Synset(tuple(words), int(fields[1]), definition.strip("; "), tuple(found), tuple(pointers))


def wordnet_rows(root: Path) -> Iterator[Row]:
    """The rows of every task but chat."""
    data = {(path.suffix[1:], line.split(" ", 1)[0]): synset(line)
            for path in sorted(root.rglob("data.*")) for line in lines_of(path)}  # fmt: skip
    letters = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
    for path in sorted(root.rglob("index.*")):
        for line in lines_of(path):
            fields = line.split()
            # fields[3] kinds of pointers lie between; then senses, those that were counted, the commonest one's offset
            counted, offset = int(fields[5 + int(fields[3])]), fields[6 + int(fields[3])]
            if counted and re.fullmatch("[a-z]{3,}", fields[0]):
                own = data[path.suffix[1:], offset]
                others = {at: data[letters[at[1]], at[2]] for at in own.pointers}
                yield from rows_of(fields[0], own, others, part=PARTS[path.suffix[1:]])


def rows_of(
    word: str, own: Synset, others: Mapping[tuple[str, str, str, int, int], Synset], *, part: str
) -> Iterator[Row]:
    """What can be asked of a word in its commonest sense."""
    key = own.words[0].lower()
    yield Row("define", word, own.definition, key)
    yield Row("reverse", own.definition, word, key)
    yield Row("speech", word, part, key)
    if part in ("noun", "verb"):
        yield Row("category", word, CATEGORIES.split()[own.category - 3], key)
    same = [each for each in own.words if each.lower() != word]
    if same:
        yield Row("synonym", word, same[0], key)
    for at, other in others.items():
        symbol, _, _, here, there = at
        if symbol == "!" and own.words[here - 1].lower() == word:
            yield Row("opposite", word, other.words[there - 1], key)
            break
    above = [other for at, other in others.items() if at[0] == "@"]
    if above:
        yield Row("kind", word, above[0].words[0], key)
    spelt = [text for text in own.examples if re.search(rf"\b{word}\b", text)]
    if spelt:
        yield Row("use", word, spelt[0], key)
        yield Row("fill", re.sub(rf"\b{word}\b", "___", spelt[0]), word, key)


def chat_rows(wheel: Path) -> Iterator[Row]:
    """What was said, and what was answered."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.search(r"/english/[^/]+\.yml$", name):
                for turns in yaml.safe_load(archive.read(name))["conversations"]:
                    said = [str(each).strip() for each in turns]
                    yield from (Row("chat", one, other, one.lower()) for one, other in itertools.pairwise(said))


def lines_of(path: Path) -> Iterator[str]:
    """Those of a file of WordNet, without its licence, which is indented."""
    yield from (line for line in path.read_text(encoding="ascii").splitlines() if not line.startswith("  "))


def write(rows: Iterable[Row], out: Path) -> dict[str, tuple[int, int]]:
    """OUT/train/TASK.jsonl and OUT/held_out/TASK.jsonl; of each task, how many rows they have."""
    by_file: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        split = "held_out" if share(row.key) < HELD_OUT_SHARE else "train"
        by_file.setdefault((split, row.task), {})[row.prompt, row.response] = row
    for (split, task), found in by_file.items():
        most = HELD_OUT_ROWS if split == "held_out" else TRAIN_ROWS
        chosen = sorted(found.values(), key=lambda row: share(f"{row.about} {row.response}"))[:most]
        by_file[split, task] = {(row.prompt, row.response): row for row in chosen}
        target = out / split / f"{task}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": row.prompt, "response": row.response}) + "\n" for row in chosen]
        beside = target.with_suffix(".jsonl.partial")
        beside.write_text("".join(lines), encoding="ascii")
        beside.replace(target)
    return {task: (len(by_file.get(("train", task), ())), len(by_file.get(("held_out", task), ()))) for task in PHRASES}


def build(out: Path) -> dict[str, tuple[int, int]]:
    """Fetch the packages and write the rows."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place, CHAT], check=True)
        wheel = next(place.glob("chatterbot_corpus-*.whl"))
        return write([*wordnet_rows(unpacked(WORDNET, place)), *chat_rows(wheel)], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for task, (train, held_out) in build(parser.parse_args().out).items():
        print(f"{task}: {train:,} to train on, {held_out:,} held out")


if __name__ == "__main__":
    main()
