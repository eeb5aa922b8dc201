"""Settings of this machine. They change how fast a stage runs and never what it should write (params.yaml
says which ones round differently), so that dvc.yaml does not track them: edit them freely, nothing runs again."""

from dataclasses import dataclass

from retro_model.core.config import setting
from retro_model.jobs.engine import Engine, EngineConfig


@dataclass(frozen=True)
class RuntimeConfig(EngineConfig, section="runtime"):
    """Where and in what portions to compute."""

    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    embed_batch_size: int = setting(0, minimum=0)
    evaluate_batch_size: int = setting(8, minimum=1)

    def make_engine(self) -> Engine:
        """Who makes the parts of the stages chunk, embed, index and knn."""
        return Engine(self, self.device)
