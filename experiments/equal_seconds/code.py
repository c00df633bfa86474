"""Python's own library as text to learn: functions as sequences of tokens, split by whole packages.

A *package* is a folder or a file at the top of the library, tests and what only draws or translates left out. Names
decide its part, by a checksum, so the split hardly depends on the version of Python: half of the packages are for
pre-training, of the others three fifths for fine-tuning, a fifth each for validation and for the test. The vocabulary
is the pre-training half's most frequent tokens; all others share one number.

Sequences of 16 to 256 tokens; what is longer is cut. They are padded to the next power of two.
"""

import functools
import sysconfig
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from benchmarks.lengths import VOCABULARY, functions_of

__all__ = ["LENGTHS", "LONGEST", "Chunk", "Text", "chunks", "packages", "packed", "part_of", "texts"]

LENGTHS = (16, 32, 64, 128, 256)
"""What sequences are padded to."""
LONGEST = LENGTHS[-1]
PARTS = ("pretrain", "train", "valid", "test")
MOST = 150
"""Sequences of a package at most, so that none is the whole."""
LEFT_OUT = ("test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "tkinter", "distutils", "turtle.py")


class Text(NamedTuple):
    """Sequences of a part, and the number of tokens of each."""

    tokens: tuple[np.ndarray, ...]
    """Each [length], numbers from 1 on; 0 is padding, and what a model sees before the first."""
    lengths: np.ndarray

    @property
    def costs(self) -> np.ndarray:
        """Tokens that are computed for each sequence [n]."""
        return np.asarray(LENGTHS, np.float32)[np.searchsorted(LENGTHS, self.lengths)]


class Chunk(NamedTuple):
    """Sequences of one padded length that one program computes.

    Of each token [rows, length] its number, the number of its sequence in the row, from 1 on, and its place in it; all
    are 0 on padding. ``members`` are the positions in the batch of the sequences that have a row of their own.
    """

    tokens: np.ndarray
    segments: np.ndarray
    places: np.ndarray
    members: np.ndarray


def packages(root: Path | None = None) -> dict[str, list[Path]]:
    """The files of each package, by name.

    Args:
        root: of the library; by default of the Python that runs.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = {}
    for place in sorted(root.iterdir()):
        if place.name in LEFT_OUT or place.name.startswith(("_", "site-packages", "dist-packages")):
            continue
        if place.suffix == ".py":
            found[place.name] = [place]
        elif (place / "__init__.py").is_file():
            found[place.name] = [f for f in sorted(place.rglob("*.py")) if "test" not in f.parent.name]
    return found


def part_of(package: str) -> str:
    """The part that a package belongs to, by the checksum of its name."""
    place = zlib.crc32(package.encode()) % 10
    return PARTS[0] if place < 5 else PARTS[1] if place < 8 else PARTS[2] if place == 8 else PARTS[3]


@functools.cache
def texts(most: int = MOST) -> dict[str, Text]:
    """All parts.

    Args:
        most: sequences of a package, taken at random by a fixed seed.
    """
    words: dict[str, list[list[str]]] = {part: [] for part in PARTS}
    for name, files in packages().items():
        cut = [piece for file in files for tokens in functions_of(file) for piece in _cut(tokens)]
        kept = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(cut))[:most]
        words[part_of(name)] += [cut[i] for i in kept]
    common = Counter(word for words in words[PARTS[0]] for word in words).most_common(VOCABULARY - 2)
    numbers = {word: at + 2 for at, (word, _) in enumerate(common)}
    return {part: _text(sequences, numbers) for part, sequences in words.items()}


def _cut(tokens: list[str]) -> list[list[str]]:
    pieces = [tokens[at : at + LONGEST] for at in range(0, len(tokens), LONGEST)]
    return [piece for piece in pieces if len(piece) >= LENGTHS[0]]


def _text(sequences: list[list[str]], numbers: dict[str, int]) -> Text:
    order = np.random.default_rng(0).permutation(len(sequences))  # so that the first of them are of all packages
    made = tuple(np.array([numbers.get(word, 1) for word in sequences[i]], np.int32) for i in order)
    return Text(made, np.array([len(tokens) for tokens in made], np.int64))


def chunks(text: Text, indices: np.ndarray, size: int) -> list[Chunk]:
    """A batch in chunks of ``size`` tokens, each of sequences that are padded to one length.

    What does not fill half of a chunk joins the next longer sequences, if there are any: computed so, it costs less.

    Args:
        text: the part.
        indices: of the batch's sequences [m].
        size: of a chunk, at least `LONGEST`.
    """
    where, found = np.searchsorted(LENGTHS, text.lengths[indices]), []
    waiting = np.zeros(0, np.int64)
    for place, length in enumerate(LENGTHS):
        rows = size // length
        waiting = np.concatenate([waiting, np.flatnonzero(where == place)])
        is_last = place == where.max()
        while len(waiting) and (is_last or 2 * len(waiting) > rows):
            members, waiting = waiting[:rows], waiting[rows:]
            found.append(_padded([[text.tokens[i]] for i in indices[members]], members, rows, length))
    return found


def packed(text: Text, order: np.ndarray, rows: int) -> list[Chunk]:
    """An epoch in rows of `LONGEST` tokens that several sequences share, first fit; so many rows a chunk.

    Args:
        text: the part.
        order: in which sequences are packed [n].
        rows: of a chunk. The rows that do not fill a last one are left out, but for an epoch that has fewer.
    """
    packs: list[list[np.ndarray]] = []
    room: list[int] = []
    first = 0
    for n in order:
        length = text.lengths[n]
        at = next((i for i in range(first, len(room)) if room[i] >= length), len(room))
        if at == len(room):
            packs.append([])
            room.append(LONGEST)
        packs[at].append(text.tokens[n])
        room[at] -= length
        while first < len(room) and room[first] < LENGTHS[0]:
            first += 1
    whole = max(1, len(packs) // rows)
    nobody = np.zeros(0, np.int64)
    return [_padded(packs[rows * at : rows * (at + 1)], nobody, rows, LONGEST) for at in range(whole)]


def _padded(packs: list[list[np.ndarray]], members: np.ndarray, rows: int, length: int) -> Chunk:
    tokens, segments, places = np.zeros((3, rows, length), np.int32)
    for row, pack in enumerate(packs):
        at = 0
        for number, sequence in enumerate(pack, start=1):
            stop = at + len(sequence)
            tokens[row, at:stop], segments[row, at:stop] = sequence, number
            places[row, at:stop] = np.arange(len(sequence))
            at = stop
    return Chunk(tokens, segments, places, members)
