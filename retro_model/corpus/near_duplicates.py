"""Texts that nearly repeat others: 13-gram Jaccard similarity, estimated by MinHash."""

import math
import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MISSED = 0.001  # share of near duplicates at the threshold that never become candidates
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, without a pattern: it spreads what is added over 64 bits
GRAMS_PER_BATCH = 2048  # times 128 permutations of 4 bytes: what a processor's cache holds


class NearDuplicates:
    """Finds texts whose 13-gram Jaccard similarity to one of the added texts reaches a threshold.

    The similarity is MinHash's estimate over 128 permutations (standard error .035 at .8); texts are
    compared in lower case and by words only ([P] section 2.6 of Borgeaud et al. filters so). An added text
    of 700 words takes 1.3 kB of memory, 1.7 kB for a moment when the first question is asked.
    """

    NUM_PERMUTATIONS = 128
    GRAM = 13

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash

        self.threshold = threshold
        self._empty = MinHash(self.NUM_PERMUTATIONS, hashfunc=int, scheme="affine32")
        self._rows = _rows_per_band(threshold, self.NUM_PERMUTATIONS)
        self._signatures, self._samples = bytearray(), bytearray()
        self._added: _Added | None = None  # what these hold, in order, from the first question on

    def add(self, text: str) -> None:
        """Remembers a text's signature."""
        grams = word_grams(text, self.GRAM)
        if len(grams):  # a text without words resembles nothing
            self._added = None  # first: bytes that are looked at cannot grow
            self._signatures += self._signature(grams).tobytes()
            self._samples += _sample(grams).tobytes()

    def repeated_by(self, text: str) -> bool:
        """Whether `text` is at least as similar to one of the added texts as the threshold."""
        if self._added is None:
            self._samples = bytearray(np.unique(np.frombuffer(self._samples, np.uint64)))
            self._added = _Added.of(self._signatures, self._samples, self._rows)
        grams = _grams(text, self.GRAM)
        sample = np.unique(_sample(grams))
        if not len(grams) or _num_in(sample, self._added.samples) < self._fewest_shared(len(sample)):
            return False  # most texts end here, at a fraction of a signature's cost
        signature = self._signature(np.unique(grams))
        alike = (self._added.candidates(signature) == signature).mean(axis=1)
        return bool((alike >= self.threshold).any())

    def _fewest_shared(self, num: int) -> float:
        """How many of a sample of `num` grams a text at the threshold shares with the other one, at the fewest.

        Of all its grams it shares that part or more; that a sample has fewer than this is rarer than MISSED
        (Hoeffding's inequality).
        """
        return self.threshold * num - math.sqrt(-math.log(MISSED) / 2 * num)

    def _signature(self, grams: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        signature, halves = self._empty.copy(), grams >> np.uint64(32)  # the better half, which affine32 takes
        for start in range(0, len(grams), GRAMS_PER_BATCH):
            signature.update_batch(halves[start : start + GRAMS_PER_BATCH].tolist())
        found: npt.NDArray[np.uint32] = signature.hashvalues
        return found


class _Added(NamedTuple):
    """All added texts: their signatures (n, permutations), a sample of all their grams in order, and for each band
    of `rows` permutations the signatures' keys (bands, n) in order, with the number of each one's text."""

    signatures: npt.NDArray[np.uint32]
    samples: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.uint64]
    texts: npt.NDArray[np.int64]
    rows: int

    @classmethod
    def of(cls, signatures: bytearray, samples: bytearray, rows: int) -> "_Added":
        matrix = np.frombuffer(signatures, np.uint32).reshape(-1, NearDuplicates.NUM_PERMUTATIONS)
        keys = _band_keys(matrix, rows).T
        texts = np.argsort(keys, axis=1)
        sampled = np.frombuffer(samples, np.uint64)
        return cls(matrix, sampled, np.take_along_axis(keys, texts, axis=1), texts, rows)

    def candidates(self, signature: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """The signatures (n, permutations) of the texts that share a band with this one."""
        found = [np.empty(0, np.int64)]
        for key, keys, texts in zip(_band_keys(signature[None], self.rows)[0], self.keys, self.texts, strict=True):
            start, stop = np.searchsorted(keys, key), np.searchsorted(keys, key, side="right")
            found.append(texts[start:stop])
        return self.signatures[np.unique(np.concatenate(found))]


def _band_keys(signatures: npt.NDArray[np.uint32], rows: int) -> npt.NDArray[np.uint64]:
    """A number (n, bands) for every `rows` permutations of a signature; the last few may be left over."""
    num_bands = signatures.shape[1] // rows
    bands = signatures[:, : num_bands * rows].reshape(len(signatures), num_bands, rows)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(rows):
        keys = (keys + bands[:, :, row]) * MULTIPLIER
    return keys


def _sample(grams: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The same sixteenth of all grams in every text."""
    chosen: npt.NDArray[np.uint64] = grams[(grams >> np.uint64(32)) % np.uint64(16) == 0]
    return chosen


def _num_in(some: npt.NDArray[np.uint64], ordered: npt.NDArray[np.uint64]) -> int:
    """How many of them the ordered ones have."""
    return int((np.searchsorted(ordered, some, side="right") > np.searchsorted(ordered, some)).sum())


def _rows_per_band(threshold: float, num_permutations: int) -> int:
    """The most rows a band, and so the fewest candidates, that still do not miss a text at the threshold."""
    missed = {rows: (1 - threshold**rows) ** (num_permutations // rows) for rows in range(1, num_permutations // 2 + 1)}
    return max((rows for rows, share in missed.items() if share <= MISSED), default=1)


# Chinese characters and kana stand without spaces: each counts as a word.
_WORDS = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|[^\W\u2e80-\u9fff\uf900-\ufaff]+")
_ASCII_WORDS = bytes(ord(char.lower()) if char.isalnum() or char == "_" else 32 for char in map(chr, range(128)))


def _spaced(text: str) -> bytes:
    """The words in lower case, with spaces between them and at both ends eight."""
    if text.isascii():  # the same words, found in a fraction of the time
        words = text.encode().translate(_ASCII_WORDS.ljust(256))
    else:
        words = b" ".join(word.encode() for word in _WORDS.findall(text.lower()))
    return words.join([b" " * 8] * 2)


def _word_hashes(text: str) -> npt.NDArray[np.uint64]:
    """A number for each word, from its length and its first and last eight bytes: no word is an object of Python."""
    spaced = _spaced(text)
    in_word = np.frombuffer(spaced, np.uint8) != ord(" ")
    edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    # at every byte, the eight from it on
    eights: npt.NDArray[np.uint64] = np.ndarray(len(spaced) - 7, "<u8", spaced, strides=(1,))
    others = np.uint64(8) * (8 - np.minimum(ends - starts, 8)).astype(np.uint64)  # bits of other words in either
    first, last = eights[starts] << others, eights[ends - 8] >> others
    hashes: npt.NDArray[np.uint64] = (first * MULTIPLIER + last) * MULTIPLIER + (ends - starts).astype(np.uint64)
    return hashes ^ hashes >> np.uint64(32)


def word_grams(text: str, size: int) -> npt.NDArray[np.uint64]:
    """Sorted 64-bit hashes of the distinct runs of `size` words; a shorter text is one run."""
    return np.unique(_grams(text, size))


def _grams(text: str, size: int) -> npt.NDArray[np.uint64]:
    hashes = _word_hashes(text)
    if not len(hashes):
        return hashes
    size = min(size, len(hashes))
    grams = np.zeros(len(hashes) - size + 1, np.uint64)
    for place in range(size):
        # Added before it is multiplied, so that the last word too reaches the upper half.
        grams = (grams + hashes[place : place + len(grams)]) * MULTIPLIER
    return grams
