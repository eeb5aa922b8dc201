"""Training checkpoints: written atomically, and loaded only by a run with the same settings and inputs.

    checkpoint-00000400/
        state.json            step, counts, history, fingerprint of settings and inputs, digests of all files
        weights.safetensors   the weights after that step
        optimizer.safetensors AdamW's state
    best-00000300.safetensors the weights with the best validation loss so far

A checkpoint is renamed into place once it is complete, and only then are older ones deleted. So a kill at any
moment leaves the last complete checkpoint. Batches and dropout are functions of (seed, step) and need not be stored.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retro_model.core.artifacts import file_digest, whole_folder, write_json
from retro_model.core.errors import DamagedArtifactError
from retro_model.network.pretrained import write_tensors

Row = dict[str, float]


@dataclass
class TrainingState:
    """The state of training besides weights and optimizer."""

    step: int = 0  # steps done
    tokens: int = 0  # labels trained on, without padding
    positions: int = 0  # the same with padding
    interval_loss: float = 0.0  # sum of the losses of all labels since the last validation
    interval_tokens: int = 0  # labels since the last validation
    history: list[Row] = field(default_factory=list)  # one row per validation
    best: Row | None = None  # the row of `history` with the lowest validation loss; the earliest of equal ones


class Saved(NamedTuple):
    """A checkpoint in main memory, with full tensors even if training was sharded."""

    state: TrainingState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best_weights: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training run in `folder`; nothing else may write there.

    `fingerprint` identifies all settings and inputs. Checkpoints with another fingerprint are never loaded, and
    `prune` deletes them when training starts.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        folder.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        state: TrainingState,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        best_weights: dict[str, Tensor],
    ) -> Path:
        """Write a checkpoint, then delete all earlier ones."""
        if state.best is not None:
            best = self._best_file(state)
            if not best.exists():  # the weights of a given step never change
                partial = best.with_suffix(".partial")
                write_tensors(best_weights, partial)
                partial.replace(best)
        path = self.folder / f"checkpoint-{state.step:08d}"
        if not path.exists():
            with whole_folder(path) as folder:
                write_tensors(weights, folder / "weights.safetensors")
                write_tensors(optimizer, folder / "optimizer.safetensors")
                _write_state(folder, self.fingerprint, state, self._best_file(state) if state.best else None)
        self._delete_others(path, state)
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint of this run, or None."""
        paths = [path for path in self.folder.glob("checkpoint-????????") if (path / "state.json").is_file()]
        same = [path for path in paths if _read_json(path)["fingerprint"] == self.fingerprint]
        return max(same, default=None)

    def prune(self) -> None:
        """Delete all but the newest checkpoint of this run, so that files of other runs cannot be taken for its own."""
        path = self.latest()
        self._delete_others(path, _state(path) if path is not None else TrainingState())

    def load(self) -> Saved | None:
        """The newest checkpoint of this run, or None. Raises DamagedArtifactError if one of its files has changed."""
        path = self.latest()
        if path is None:
            return None
        state = _state(path)
        try:
            return Saved(
                state,
                load_file(path / "weights.safetensors"),
                load_file(path / "optimizer.safetensors"),
                load_file(self._best_file(state)) if state.best is not None else {},
            )
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise DamagedArtifactError(f"{path} cannot be read ({reason}); delete {self.folder}") from error

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


def _state(path: Path) -> TrainingState:
    values = _read_json(path)
    del values["fingerprint"]
    for name, digest in values.pop("sha256").items():
        file = (path.parent if name.startswith("best-") else path) / name
        if not file.is_file() or file_digest(file) != digest:
            raise _damaged(path.parent, file)
    return TrainingState(**values)


def _write_state(folder: Path, fingerprint: str, state: TrainingState, best: Path | None) -> None:
    """Write state.json, with digests of the checkpoint's files, of the best weights and of itself."""
    files = [*sorted(folder.iterdir()), *([best] if best else [])]
    values = {"fingerprint": fingerprint, **asdict(state), "sha256": {file.name: file_digest(file) for file in files}}
    write_json(folder / "state.json", {**values, "digest": _digest(values)})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _damaged(folder: Path, file: Path) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"{file} does not have the bytes that were written; delete {folder} and run `dvc repro`: training starts anew"
    )


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path.parent, file) from error
    if not isinstance(values, dict) or values.pop("digest", None) != _digest(values):
        raise _damaged(path.parent, file)
    return values
