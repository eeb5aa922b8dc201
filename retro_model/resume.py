"""Training states on disk: whole or absent, and found again only by the same settings and inputs.

    checkpoint-00000400/
        state.json            step, counts, history, the fingerprint of settings and inputs
        weights.safetensors   the weights after that step
        optimizer.safetensors what AdamW remembers of each weight
    best-00000300.safetensors the weights of the best validation so far

A checkpoint is renamed into place when all of it is written, and only then are older ones deleted,
so that a kill at any moment leaves the last one that was whole. What decides the batches and dropout
is a function of (seed, step) and need not be stored.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retro_model.artifacts import whole_folder, write_json
from retro_model.errors import DamagedArtifactError
from retro_model.optimization import optimizer_tensors, restore_optimizer

Row = dict[str, float]


@dataclass
class TrainingState:
    """All that training remembers beside weights and optimizer."""

    step: int = 0  # steps done
    tokens: int = 0  # labels trained on
    positions: int = 0  # the same and padding
    interval_loss: float = 0.0  # summed over the labels since the last validation
    interval_tokens: int = 0
    history: list[Row] = field(default_factory=list)  # a row for each validation
    best: Row | None = None  # the history's row with the least validation loss, the first of equals


class Checkpoints:
    """The checkpoints of one training run in `folder`, which nobody else writes.

    `fingerprint` stands for all settings and inputs: a checkpoint that was written under another one
    is never read, and goes when training starts.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        folder.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        best_weights: dict[str, Tensor],
    ) -> Path:
        """Writes a checkpoint, then deletes those before it."""
        if state.best is not None:
            best = self._best_file(state)
            if not best.exists():  # a step's weights never change
                partial = best.with_suffix(".partial")
                save_file(best_weights, partial)
                partial.replace(best)
        path = self.folder / f"checkpoint-{state.step:08d}"
        if not path.exists():
            with whole_folder(path) as folder:
                save_file(cpu_weights(model), folder / "weights.safetensors")
                save_file(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
                write_json(folder / "state.json", {"fingerprint": self.fingerprint, **asdict(state)})
        self._delete_others(path, state)
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint of this run, or None."""
        paths = [path for path in self.folder.glob("checkpoint-????????") if (path / "state.json").is_file()]
        same = [path for path in paths if _read_json(path)["fingerprint"] == self.fingerprint]
        return max(same, default=None)

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[TrainingState, dict[str, Tensor]] | None:
        """Puts the newest checkpoint into model and optimizer; its state and the best weights, or None.

        Raises DamagedArtifactError where a file of it is not what was written.
        """
        path = self.latest()
        state = _state(path) if path is not None else TrainingState()
        self._delete_others(path, state)  # nothing of another run may pass for a part of this one
        if path is None:
            return None
        try:
            model.load_state_dict(load_file(path / "weights.safetensors"))
            restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
            best_weights = load_file(self._best_file(state)) if state.best is not None else {}
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DamagedArtifactError(f"{path} cannot be read ({reason}); delete {self.folder}") from error
        return state, best_weights

    def _best_file(self, state: TrainingState) -> Path:
        assert state.best is not None
        return self.folder / f"best-{int(state.best['step']):08d}.safetensors"

    def _delete_others(self, kept: Path | None, state: TrainingState) -> None:
        best = self._best_file(state) if state.best is not None else None
        for path in self.folder.glob("checkpoint-*"):
            if path != kept:
                shutil.rmtree(path)
        for path in self.folder.glob("best-*"):
            if path != best:
                path.unlink()


def cpu_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights in main memory."""
    weights = model.state_dict()
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def _state(path: Path) -> TrainingState:
    values = _read_json(path)
    del values["fingerprint"]
    return TrainingState(**values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedArtifactError(f"{path / 'state.json'} is no JSON ({error}); delete {path}") from error
    assert isinstance(values, dict)
    return values
