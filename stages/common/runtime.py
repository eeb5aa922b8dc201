"""Settings for this machine. They affect speed, not results (except for rounding, where params.yaml says so), so
dvc.yaml does not track them: changing one runs nothing again."""

from dataclasses import dataclass
from pathlib import Path

from retro_model.core.config import setting
from retro_model.core.errors import ConfigError
from retro_model.jobs.engine import Engine, EngineConfig
from retro_model.jobs.parts import Parts


@dataclass(frozen=True)
class RuntimeConfig(EngineConfig, section="runtime"):
    """The device, the batch sizes, the engine (see EngineConfig), what MLflow records (stages/tracking/runs.py), and
    where finished parts are kept: `parts` is below the project's root, unless it is absolute.
    """

    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    embed_batch_size: int = setting(0, minimum=0)
    evaluate_batch_size: int = setting(8, minimum=1)
    tracking: str = setting("required", choices=("required", "best_effort", "off"))
    registered_model: str = setting("")
    system_metrics: bool = setting(False)
    parts: str = setting(".retro/parts")
    parts_gb: float = setting(50.0, minimum=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError("runtime.parts: found an empty path, expected a folder, such as .retro/parts")

    def make_engine(self) -> Engine:
        """The engine that runs the jobs of chunk, embed, index and knn."""
        return Engine(self, self.device)

    def kept_parts(self, root: Path) -> Parts:
        """Where the jobs of chunk, embed and knn keep their parts; `root` is the project's."""
        return Parts(root / self.parts, int(self.parts_gb * 1e9))
