"""Text for the demo model: the Python standard library's own sources, which every machine has, under the PSF licence.

`python -m tools.demo.corpus FILE.json.gz` packs them into one file, for a training machine whose
Python ships without them.
"""

import argparse
import gzip
import hashlib
import json
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Not library text: installed packages, code-page tables, and files that record the machine Python was built on.
LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload"})
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
HELD_OUT_PER_MILLE = 50


@dataclass(frozen=True)
class Corpus:
    """Texts by path relative to the library's folder, in sorted order, and the Python they belong to."""

    texts: dict[str, str]
    python: str

    def first(self, num_files: int | None) -> "Corpus":
        """Only the first files, so that a test need not read tens of megabytes."""
        return Corpus(dict(list(self.texts.items())[:num_files]), self.python)

    def split(self) -> tuple[dict[str, str], dict[str, str]]:
        """(train, held-out), by file: a file is wholly in one of them."""
        train = {path: text for path, text in self.texts.items() if not is_held_out(path)}
        return train, {path: text for path, text in self.texts.items() if path not in train}

    def facts(self) -> dict[str, str | int]:
        """What identifies this corpus; the digest covers paths and texts in order."""
        digest = hashlib.sha256()
        num_bytes = 0
        for path, text in self.texts.items():
            raw = text.encode()
            digest.update(f"{path}\0{len(raw)}\0".encode() + raw)
            num_bytes += len(raw)
        train, held_out = self.split()
        return {
            "source": "Python standard library, *.py",
            "python": self.python,
            "num_files": len(self.texts),
            "num_bytes": num_bytes,
            "num_train_files": len(train),
            "num_held_out_files": len(held_out),
            "sha256": digest.hexdigest(),
        }


def is_held_out(path: str) -> bool:
    """Whether the file at this relative POSIX path is never trained on.

    The hash of the path decides, so the answer is the same on every machine and, for files that keep their name, in
    every Python version: a test can take held-out text from the Python it runs on.
    """
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def collect(stdlib: Path | None = None) -> Corpus:
    """Read every source file below `stdlib` (default: this Python's), without exact duplicates.

    Sorted, so that the same library gives the same corpus on every file system. Files that are not UTF-8 or hold
    no text are skipped: the library's tests carry some that are broken on purpose.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        text = _read(root, path)
        if text and text not in seen:
            seen.add(text)
            texts[path] = text
    if not texts:
        raise ValueError(f"no sources below {root}; pack another machine's: python -m tools.demo.corpus FILE.json.gz")
    return Corpus(texts, platform.python_version())


def pack(corpus: Corpus, target: Path) -> None:
    """Write `corpus` to one gzip-compressed JSON file."""
    with gzip.open(target, "wt", encoding="utf-8") as file:
        json.dump({"python": corpus.python, "texts": corpus.texts}, file)


def unpack(source: Path) -> Corpus:
    """Read what `pack` wrote."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        packed = json.load(file)
    return Corpus(packed["texts"], packed["python"])


def _read(root: Path, path: str) -> str:
    parts = path.split("/")
    if LEFT_OUT_FOLDERS.intersection(parts) or any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
        return ""
    try:
        text = (root / path).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return text if text.strip() else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.corpus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.json.gz", help="is written")
    pack(collect(), parser.parse_args(arguments).file)


if __name__ == "__main__":
    main()
