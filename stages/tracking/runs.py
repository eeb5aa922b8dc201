"""Records runs for `mlflow ui`: one MLflow run for each trained model, with its evaluations as child runs.

DVC decides what runs; this module only records it. It changes no output, and outputs contain no MLflow id: evaluate
finds a model's run by the model's fingerprint. `store.py` says where the runs are.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retro_model.core.printable import one_line
from stages.tracking.store import explain_store_errors, open_experiment, open_store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

MODEL_TAG = "retro.model"
WORK_TAG = "retro.work"
STAGE_TAG = "retro.stage"
MAX_PARAM_LENGTH = 6000  # MLflow's own limit
NOT_IN_TAGS = re.compile(r"[^/\w.\- :]")


class TrackedRun:
    """An open MLflow run. If it is deleted in MLflow's pages, recording goes on in a new run."""

    def __init__(self, client: "MlflowClient", run: "Run", last_step: int = -1) -> None:
        self.client, self.run_id, self.experiment_id = client, run.info.run_id, run.info.experiment_id
        self._name, self._tags, self._params = run.info.run_name, dict(run.data.tags), dict(run.data.params)
        self._last_step = last_step

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics at a step; skips steps that an interrupted run has logged already."""
        if step > self._last_step:
            self.log_metrics(values, step)

    def log_metrics(self, values: Mapping[str, object], step: int = 0) -> None:
        """Logs the numbers among `values`."""
        from mlflow.entities import Metric  # imported with the store, which takes seconds

        now = int(time.time() * 1000)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        metrics = [Metric(name, float(value), now, step) for name, value in numbers.items()]
        self._write(lambda run_id: self.client.log_batch(run_id, metrics=metrics))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Logs the params that the run does not have yet; a continued run has them already."""
        from mlflow.entities import Param  # imported with the store, which takes seconds

        new = {
            name: one_line(str(value))[:MAX_PARAM_LENGTH] for name, value in params.items() if name not in self._params
        }
        self._write(
            lambda run_id: self.client.log_batch(run_id, params=[Param(name, value) for name, value in new.items()])
        )
        self._params.update(new)

    def log_folder(self, folder: Path, name: str) -> None:
        """Copies a folder's files to the run's artifact folder `name`."""
        self._write(lambda run_id: self.client.log_artifacts(run_id, str(folder), name))

    def log_file(self, file: Path, name: str) -> None:
        """Copies a file to the run's artifact folder `name`."""
        self._write(lambda run_id: self.client.log_artifact(run_id, str(file), name))

    def log_model(self, folder: Path, fingerprint: str, metrics: Mapping[str, object]) -> None:
        """Registers a model folder (safetensors and JSON, no pickle) as this run's logged model."""
        self._write(lambda run_id: self.client.set_tag(run_id, MODEL_TAG, fingerprint))
        self._tags[MODEL_TAG] = fingerprint
        model = self.client.create_logged_model(
            self.experiment_id, name=folder.name, source_run_id=self.run_id, model_type="retro"
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.client.log_metric(self.run_id, name, float(value), model_id=model.model_id)

    def end(self, status: str) -> None:
        """Gives the run its final status: FINISHED, KILLED or FAILED."""
        if not self._is_deleted():
            self.client.set_terminated(self.run_id, status)

    def _write(self, write: Callable[[str], object]) -> None:
        """Calls `write` with the run's id, and again with that of a new run if the run was deleted."""
        from mlflow.exceptions import MlflowException  # imported with the store, which takes seconds

        try:
            write(self.run_id)
        except MlflowException:
            if not self._is_deleted():
                raise
            self._continue_after_deletion()
            write(self.run_id)

    def _is_deleted(self) -> bool:
        from mlflow.exceptions import MlflowException  # imported with the store, which takes seconds

        try:
            return bool(self.client.get_run(self.run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True  # for good, by `mlflow gc`

    def _continue_after_deletion(self) -> None:
        """Creates a new run with the same name, tags and params, if the old one is not restored with its experiment."""
        self.experiment_id = open_experiment(self.client)
        if not self._is_deleted():
            return
        run = self.client.create_run(self.experiment_id, run_name=self._name, tags=self._tags)
        print(f"mlflow: the run {self._name} was deleted; a new one goes on from here", file=sys.stderr)
        self.run_id = run.info.run_id
        params, self._params = self._params, {}
        self.log_params(params)


@contextmanager
def training_run(
    stage: str, work_key: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[TrackedRun]:
    """Opens a run for training a model, or continues the interrupted run with the same `work_key`.

    Ends it as FINISHED, KILLED (by an interrupt) or FAILED.
    """
    with explain_store_errors():
        yield from _training_run(stage, work_key, params, inputs)


def _training_run(
    stage: str, work_key: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[TrackedRun]:
    client, experiment_id = open_store()
    interrupted = client.search_runs(
        [experiment_id], f"tags.`{WORK_TAG}` = '{work_key}' and attributes.status != 'FINISHED'", max_results=1
    )
    if interrupted:
        run_id = interrupted[0].info.run_id
        history = client.get_metric_history(run_id, "loss")
        client.update_run(run_id, status="RUNNING")
        run = TrackedRun(client, interrupted[0], max((metric.step for metric in history), default=-1))
    else:
        tags = {WORK_TAG: work_key, STAGE_TAG: stage, **_origin_tags(), **_input_tags(inputs)}
        run = _create(client, experiment_id, stage, tags)
    run.log_params(params)
    with _set_final_status(run):
        yield run


@contextmanager
def evaluation_run(
    model_fingerprint: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[tuple[TrackedRun, TrackedRun]]:
    """Opens (the evaluated model's run, a child run for this evaluation).

    A model restored from DVC's cache or a remote has no run here yet; one is created for it.
    """
    with explain_store_errors():
        yield from _evaluation_run(model_fingerprint, params, inputs)


def _evaluation_run(
    model_fingerprint: str, params: Mapping[str, object], inputs: Mapping[str, str]
) -> Iterator[tuple[TrackedRun, TrackedRun]]:
    client, experiment_id = open_store()
    found = client.search_runs(
        [experiment_id],
        f"tags.`{MODEL_TAG}` = '{model_fingerprint}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if found:
        parent = TrackedRun(client, found[0])
    else:
        tags = {STAGE_TAG: "restored", MODEL_TAG: model_fingerprint, **_origin_tags()}
        parent = _create(client, experiment_id, "restored", tags)
        parent.log_params(params)
        parent.end("FINISHED")
    tags = {"mlflow.parentRunId": parent.run_id, STAGE_TAG: "evaluate", **_origin_tags(), **_input_tags(inputs)}
    child = _create(client, experiment_id, "evaluate", tags)
    child.log_params(params)
    with _set_final_status(child):
        yield parent, child


def _create(client: "MlflowClient", experiment_id: str, name: str, tags: Mapping[str, str]) -> TrackedRun:
    experiment_name = os.environ.get("DVC_EXP_NAME")
    run_name = f"{name} {one_line(experiment_name)}" if experiment_name else name
    return TrackedRun(client, client.create_run(experiment_id, run_name=run_name, tags=dict(tags)))


@contextmanager
def _set_final_status(run: TrackedRun) -> Iterator[None]:
    try:
        yield
    except Exception:
        run.end("FAILED")
        raise
    except BaseException:
        run.end("KILLED")
        raise
    run.end("FINISHED")


def _origin_tags() -> dict[str, str]:
    """Tags that name the code's commit and the DVC experiment."""
    tags = {"mlflow.source.name": "dvc repro"}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        # Without optional locks git writes nothing, so it does not fail on a full disk.
        changed = subprocess.run(
            ["git", "--no-optional-locks", "status", "--porcelain"], capture_output=True, text=True, check=False
        )
        tags["git.commit"] = tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = "unknown" if changed.returncode else str(bool(changed.stdout.strip())).lower()
    if "DVC_EXP_NAME" in os.environ:
        tags["dvc.experiment"] = one_line(os.environ["DVC_EXP_NAME"])
    return tags


def _input_tags(inputs: Mapping[str, str]) -> dict[str, str]:
    """Tags that name each input's fingerprint; characters that MLflow takes in no tag's name become underscores."""
    return {f"input.{NOT_IN_TAGS.sub('_', name)}": digest for name, digest in inputs.items()}
