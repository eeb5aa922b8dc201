"""Settings for this machine. They affect speed, not results (except for rounding, where params.yaml says so), so
dvc.yaml does not track them: changing one runs nothing again."""

from dataclasses import dataclass

from retro_model.core.config import setting
from retro_model.jobs.engine import Engine, EngineConfig


@dataclass(frozen=True)
class RuntimeConfig(EngineConfig, section="runtime"):
    """The device, the batch sizes, the engine (see EngineConfig), and what MLflow records (stages/tracking/runs.py)."""

    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    embed_batch_size: int = setting(0, minimum=0)
    evaluate_batch_size: int = setting(8, minimum=1)
    tracking: str = setting("required", choices=("required", "best_effort", "off"))
    registered_model: str = setting("")
    system_metrics: bool = setting(False)

    def make_engine(self) -> Engine:
        """The engine that runs the jobs of chunk, embed, index and knn."""
        return Engine(self, self.device)
