"""Index keys (faiss factory strings): how `auto` chooses one, and how much memory each needs.

There are three kinds. Flat compares a query with all rows. IVF<lists>,Flat compares it with the rows of the lists
with the nearest centroids. IVF<lists>,PQ<m> compares it with product-quantized codes of those rows, m numbers each;
these distances only select candidates, which are then scored again from the stored vectors.
"""

import importlib.util
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError

# Up to this many rows, exact search is cheap: 2,000 queries of 384 dimensions over 100,000 rows take about
# 3 seconds on two cores.
EXACT_ROWS = 200_000
MIN_POINTS_PER_LIST = 39  # below this, faiss warns that the clustering is unreliable
MAX_POINTS_PER_LIST = 100  # autofaiss uses no more for training
CODED_DIMS = (2, 4, 8, 16)  # dimensions per 4-bit code, finest first

_KEY = re.compile(r"Flat|IVF([1-9][0-9]*),(?:Flat|PQ([1-9][0-9]*)(x8|x4fs)?)")
_KEYS = "Flat, IVF<lists>,Flat, IVF<lists>,PQ<m>x4fs or IVF<lists>,PQ<m>x8"


@dataclass(frozen=True)
class IndexConfig(Config, section="index"):
    """The kind of index, its recall and its memory limit.

    key: a faiss factory string: Flat, IVF<lists>,Flat, or with codes IVF<lists>,PQ<m>x4fs (m numbers of 4 bits
        per row) or IVF<lists>,PQ<m>x8 (m bytes per row); auto chooses one (see `choose_key`), the same one for
        every builder.
    builder: what trains the index: faiss alone, or autofaiss, which must be installed. Both give the same bytes.
    target_recall: recall of the 10 nearest rows for held-out queries.
    train_points_per_list: the training sample has this many rows per list.
    max_memory_gb: limit for the finished index, in 10^9 bytes. Peak memory while building is twice that, because
        lists over-allocate as they grow; with codes, up to three times the training sample in float32 plus
        blocks of vectors.
    seed: of the training sample and of the queries for recall.
    """

    key: str = setting("auto")
    builder: str = setting("faiss", choices=("autofaiss", "faiss"))
    target_recall: float = setting(0.95, above=0.0, maximum=1.0)
    train_points_per_list: int = setting(64, minimum=MIN_POINTS_PER_LIST, maximum=MAX_POINTS_PER_LIST)
    max_memory_gb: float = setting(4.0, above=0.0)
    seed: int = setting(0, minimum=0, below=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key != "auto" and not _KEY.fullmatch(self.key):
            raise ConfigError(f"index.key: found {self.key!r}, expected auto, {_KEYS} (IVF4096,Flat)")
        if self.builder == "autofaiss" and importlib.util.find_spec("autofaiss") is None:
            raise ConfigError(
                "index.builder: found autofaiss, which is not installed; set faiss, which builds the same index, or "
                "install autofaiss: `make install` without LOCK=next, or `pip install -e '.[autofaiss]'`"
            )


def choose_key(config: IndexConfig, num_rows: int, dim: int) -> str:
    """The factory string for `num_rows` vectors of `dim` dimensions.

    auto is exact search up to EXACT_ROWS rows. Above that it is IVF with about 4 * sqrt(num_rows) lists (a power
    of two), so that a query is compared with about as many centroids as rows. The lists hold the rows
    themselves if that fits index.max_memory_gb, else 4-bit codes of 2, 4, 8 or 16 dimensions each: the finest
    that fit, or the coarsest if none does.

    Raises ConfigError if there are too few rows to train the lists or codes, or if the number of codes does not
    divide `dim`.
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
    """The code of a row: `numbers` numbers of `bits` bits each."""

    numbers: int
    bits: int

    @property
    def num_bytes(self) -> int:
        """Bytes per row, rounded up."""
        return (self.numbers * self.bits + 7) // 8


def code_of(key: str) -> Code | None:
    """The codes of a key; None if its index holds the rows themselves."""
    matched = _KEY.fullmatch(key)
    assert matched is not None, key
    return Code(int(matched[2]), 4 if matched[3] == "x4fs" else 8) if matched[2] else None


def needed_bytes(key: str, num_rows: int, dim: int) -> int:
    """An upper bound on the memory of an index in bytes: rows or codes, ids and centroids."""
    lists, code = num_lists(key), code_of(key)
    ids = 8 * num_rows if lists else 0
    if code is None:
        return 4 * dim * (num_rows + lists) + ids
    padded = num_rows + 31 * lists if code.bits == 4 else num_rows  # fast scan stores blocks of 32 codes
    return code.num_bytes * padded + ids + 4 * dim * lists + 4 * dim * (1 << code.bits)


def check_memory(config: IndexConfig, key: str, num_rows: int, dim: int) -> None:
    """Raises ConfigError if the finished index would need more than config.max_memory_gb."""
    needed = needed_bytes(key, num_rows, dim)
    if needed > config.max_memory_gb * 1e9:
        raise ConfigError(
            f"index.max_memory_gb: found {config.max_memory_gb:g}, expected >= {needed / 1e9:.3g} "
            f"for {key} over {num_rows:,} vectors of {dim} dimensions; building it takes twice that or more"
        )
