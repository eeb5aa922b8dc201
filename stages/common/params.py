"""Parse params.yaml into frozen dataclasses.

A stage names the keys and sections that it reads:

    params = read_params("chunk_size", "corpus", "chunk")
    params.corpus.valid

and gets nothing else; "retrofit.base" is one key of a section. dvc.yaml declares the same names;
tests/contract/test_contract.py checks that they agree.
Every stage checks the whole file first, so that a mistake stops the first stage that runs, not one that needs the
key hours later.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError

PARAMS_FILE = Path("params.yaml")

# The dataclass of each section. Names, not imports, so that these modules are not dependencies of every stage: a
# module that only checks its section can stop a run but cannot change its output.
SECTIONS = {
    "sample": "retro_model.sample:SampleConfig",
    "corpus": "retro_model.corpus.documents:CorpusConfig",
    "tokenizer": "retro_model.corpus.tokenizer_training:TokenizerConfig",
    "embed": "retro_model.embedding.config:EmbedConfig",
    "index": "retro_model.search.keys:IndexConfig",
    "neighbors": "retro_model.search.neighbors:NeighborsConfig",
    "model": "retro_model.network.config:ModelConfig",
    "train": "retro_model.training.config:TrainConfig",
    "retrofit": "retro_model.training.config:RetrofitConfig",
    "evaluate": "retro_model.evaluation.config:EvaluateConfig",
    "runtime": "stages.common.runtime:RuntimeConfig",
}


@dataclass(frozen=True)
class FlatConfig(Config):
    """The top-level keys of params.yaml, which several components share."""

    documents: str = setting()
    chunk_size: int = setting(minimum=2)
    seq_len: int = setting(minimum=2)
    knn: int = setting(minimum=1)
    seed: int = setting(minimum=0, below=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.documents:
            raise ConfigError("documents: found an empty path, expected a folder or a file of documents")
        if self.seq_len % self.chunk_size:
            raise ConfigError(f"seq_len: found {self.seq_len}, expected a multiple of chunk_size {self.chunk_size}")


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The file's content, with the types that DVC reads (YAML 1.2: `3e-4` is a number, `on` is text).

    Raises ConfigError if the file is missing, is not valid YAML, or holds no mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found in {Path.cwd()}; run from the folder that holds dvc.yaml")
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        raise ConfigError(f"{path}: a key stands twice (line {line}): {error.problem}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: found {type(content).__name__}, expected keys and values")
    return content


def parse_params(content: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of params.yaml by name: top-level values as they are, sections as their dataclasses.

    Raises ConfigError for an unknown, missing or invalid key.
    """
    flat_names = [item.name for item in fields(FlatConfig)]
    for name in content:
        if name not in flat_names and name not in SECTIONS:
            raise ConfigError(f"{name}: unknown key; {PARAMS_FILE} has {', '.join([*flat_names, *SECTIONS])}")
    for name in SECTIONS:
        if name not in content:
            raise ConfigError(f"{name}: missing section; {PARAMS_FILE} needs {', '.join([*flat_names, *SECTIONS])}")
    flat = FlatConfig.parse({name: value for name, value in content.items() if name not in SECTIONS})
    params: dict[str, Any] = {name: getattr(flat, name) for name in flat_names}
    for name, place in SECTIONS.items():
        module, _, class_name = place.partition(":")
        params[name] = getattr(importlib.import_module(module), class_name).parse(content[name])
    for check in CROSS_SECTION_CHECKS:
        check(SimpleNamespace(**params))
    return params


def read_params(*names: str) -> SimpleNamespace:
    """The named keys and sections of params.yaml; for a dotted name, that key of a section. Checks the whole file."""
    params = parse_params(read_yaml(PARAMS_FILE))
    read: dict[str, Any] = {}
    for name in names:
        section, _, key = name.partition(".")
        read[section] = SimpleNamespace(**{key: getattr(params[section], key)}) if key else params[section]
    return SimpleNamespace(**read)


def flat_params() -> dict[str, Any]:
    """All params by their dotted keys, for recording with a run; stages do not compute with these."""
    flat: dict[str, Any] = {}
    for name, value in read_yaml(PARAMS_FILE).items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _check_stored_neighbors(params: SimpleNamespace) -> None:
    stored = params.neighbors.stored
    if params.knn > stored:
        raise ConfigError(f"knn: found {params.knn}, expected at most neighbors.stored = {stored}")
    if max(params.evaluate.sweep_knn, default=0) > stored:
        raise ConfigError(
            f"evaluate.sweep_knn: found {max(params.evaluate.sweep_knn)}, expected at most neighbors.stored = {stored}"
        )


# Checks that involve several sections.
CROSS_SECTION_CHECKS: tuple[Callable[[SimpleNamespace], None], ...] = (_check_stored_neighbors,)
