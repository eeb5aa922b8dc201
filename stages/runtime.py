"""Settings of this machine. They change how fast a stage runs and never what it should write, so that
dvc.yaml does not track them: edit them freely, nothing runs again."""

from dataclasses import dataclass

from retro_model.config import Config, setting


@dataclass(frozen=True)
class RuntimeConfig(Config, section="runtime"):
    """Where and in what portions to compute."""

    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    embed_batch_size: int = setting(32, minimum=1)
    evaluate_batch_size: int = setting(8, minimum=1)
