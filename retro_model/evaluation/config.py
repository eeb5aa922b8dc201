"""The settings of an evaluation: the section `evaluate` of params.yaml."""

from dataclasses import dataclass

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig(Config, section="evaluate"):
    """How much text to evaluate, what to compare with, and what to show.

    `max_chunks` limits the test split, and the valid split on which the weight of `mixed` is chosen. `compare` is
    the folder of another trained model, `database` a folder or file of documents to retrieve from instead of the
    train chunks. For both, an empty folder means none.
    """

    compare: str = setting("models/none")
    database: str = setting("data/none")
    sweep_knn: tuple[int, ...] = setting((0, 1, 2, 4, 8), minimum=0)
    max_chunks: int | None = setting(1000, minimum=1)  # null: all held-out chunks
    bootstrap_samples: int = setting(2000, minimum=1)
    passages: int = setting(12, minimum=0)
    number_type: str = setting("float32", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compare", "database"):
            if not getattr(self, name):
                raise ConfigError(
                    f"evaluate.{name}: found an empty path, expected a folder (an empty folder means none)"
                )
        if list(self.sweep_knn) != sorted(set(self.sweep_knn)):
            raise ConfigError(f"evaluate.sweep_knn: found {list(self.sweep_knn)}, expected rising numbers")
