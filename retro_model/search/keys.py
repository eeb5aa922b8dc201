"""What kind of index is built: faiss's factory strings, the rule of `auto`, and what each takes in memory.

Three kinds: Flat compares a query with all rows. IVF<lists>,Flat compares it with the rows of the lists
whose centroids are nearest. IVF<lists>,PQ<m> does so with codes of the rows, of m numbers each, and its
distances only choose candidates: those are scored again from the stored vectors.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError

# Up to this many rows, exact search is cheap: 2,000 queries of 384 dimensions over 100,000 rows take about
# 3 seconds on two cores.
EXACT_ROWS = 200_000
MIN_POINTS_PER_LIST = 39  # below, faiss calls a k-means clustering unreliable
MAX_POINTS_PER_LIST = 100  # autofaiss trains on no more
CODED_DIMS = (2, 4, 8, 16)  # how many numbers of a vector share one code of 4 bits, finest first

_KEY = re.compile(r"Flat|IVF([1-9][0-9]*),(?:Flat|PQ([1-9][0-9]*)(x8|x4fs)?)")
_KEYS = "Flat, IVF<lists>,Flat, IVF<lists>,PQ<m>x4fs or IVF<lists>,PQ<m>x8"


@dataclass(frozen=True)
class IndexConfig(Config, section="index"):
    """What is built and how good it must be.

    `key` is a faiss factory string: Flat, IVF<lists>,Flat, or with codes, IVF<lists>,PQ<m>x4fs (m numbers
    of 4 bits a row) or IVF<lists>,PQ<m>x8 (m bytes); auto chooses (see `choose_key`). `target_recall`
    holds for the 10 nearest of held-out queries. `seed` draws the training sample of
    `train_points_per_list` rows for each list, and the queries. `max_memory_gb` is what the finished
    index may take, in 10^9 bytes. Building it takes twice that at its height, as lists have room to grow;
    where codes make it small, up to three times the training sample in float32, and blocks of vectors.
    """

    key: str = setting("auto")
    target_recall: float = setting(0.95, above=0.0, maximum=1.0)
    train_points_per_list: int = setting(64, minimum=MIN_POINTS_PER_LIST, maximum=MAX_POINTS_PER_LIST)
    max_memory_gb: float = setting(4.0, above=0.0)
    seed: int = setting(0, minimum=0, below=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key != "auto" and not _KEY.fullmatch(self.key):
            raise ConfigError(f"index.key: found {self.key!r}, expected auto, {_KEYS} (IVF4096,Flat)")


def choose_key(config: IndexConfig, num_rows: int, dim: int) -> str:
    """The factory string for `num_rows` rows of `dim` numbers.

    auto is exact search up to EXACT_ROWS, and from there on IVF with the power of two nearest to
    4 * sqrt(num_rows) lists: so a query compares itself with about as many centroids as rows of the
    lists it visits. Those hold the rows themselves while that fits index.max_memory_gb, and else codes:
    4 bits for every 2 numbers of a row, or for every 4, 8 or 16, the finest that fits; the coarsest
    where none does.

    Raises ConfigError for more lists or codes than the rows can train, and for codes that do not divide
    the dimensions.
    """
    if config.key != "auto":
        _check_trainable(config, num_rows, dim)
        return config.key
    if num_rows <= EXACT_ROWS:
        return "Flat"
    lists = f"IVF{2 ** round(np.log2(4 * np.sqrt(num_rows)))}"
    widths = [width for width in CODED_DIMS if dim % width == 0] or [1]
    keys = [f"{lists},Flat", *(f"{lists},PQ{dim // width}x4fs" for width in widths)]
    return next((key for key in keys if needed_bytes(key, num_rows, dim) <= config.max_memory_gb * 1e9), keys[-1])


def _check_trainable(config: IndexConfig, num_rows: int, dim: int) -> None:
    key, lists = config.key, num_lists(config.key)
    if lists * MIN_POINTS_PER_LIST > num_rows:
        raise ConfigError(
            f"index.key: {key} needs {lists * MIN_POINTS_PER_LIST:,} train chunks "
            f"({MIN_POINTS_PER_LIST} a list), found {num_rows:,}; use Flat, or fewer lists"
        )
    if code := code_of(key):
        found, needed = min(lists * config.train_points_per_list, num_rows), MIN_POINTS_PER_LIST * 2**code.bits
        if found < needed:
            raise ConfigError(
                f"index.key: the codes of {key} train on {needed:,} chunks, found {found:,} "
                f"({config.train_points_per_list} a list of {num_rows:,}); use more lists, a higher "
                "index.train_points_per_list, or IVF<lists>,Flat"
            )
        if dim % code.numbers:
            raise ConfigError(
                f"index.key: {key} has {code.numbers} codes a row, expected a divisor of its {dim} numbers"
            )


def num_lists(key: str) -> int:
    """The number of lists of an IVF key; 0 for exact search."""
    matched = _KEY.fullmatch(key)
    assert matched is not None, key
    return int(matched[1] or 0)


class Code(NamedTuple):
    """What stands for a row: so many numbers of so many bits."""

    numbers: int
    bits: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a row's code."""
        return (self.numbers * self.bits + 7) // 8


def code_of(key: str) -> Code | None:
    """What a key's codes are; None where the index holds the rows themselves."""
    matched = _KEY.fullmatch(key)
    assert matched is not None, key
    return Code(int(matched[2]), 4 if matched[3] == "x4fs" else 8) if matched[2] else None


def needed_bytes(key: str, num_rows: int, dim: int) -> int:
    """What an index takes in memory, at the most: rows or codes, ids, centroids."""
    lists, code = num_lists(key), code_of(key)
    ids = 8 * num_rows if lists else 0
    if code is None:
        return 4 * dim * (num_rows + lists) + ids
    padded = num_rows + 31 * lists if code.bits == 4 else num_rows  # fast scan compares 32 codes at once
    return code.num_bytes * padded + ids + 4 * dim * lists + 4 * dim * (1 << code.bits)


def check_memory(config: IndexConfig, key: str, num_rows: int, dim: int) -> None:
    """Raises ConfigError, with both numbers, where the finished index would take more than is allowed."""
    needed = needed_bytes(key, num_rows, dim)
    if needed > config.max_memory_gb * 1e9:
        raise ConfigError(
            f"index.max_memory_gb: found {config.max_memory_gb:g}, expected >= {needed / 1e9:.3g} "
            f"for {key} over {num_rows:,} vectors of {dim} dimensions; building it takes twice that or more"
        )
