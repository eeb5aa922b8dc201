"""Near-duplicate detection: 13-gram Jaccard similarity, estimated by MinHash."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MISSED = 0.001  # accepted share of near duplicates at the threshold that do not become candidates
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, with irregular bits, so that products spread over all 64 bits
GRAMS_PER_BATCH = 2048  # times 128 permutations of 4 bytes fits into a processor's cache
CANDIDATES_AT_ONCE = 1024


class NearDuplicates:
    """Finds texts whose 13-gram Jaccard similarity to one of the added texts reaches a threshold.

    The similarity is MinHash's estimate over 128 permutations (standard error .035 at .8). Only words in lower
    case are compared, as in section 2.6 of Borgeaud et al. An added text of 700 words takes 1.3 kB of memory, and
    1.7 kB for a moment at the first query.
    """

    NUM_PERMUTATIONS = 128
    GRAM = 13

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash

        self.threshold = threshold
        self._empty = MinHash(self.NUM_PERMUTATIONS, hashfunc=int, scheme="affine32")
        self._rows = _rows_per_band(threshold, self.NUM_PERMUTATIONS)
        self._signatures, self._samples = bytearray(), bytearray()
        self._index: _Index | None = None  # an index over the two, built at the first query

    def add(self, text: str) -> None:
        """Add a text to compare with."""
        grams = word_grams(text, self.GRAM)
        if len(grams):  # a text without words is similar to none
            self._index = None  # first: a bytearray cannot grow while numpy views it
            self._signatures += self._signature(grams).tobytes()
            self._samples += _sample(grams).tobytes()

    def repeated_by(self, text: str) -> bool:
        """Return whether the similarity of `text` to one of the added texts is at least the threshold."""
        if self._index is None:
            self._samples = bytearray(np.unique(np.frombuffer(self._samples, np.uint64)))
            self._index = _Index.of(self._signatures, self._samples, self._rows)
        grams = _grams(text, self.GRAM)
        sample = np.unique(_sample(grams))
        if not len(grams) or _count_common(sample, self._index.samples) < self._fewest_shared(len(sample)):
            return False  # true of most texts, and far cheaper than a signature
        signature = self._signature(np.unique(grams))
        # One candidate is enough. All of them can be most of the added texts, if these follow one template.
        similarities = ((some == signature).mean(axis=1) for some in self._index.candidates(signature))
        return any((some >= self.threshold).any() for some in similarities)

    def _fewest_shared(self, num: int) -> float:
        """Return a lower bound of how many of `num` sampled grams a near duplicate shares with the added texts.

        A near duplicate shares at least `threshold` of all its grams. The probability that a sample of them falls
        below this bound is less than MISSED (Hoeffding's inequality).
        """
        return self.threshold * num - math.sqrt(-math.log(MISSED) / 2 * num)

    def _signature(self, grams: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        signature, halves = (
            self._empty.copy(),
            grams >> np.uint64(32),
        )  # affine32 takes 32 bits; the upper ones are better mixed
        for start in range(0, len(grams), GRAMS_PER_BATCH):
            signature.update_batch(halves[start : start + GRAMS_PER_BATCH].tolist())
        found: npt.NDArray[np.uint32] = signature.hashvalues
        return found


class _Index(NamedTuple):
    """Index of the added texts, for locality-sensitive hashing.

    `signatures` (n, permutations); `samples`, a sorted sample of all grams; for each band of `rows` permutations the
    signatures' sorted `keys` (bands, n), and `texts` (bands, n), the number of the text of each key.
    """

    signatures: npt.NDArray[np.uint32]
    samples: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.uint64]
    texts: npt.NDArray[np.int64]
    rows: int

    @classmethod
    def of(cls, signatures: bytearray, samples: bytearray, rows: int) -> "_Index":
        matrix = np.frombuffer(signatures, np.uint32).reshape(-1, NearDuplicates.NUM_PERMUTATIONS)
        keys = _band_keys(matrix, rows).T
        texts = np.argsort(keys, axis=1)
        sampled = np.frombuffer(samples, np.uint64)
        return cls(matrix, sampled, np.take_along_axis(keys, texts, axis=1), texts, rows)

    def candidates(self, signature: npt.NDArray[np.uint32]) -> Iterator[npt.NDArray[np.uint32]]:
        """Yield the signatures (n, permutations) of the texts that equal `signature` in at least one band.

        A text that equals it in several bands is yielded several times.
        """
        for key, keys, texts in zip(_band_keys(signature[None], self.rows)[0], self.keys, self.texts, strict=True):
            start, stop = np.searchsorted(keys, key), np.searchsorted(keys, key, side="right")
            for first in range(start, stop, CANDIDATES_AT_ONCE):
                yield self.signatures[texts[first : min(first + CANDIDATES_AT_ONCE, stop)]]


def _band_keys(signatures: npt.NDArray[np.uint32], rows: int) -> npt.NDArray[np.uint64]:
    """Hash every band of `rows` permutations of each signature: (n, bands). Ignores an incomplete last band."""
    num_bands = signatures.shape[1] // rows
    bands = signatures[:, : num_bands * rows].reshape(len(signatures), num_bands, rows)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(rows):
        keys = (keys + bands[:, :, row]) * MULTIPLIER
    return keys


def _sample(grams: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the grams whose hash is in a fixed sixteenth of all values: every text samples the same grams."""
    chosen: npt.NDArray[np.uint64] = grams[(grams >> np.uint64(32)) % np.uint64(16) == 0]
    return chosen


def _count_common(some: npt.NDArray[np.uint64], ordered: npt.NDArray[np.uint64]) -> int:
    """Return how many of `some` are in the sorted array `ordered`."""
    return int((np.searchsorted(ordered, some, side="right") > np.searchsorted(ordered, some)).sum())


def _rows_per_band(threshold: float, num_permutations: int) -> int:
    """Return the largest number of rows per band that misses at most MISSED of the texts at the threshold.

    More rows give fewer candidates.
    """
    missed = {rows: (1 - threshold**rows) ** (num_permutations // rows) for rows in range(1, num_permutations // 2 + 1)}
    return max((rows for rows, share in missed.items() if share <= MISSED), default=1)


# Chinese characters and kana are written without spaces, so each counts as a word.
_WORDS = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|[^\W\u2e80-\u9fff\uf900-\ufaff]+")
_ASCII_WORDS = bytes(ord(char.lower()) if char.isalnum() or char == "_" else 32 for char in map(chr, range(128)))


def _pad_words(text: str) -> bytes:
    """Return the words in lower case, with spaces between them and eight spaces at both ends."""
    if text.isascii():  # a fast path that finds the same words
        words = text.encode().translate(_ASCII_WORDS.ljust(256))
    else:
        words = b" ".join(word.encode() for word in _WORDS.findall(text.lower()))
    return words.join([b" " * 8] * 2)


def _word_hashes(text: str) -> npt.NDArray[np.uint64]:
    """Hash each word's length and first and last eight bytes; vectorized, without a Python object per word."""
    padded = _pad_words(text)
    in_word = np.frombuffer(padded, np.uint8) != ord(" ")
    edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    # eights[i] holds the eight bytes from byte i on
    eights: npt.NDArray[np.uint64] = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))
    others = np.uint64(8) * (8 - np.minimum(ends - starts, 8)).astype(np.uint64)  # bits that belong to other words
    first, last = eights[starts] << others, eights[ends - 8] >> others
    hashes: npt.NDArray[np.uint64] = (first * MULTIPLIER + last) * MULTIPLIER + (ends - starts).astype(np.uint64)
    return hashes ^ hashes >> np.uint64(32)


def word_grams(text: str, size: int) -> npt.NDArray[np.uint64]:
    """Return sorted 64-bit hashes of the distinct n-grams of `size` words; a shorter text is one n-gram."""
    return np.unique(_grams(text, size))


def _grams(text: str, size: int) -> npt.NDArray[np.uint64]:
    hashes = _word_hashes(text)
    if not len(hashes):
        return hashes
    size = min(size, len(hashes))
    grams = np.zeros(len(hashes) - size + 1, np.uint64)
    for position in range(size):
        # Add before multiplying, so that the last word affects the upper bits too.
        grams = (grams + hashes[position : position + len(grams)]) * MULTIPLIER
    return grams
