"""One MLflow run a model: what it holds, that an interrupted one goes on, and that evaluations find it."""

import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from paths import ROOT

from retro_model.core.artifacts import Artifact, ArtifactWriter
from stages.tracking.runs import MODEL_TAG, Recording, evaluation_run, training_run
from stages.tracking.store import EXPERIMENT, open_store


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
    client, experiment_id = open_store()
    assert (root / "mlflow.db").is_file()
    assert client.get_experiment(experiment_id).artifact_location == (root / "mlartifacts").as_uri()
    checkout = root / "temporary"
    checkout.mkdir(exist_ok=True)
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert open_store()[1] == experiment_id
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
    client, experiment_id = open_store()
    (run,) = client.search_runs([experiment_id], "tags.`git.commit` = 'abc'")
    assert run.data.tags["git.dirty"] == "unknown"
    assert "--no-optional-locks status --porcelain" in (tmp_path / "git.log").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_the_load_of_the_machine_is_in_the_run_that_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled all the while, in the training's run and in the evaluation's own; a resumed run goes on counting."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    client = open_store()[0]
    model, recording = model_folder(tmp_path / "model"), Recording(system_metrics=True)
    fingerprint = Artifact.open(model, "model").fingerprint

    def load_of(run_id: str) -> dict[str, float]:
        found = client.get_run(run_id).data.metrics.items()
        return {name.removeprefix("system/"): value for name, value in found if name.startswith("system/")}

    def steps_of(run_id: str) -> list[int]:
        return [metric.step for metric in client.get_metric_history(run_id, "system/cpu_utilization_percentage")]

    with pytest.raises(KeyboardInterrupt), training_run("train", "work-load", {}, {}, recording) as run:
        time.sleep(1.5)
        raise KeyboardInterrupt
    before = steps_of(run.run_id)
    with training_run("train", "work-load", {}, {}, recording) as again:
        time.sleep(1.5)
        again.log_model(model, fingerprint, {})
    steps = steps_of(run.run_id)
    assert again.run_id == run.run_id and len(steps) > len(before) > 1 and steps == list(range(len(steps)))
    found, memory = load_of(run.run_id), psutil.virtual_memory()
    assert found.keys() >= {
        *("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"),
        *("disk_usage_percentage", "disk_available_megabytes"),
        *("network_receive_megabytes", "network_transmit_megabytes"),
    }
    assert all(0 <= value <= 100 for name, value in found.items() if name.endswith("_percentage"))
    assert all(value >= 0 for value in found.values())
    assert 0 < found["system_memory_usage_megabytes"] < memory.total / 1e6
    assert found["system_memory_usage_percentage"] == pytest.approx(memory.percent, abs=30)
    assert found["disk_available_megabytes"] < psutil.disk_usage("/").total / 1e6

    with evaluation_run(fingerprint, {}, {}, recording) as (parent, child):
        time.sleep(1)
    assert load_of(child.run_id) and steps_of(parent.run_id) == steps
    with training_run("train", "work-no-load", {}, {}) as quiet:
        time.sleep(1)
    assert load_of(quiet.run_id) == {}


@pytest.mark.usefixtures("root")
def test_names_that_mlflow_does_not_take_are_written_so_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a model may have any name, and an experiment's name comes from whoever queued it."""
    monkeypatch.setenv("DVC_EXP_NAME", "hazy\x1b[31m")
    params = {"documents": "my\x1b[31m/texts\n", "retrofit.init_from": "caf\udce9"}
    with training_run("train", "work-names", params, {"models/mine (1)\x07#\xe9": "abc"}):
        pass
    client, experiment_id = open_store()
    (run,) = client.search_runs([experiment_id], "tags.`dvc.experiment` = 'hazy\u241b[31m'")
    assert run.data.tags["input.models/mine _1___\xe9"] == "abc"
    assert run.data.params == {"documents": "my\u241b[31m/texts\u240a", "retrofit.init_from": "caf\\xe9"}


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
    client, experiment_id = open_store()
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
    client, _ = open_store()
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
    client, _ = open_store()
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
    client, _ = open_store()
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
    code = "from stages.tracking.store import open_store; print(open_store()[1])"
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


# ---- a project that was moved or copied -----------------------------------------------------------


def small_project(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with its own copy of the store, in which a run with an artifact and a model has ended; its id."""
    folder.mkdir()
    with sqlite3.connect(root / "mlflow.db") as store, sqlite3.connect(folder / "mlflow.db") as copy:
        store.backup(copy)
    monkeypatch.chdir(folder)
    record("first", model_folder(folder / "retro"))
    return folder


def record(key: str, model: Path) -> str:
    """A run with an artifact and a logged model; its id."""
    with training_run("train", key, {}, {}) as run:
        run.log_folder(model, "best")
        run.log_model(model, f"fingerprint-{key}", {})
    return run.run_id


def artifact_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["moved", "copied", "moved, and a file is at the old place"])
def test_artifacts_are_where_the_project_is_now(
    how: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = small_project(root, tmp_path / "old", monkeypatch), tmp_path / "new"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(old, new) if how == "copied" else old.rename(new)
    if how.endswith("old place"):
        old.write_text("cannot be written below")
    before = artifact_files(old)
    monkeypatch.chdir(new)
    second = record("second", new / "retro")
    client, experiment_id = open_store()
    assert client.get_experiment(experiment_id).artifact_location == (new / "mlartifacts").as_uri()
    runs = {run.data.tags.get("retro.work"): run.info.run_id for run in client.search_runs([experiment_id])}
    assert runs["second"] == second
    for run_id in (runs["first"], second):
        assert {item.path for item in client.list_artifacts(run_id, "best")} >= {"best/model.safetensors"}
        assert (new / "mlartifacts" / run_id / "artifacts" / "best" / "model.safetensors").is_file()
    models = [model for model in client.search_logged_models([experiment_id]) if model.source_run_id in runs.values()]
    for model in models:
        if model.source_run_id in (runs["first"], second):
            # MLflow keeps places in memory, and this process has used the old one: look at the files themselves.
            place = Path(model.artifact_location.removeprefix("file://"))
            assert (place / "model.safetensors").is_file() and place.is_relative_to(new / "mlartifacts")
    assert artifact_files(old) == before, "nothing is written there"
    assert old.exists() == (how != "moved")


@pytest.mark.usefixtures("root")
def test_a_place_that_the_user_has_chosen_for_artifacts_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = small_project(root, tmp_path / "project", monkeypatch)
    chosen = (tmp_path / "large disk").as_uri()
    with sqlite3.connect(project / "mlflow.db") as store:
        store.execute("update experiments set artifact_location = ?", (chosen,))
    client, experiment_id = open_store()
    assert client.get_experiment(experiment_id).artifact_location == chosen


def test_artifacts_that_cannot_be_written_stop_before_the_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = small_project(root, tmp_path / "project", monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError) as caught:
        open_store()
    assert caught.value.filename == str(project / "mlartifacts")


def test_a_folder_of_any_name_keeps_its_store_inside(root: Path, tmp_path: Path) -> None:
    """In a URL, each of these characters would mean something."""
    folder = tmp_path / "100% of a%20b, why? c#"
    (folder / "checkout").mkdir(parents=True)
    with sqlite3.connect(root / "mlflow.db") as store, sqlite3.connect(folder / "mlflow.db") as copy:
        store.backup(copy)
    code = (
        "from pathlib import Path; from stages.tracking.runs import training_run\n"
        "with training_run('train', 'here', {}, {}) as run: run.log_file(Path('x'), 'files')\n"
        "print(run.run_id)"
    )
    (folder / "checkout" / "x").touch()
    environment = {**os.environ, "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder / "checkout", capture_output=True, text=True, check=True)
    run_id = done.stdout.strip()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [".retro", "checkout", "mlartifacts", "mlflow.db"]
    assert [path.name for path in (folder / "checkout").iterdir()] == ["x"]
    assert (folder / "mlartifacts" / run_id / "artifacts" / "files" / "x").is_file()
    with sqlite3.connect(folder / "mlflow.db") as store:
        assert store.execute("select status from runs where run_uuid = ?", (run_id,)).fetchone() == ("FINISHED",)


# ---- what was deleted in MLflow's pages ------------------------------------------------------------


def test_a_run_that_is_deleted_while_it_goes_on_is_followed_by_a_new_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, _ = open_store()
    with training_run("train", "work-deleted", {"knn": 2}, {"data": "abc"}) as run:
        run.log_step(10, {"loss": 3.0})
        first = run.run_id
        client.delete_run(first)
        run.log_step(20, {"loss": 2.0})
        run.log_model(model_folder(tmp_path / "retro"), "fingerprint-deleted", {"valid_loss": 2.0})
    assert run.run_id != first
    assert capsys.readouterr().err == "mlflow: the run train was deleted; a new one goes on from here\n"
    new = client.get_run(run.run_id)
    assert new.info.status == "FINISHED" and new.data.params == {"knn": "2"} and new.data.metrics["loss"] == 2.0
    assert new.data.tags["retro.work"] == "work-deleted" and new.data.tags["input.data"] == "abc"
    assert client.get_run(first).info.lifecycle_stage == "deleted", "it stays deleted"
    with evaluation_run("fingerprint-deleted", {}, {}) as (parent, child):
        client.delete_run(child.run_id)
        client.delete_run(parent.run_id)
        for place in (parent, child):
            place.log_metrics({"test_bpb_on": 1.0})
    for place in (parent, child):
        assert client.get_run(place.run_id).data.metrics["test_bpb_on"] == 1.0


@pytest.mark.usefixtures("root")
def test_a_run_that_is_deleted_at_its_end_or_for_good_stops_nothing() -> None:
    client, _ = open_store()
    with training_run("train", "work-end", {}, {}) as run:
        client.delete_run(run.run_id)
    with pytest.raises(KeyboardInterrupt), training_run("train", "work-end", {}, {}) as run:
        client.delete_run(run.run_id)
        raise KeyboardInterrupt
    with training_run("train", "work-end", {}, {}) as run:
        client.delete_run(run.run_id)
        client._tracking_client.store._hard_delete_run(run.run_id)  # as `mlflow gc` does
        run.log_step(1, {"loss": 1.0})
    assert client.get_run(run.run_id).data.metrics == {"loss": 1.0}


@pytest.mark.usefixtures("root")
def test_a_deleted_experiment_is_restored_with_its_runs(capsys: pytest.CaptureFixture[str]) -> None:
    client, experiment_id = open_store()
    with training_run("train", "work-before", {}, {}) as before:
        pass
    client.delete_experiment(experiment_id)
    with training_run("train", "work-after", {}, {}) as run:
        said = f"mlflow: the experiment {EXPERIMENT} was deleted; restored it with its runs\n"
        assert capsys.readouterr().err == said
        client.delete_experiment(experiment_id)
        run.log_step(1, {"loss": 1.0})
        assert capsys.readouterr().err == said
    assert open_store()[1] == experiment_id
    for found in (before, run):
        assert client.get_run(found.run_id).info.lifecycle_stage == "active"
    assert client.get_run(run.run_id).data.metrics == {"loss": 1.0}


# ---- a database that this MLflow cannot use --------------------------------------------------------


def advice(folder: Path) -> str:
    """The one line with which a stage stops; in a process of its own, which has not opened this database before."""
    code = (
        "from stages.common.harness import run_stage\nfrom stages.tracking.runs import training_run\n"
        "def main():\n    with training_run('train', 'x', {}, {}): pass\nrun_stage('train', main)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_database_of_another_mlflow_names_the_command_that_upgrades_it(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a project"
    folder.mkdir()
    database = folder / "mlflow.db"
    with sqlite3.connect(root / "mlflow.db") as store, sqlite3.connect(database) as copy:
        store.backup(copy)
    import mlflow.store  # takes seconds

    migrations = Path(mlflow.store.__file__).parent / "db_migrations" / "versions"
    texts = [path.read_text() for path in migrations.glob("*.py")]
    with sqlite3.connect(database) as store:
        ((head,),) = store.execute("select version_num from alembic_version").fetchall()
        (text,) = [text for text in texts if re.search(rf"^revision = .{head}.$", text, re.MULTILINE)]
        before = re.search(r"^down_revision = .(\w+).$", text, re.MULTILINE)
        assert before
        store.execute("update alembic_version set version_num = ?", (before[1],))
    line = advice(folder)
    command = f"mlflow db upgrade {shlex.quote(f'sqlite:///{database}')}"
    assert f"; another MLflow made it: run `cp '{database}' '{database}.backup' && {command}`, then `dvc repro`" in line
    assert "move" not in line and "no run is lost" in line
    with sqlite3.connect(database) as store:
        store.execute("update alembic_version set version_num = 'fromthefuture'")
    line = advice(folder)
    assert "a newer MLflow made it: install that version of MLflow again" in line and "move" not in line
    database.write_bytes(b"this is no database, and never was one" * 100)
    assert f"; move {database} away and run `dvc repro` again: nothing else needs it" in advice(folder)
