"""Real text from Debian's packages: a dictionary (GCIDE, 40 MB) and the documentation of the Linux kernel (25 MB).

    python scripts/debian_corpus.py corpus            # --code: 135 MB of the kernel's C as well
    moetrain train name=debian \\
      'data.sources={dictionary:{text:corpus/dictionary.jsonl},kernel:{text:corpus/kernel.jsonl}}'

Needs Debian or Ubuntu with `apt-get update` done; packages are downloaded and unpacked, not installed: no root needed.
The texts are under the GPL (dict-gcide: GPL-3+; Linux: GPL-2).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

DICTIONARY, KERNEL, CODE = "dict-gcide", "linux-doc", "linux-source"
CODE_BYTES = 135_000_000


def unpacked(package: str, place: Path) -> Path:
    """The files of a Debian package."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=place, check=True, stdout=subprocess.DEVNULL)
    archive = next(place.glob(f"{package}_*.deb"))
    root = place / package
    subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    return root


def newest(package: str) -> str:
    """The package that the empty linux-doc or linux-source stands for: linux-doc-6.1, or what this release has."""
    told = subprocess.run(["apt-cache", "depends", package], check=True, capture_output=True, text=True).stdout
    return re.findall(rf"Depends: ({package}-\S+)", told)[0]


def dictionary_entries(root: Path) -> Iterator[str]:
    """An entry begins in the first column."""
    text = gzip.decompress(next(root.rglob("*.dict.dz")).read_bytes()).decode("utf-8", errors="replace")
    for entry in re.split(r"\n(?=\S)", text):
        if entry.strip():
            yield entry.strip()


def kernel_documents(root: Path) -> Iterator[str]:
    """The sources of the pages, one document a file; translations are left out."""
    for path in sorted(root.rglob("*")):
        is_text = re.search(r"\.(rst|txt)(\.gz)?$", path.name) and path.is_file() and not path.is_symlink()
        if is_text and not {"html", "translations"} & set(path.parts):
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8", errors="replace").strip()
            if text:
                yield text


def kernel_code(root: Path) -> Iterator[str]:
    """C files in the order of the archive, one document a file, until there are `CODE_BYTES`."""
    left = CODE_BYTES
    with tarfile.open(next(root.rglob("linux-source-*.tar.xz"))) as archive:
        for member in archive:
            if left <= 0:
                return
            if member.isfile() and member.name.endswith((".c", ".h")):
                data = archive.extractfile(member)
                assert data is not None
                text = data.read().decode("utf-8", errors="replace").strip()
                left -= len(text.encode())
                if text:
                    yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where dictionary.jsonl and kernel.jsonl go")
    parser.add_argument("--code", action="store_true", help="code.jsonl, too: 135 MB of C")
    options = parser.parse_args()
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        wanted: list[tuple[str, str, Callable[[Path], Iterator[str]]]] = [
            ("dictionary", DICTIONARY, dictionary_entries),
            ("kernel", newest(KERNEL), kernel_documents),
        ]
        if options.code:
            wanted.append(("code", newest(CODE), kernel_code))
        for name, package, read in wanted:
            documents = list(read(unpacked(package, Path(place))))
            target = directory / f"{name}.jsonl"
            beside = target.with_suffix(".jsonl.partial")
            beside.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="ascii")
            beside.replace(target)
            size = sum(len(text.encode()) for text in documents)
            print(f"{target}: {len(documents):,} documents, {size / 1e6:.1f} MB, from {package}")


if __name__ == "__main__":
    main()
