"""One MLflow run a model: what it holds, that an interrupted one goes on, and that evaluations find it."""

import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from retro_model.core.artifacts import ArtifactWriter
from stages.tracking.runs import EXPERIMENT, MODEL_TAG, _connect, evaluation_run, training_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A git repository as the current folder; its store is made once, which takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    before = os.getcwd()
    os.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "start"], check=True)
    yield folder
    os.chdir(before)


def model_folder(path: Path) -> Path:
    with ArtifactWriter(path, "model") as writer:
        (path / "model.safetensors").write_bytes(b"weights")
        writer.add_file("model.safetensors")
    return path


def test_the_store_is_where_mlflow_ui_looks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, experiment_id = _connect()
    assert (root / "mlflow.db").is_file()
    assert client.get_experiment(experiment_id).artifact_location == (root / "mlartifacts").as_uri()
    checkout = root / "temporary"
    checkout.mkdir(exist_ok=True)
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert _connect()[1] == experiment_id
    assert list(checkout.iterdir()) == []


@pytest.mark.usefixtures("root")
def test_a_git_that_fails_costs_a_tag_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `git status` is asked to write nothing, so that it does not fail on a disk that is full."""
    git = tmp_path / "git"
    git.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n[ "$1" = rev-parse ] && echo abc || exit 25\n', encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with training_run("train", "work-git", {"knn": 2}, {}):
        pass
    client, experiment_id = _connect()
    (run,) = client.search_runs([experiment_id], "tags.`git.commit` = 'abc'")
    assert run.data.tags["git.dirty"] == "unknown"
    assert "--no-optional-locks status --porcelain" in (tmp_path / "git.log").read_text()


def test_a_run_holds_params_metrics_files_the_model_and_where_it_came_from(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "hazy-fig")
    folder = model_folder(tmp_path / "retro")
    with training_run("train", "work-1", {"knn": 2, "train.lr": 3e-4}, {"data/chunks/train": "abc"}) as run:
        run.log_step(10, {"loss": 3.0, "learning_rate": 1e-4})
        run.log_step(20, {"loss": 2.0, "learning_rate": 2e-4})
        run.log_metrics({"valid_loss": 2.5, "note": "not a number"})
        run.log_folder(folder, "best")
        run.log_model(folder, "fingerprint-1", {"valid_loss": 2.5})
    client, experiment_id = _connect()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"knn": "2", "train.lr": "0.0003"}
    assert found.data.metrics == {"loss": 2.0, "learning_rate": 2e-4, "valid_loss": 2.5}
    assert [(point.step, point.value) for point in client.get_metric_history(run.run_id, "loss")] == [
        (10, 3.0),
        (20, 2.0),
    ]
    tags = found.data.tags
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert tags["git.commit"] == commit and tags["dvc.experiment"] == "hazy-fig"
    assert tags["input.data/chunks/train"] == "abc" and tags[MODEL_TAG] == "fingerprint-1"
    assert {item.path for item in client.list_artifacts(run.run_id, "best")} == {
        "best/artifact.json",
        "best/model.safetensors",
    }
    (model,) = client.search_logged_models(experiment_ids=[experiment_id])
    assert model.source_run_id == run.run_id and model.status == "READY"
    assert {metric.key: metric.value for metric in model.metrics} == {"valid_loss": 2.5}


def test_an_interrupted_run_goes_on_and_no_step_is_logged_twice(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), training_run("train", "work-2", {"knn": 2}, {}) as first:
        for step in (10, 20, 30):
            first.log_step(step, {"loss": float(step)})
        raise KeyboardInterrupt
    client, _ = _connect()
    assert client.get_run(first.run_id).info.status == "KILLED"
    with training_run("train", "work-2", {"knn": 2}, {}) as second:  # from the checkpoint after step 20
        for step in (30, 40):
            second.log_step(step, {"loss": float(step)})
    assert second.run_id == first.run_id
    assert [point.step for point in client.get_metric_history(first.run_id, "loss")] == [10, 20, 30, 40]
    assert client.get_run(first.run_id).info.status == "FINISHED"
    with training_run("train", "work-2", {"knn": 2}, {}) as third:  # finished work that is done again is a new run
        pass
    assert third.run_id != first.run_id


def test_other_work_never_continues_a_run_and_a_failure_is_one(root: Path) -> None:
    with pytest.raises(ValueError, match="boom"), training_run("train", "work-3", {}, {}) as failed:
        raise ValueError("boom")
    client, _ = _connect()
    assert client.get_run(failed.run_id).info.status == "FAILED"
    with training_run("train", "work-4", {}, {}) as other:
        pass
    assert other.run_id != failed.run_id


def test_an_evaluation_is_a_child_of_the_run_of_its_model(root: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "retro")
    with training_run("train", "work-5", {}, {}) as trained:
        trained.log_model(folder, "fingerprint-5", {})
    with evaluation_run("fingerprint-5", {"knn": 4}, {}) as (parent, child):
        child.log_metrics({"test_bpb_on": 1.5})
    assert parent.run_id == trained.run_id != child.run_id
    client, _ = _connect()
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    with evaluation_run("restored from a remote", {"knn": 4}, {}) as (parent, child):
        pass
    assert parent.run_id not in (trained.run_id, child.run_id)
    assert client.get_run(parent.run_id).data.tags[MODEL_TAG] == "restored from a remote"


@pytest.mark.slow
def test_a_store_on_a_full_disk_is_an_error_and_not_a_traceback_of_mlflows_own(root: Path) -> None:
    code = """
        import os, resource
        from stages.tracking.runs import training_run
        with training_run("train", "work-6", {}, {}) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            try:
                run.log_step(1, {"loss": 1.0})
            except Exception as error:
                print(error, flush=True)
                os._exit(3)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "disk" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_store_is_made_by_one_process_alone(tmp_path: Path) -> None:
    """Three at once, as queued experiments start: without the lock, the migration breaks most of them."""
    code = "from stages.tracking.runs import _connect; print(_connect()[1])"
    environment = {**os.environ, "DVC_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert {out.strip() for out, _ in results} == {"1"}, results
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select count(*) from experiments where name = ?", (EXPERIMENT,)).fetchone() == (1,)
