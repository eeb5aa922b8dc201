"""Translate autofaiss arguments into an IndexConfig.

settings = index_settings({"max_index_memory_usage": "100m", "current_memory_available": "1G"})
settings.config.max_memory_gb                           # 0.1048576
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retro_model.core.errors import ConfigError
from retro_model.memmaps.files import check_counts
from retro_model.search.distances import import_faiss
from retro_model.search.keys import IndexConfig

logger = logging.getLogger(__name__)

_MEMORY = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgtp]?)b?", re.IGNORECASE)
_NPROBE = re.compile(r"nprobe=([1-9][0-9]*)")

# Arguments of autofaiss and other libraries that are accepted without effect, and why.
_WITHOUT_EFFECT = {
    "max_index_query_time_ms": "searches are tuned by recall (target_recall), not by a clock",
    "min_nearest_neighbors_to_retrieve": "num_nearest_neighbors and num_extra_neighbors set it",
    "make_direct_map": "the vectors themselves are returned",
    "should_be_memory_mappable": "every index here is",
    "max_rows_per_file": "the vectors are one file",
    "verbose": "progress is always shown",
}
_KNOWN = (
    "max_index_memory_usage",
    "current_memory_available",
    "index_key",
    "index_param",
    "metric_type",
    "use_gpu",
    "nb_cores",
    "builder",
    "target_recall",
    "train_points_per_list",
    "seed",
)


@dataclass(frozen=True)
class IndexSettings:
    """The settings of an index, and the arguments that they come from."""

    config: IndexConfig
    probes: int | None  # lists to visit; None: the fewest that reach the target recall
    threads: int | None
    given: str  # the caller's arguments, for error messages

    def facts(self) -> dict[str, Any]:
        """The settings that determine the index's bytes."""
        settings = {**vars(self.config), "probes": self.probes}
        del settings["builder"]  # all builders write the same bytes
        return settings


def index_settings(arguments: Mapping[str, Any]) -> IndexSettings:
    """The settings for these arguments; warns of each argument without effect.

    Raises ConfigError for unknown names (and lists the known ones) and for invalid values.
    """
    for name in arguments:
        if name in _WITHOUT_EFFECT:
            logger.warning(f"index: {name} changes nothing: {_WITHOUT_EFFECT[name]}")
        elif name not in _KNOWN:
            raise ConfigError(f"{name}: unknown argument; the index has {', '.join((*_KNOWN, *_WITHOUT_EFFECT))}")
    same_names = ("builder", "target_recall", "train_points_per_list", "seed")
    settings = {name: arguments[name] for name in same_names if name in arguments}
    limits = [bytes_of(name, arguments[name]) for name in _KNOWN[:2] if name in arguments]
    if limits:
        settings["max_memory_gb"] = min(limits) / 1e9
    if arguments.get("index_key") is not None:
        settings["key"] = arguments["index_key"]
    if arguments.get("metric_type", "l2") != "l2":
        raise ConfigError(f"metric_type: found {arguments['metric_type']!r}, expected l2, as in the paper")
    if arguments.get("use_gpu") and not import_faiss().get_num_gpus():
        raise ConfigError("use_gpu: found True, expected False: faiss sees no GPU here (see `make install GPU=1`)")
    threads = arguments.get("nb_cores")
    if threads is not None:
        check_counts(nb_cores=threads)
    given = ", ".join(f"{name}={arguments[name]!r}" for name in _KNOWN if name in arguments)
    return IndexSettings(IndexConfig(**settings), _probes(arguments.get("index_param")), threads, given)


def bytes_of(name: str, text: object) -> float:
    """The number of bytes in a text such as '100m' or '1.5GB', in powers of 1,024 as in autofaiss."""
    matched = _MEMORY.fullmatch(text.strip()) if isinstance(text, str) else None
    if matched is None:
        raise ConfigError(f"{name}: found {text!r}, expected an amount of memory, such as '100m' or '1.5G'")
    return float(matched[1]) * 1024.0 ** " kmgtp".index(matched[2].lower() or " ")


def _probes(index_param: object) -> int | None:
    if index_param is None:
        return None
    matched = _NPROBE.fullmatch(index_param) if isinstance(index_param, str) else None
    if matched is None:
        raise ConfigError(f"index_param: found {index_param!r}, expected nprobe=<lists visited> (nprobe=16)")
    return int(matched[1])
