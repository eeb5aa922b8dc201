"""Texts that nearly repeat others: 13-gram Jaccard similarity, estimated by MinHash."""

import math
import re
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

MISSED = 0.001  # share of near duplicates at the threshold that never become candidates
GRAMS_PER_BATCH = 2048  # times 128 permutations of 4 bytes: what a processor's cache holds


class NearDuplicates:
    """Finds texts whose 13-gram Jaccard similarity to one of the added texts reaches a threshold.

    The similarity is MinHash's estimate over 128 permutations (standard error .035 at .8); texts are
    compared in lower case and by words only ([P] section 2.6 of Borgeaud et al. filters so).
    """

    NUM_PERMUTATIONS = 128
    GRAM = 13

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._empty = MinHash(self.NUM_PERMUTATIONS, hashfunc=int, scheme="affine32")
        self._signatures: dict[int, MinHash] = {}
        rows = _rows_per_band(threshold, self.NUM_PERMUTATIONS)
        self._candidates = MinHashLSH(num_perm=self.NUM_PERMUTATIONS, params=(self.NUM_PERMUTATIONS // rows, rows))
        self._sampled: set[int] = set()
        # A text at the threshold has at least that share of its grams in the other one.
        self._enough = math.log(MISSED) / math.log(1 - threshold) if threshold < 1 else 1

    def add(self, number: int, text: str) -> None:
        """Remembers a text's signature under `number`."""
        grams = word_grams(text, self.GRAM)
        if len(grams):  # a text without words resembles nothing
            self._signatures[number] = self._signature(grams)
            self._candidates.insert(number, self._signatures[number])
            self._sampled.update(_sample(grams))

    def repeated_by(self, text: str) -> bool:
        """Whether `text` is at least as similar to one of the added texts as the threshold."""
        grams = _grams(text, self.GRAM)
        sample = _sample(grams)
        if not len(grams) or (len(sample) >= self._enough and self._sampled.isdisjoint(sample)):
            return False  # most texts end here, at a fraction of a signature's cost
        signature = self._signature(np.unique(grams))
        candidates = self._candidates.query(signature)
        return any(signature.jaccard(self._signatures[number]) >= self.threshold for number in candidates)

    def _signature(self, grams: npt.NDArray[np.uint32]) -> Any:
        signature = self._empty.copy()
        for start in range(0, len(grams), GRAMS_PER_BATCH):
            signature.update_batch(grams[start : start + GRAMS_PER_BATCH].tolist())
        return signature


def _sample(grams: npt.NDArray[np.uint32]) -> set[int]:
    """The same sixteenth of all grams in every text."""
    return set(grams[grams % 16 == 0].tolist())


def _rows_per_band(threshold: float, num_permutations: int) -> int:
    """The most rows a band, and so the fewest candidates, that still do not miss a text at the threshold."""
    missed = {rows: (1 - threshold**rows) ** (num_permutations // rows) for rows in range(1, num_permutations // 2 + 1)}
    return max((rows for rows, share in missed.items() if share <= MISSED), default=1)


# Chinese characters and kana stand without spaces: each counts as a word.
_WORDS = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|[^\W\u2e80-\u9fff\uf900-\ufaff]+")
_ASCII_WORDS = bytes(ord(char.lower()) if char.isalnum() or char == "_" else 32 for char in map(chr, range(128)))


def _words(text: str) -> list[bytes]:
    if text.isascii():  # the same words, found in a third of the time
        return text.encode().translate(_ASCII_WORDS.ljust(256)).split()
    return [word.encode() for word in _WORDS.findall(text.lower())]


def word_grams(text: str, size: int) -> npt.NDArray[np.uint32]:
    """Sorted 32-bit hashes of the distinct runs of `size` words; a shorter text is one run."""
    return np.unique(_grams(text, size))


def _grams(text: str, size: int) -> npt.NDArray[np.uint32]:
    words = _words(text)
    if not words:
        return np.empty(0, np.uint32)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    size = min(size, len(words))
    grams = np.zeros(len(words) - size + 1, np.uint64)
    for place in range(size):
        # Added before it is multiplied, so that the last word too reaches the upper half.
        grams = (grams + hashes[place : place + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
    return (grams >> np.uint64(32)).astype(np.uint32)
