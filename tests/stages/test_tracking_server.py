"""Runs, artifacts and models on a real tracking server; the models come back from it, and are served."""

import json
import os
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest
from paths import ROOT
from small_run import small_run
from stagewise import write_params
from tracking_server import free_port, serving, tracking_server

from retro_model.core.artifacts import Artifact
from retro_model.core.printable import printable
from stages.promote import main as promote_as_typed
from stages.promote import promote
from stages.tracking import outbox
from stages.tracking.runs import Recording, evaluation_run, training_run
from stages.tracking.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # MLflow's own

PROMPT, PARAMS = "Ba co di fu", {"seed": 3, "max_new_tokens": 12}


def documented(page: str, start: str) -> list[str]:
    """The command of a page that starts like this."""
    (line,) = [line for line in (ROOT / page).read_text().splitlines() if line.startswith(f"    {start} ")]
    return shlex.split(line)[2:] if start.startswith("python -m") else shlex.split(line)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def written(root: Path) -> str:
    """What `retro generate` prints for the prompt, with pictures of control characters."""
    command = [sys.executable, "-m", "retro_model", "generate", "--prompt", PROMPT, "--encoder", "encoder"]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in PARAMS.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=root, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tracking_server(tmp_path_factory.mktemp("server")) as address:
        yield address


def record(key: str, model: Path, loss: float, recording: Recording) -> str:
    """A training and its evaluation; the id of the training's run."""
    fingerprint = Artifact.open(model, "model").fingerprint
    with training_run("train", key, {"knn": 2}, {"data/chunks/train": "0123456789" * 6}, recording) as run:
        run.log_step(10, {"loss": loss})
        run.log_folder(model, "best")
        run.log_model(model, fingerprint, {"valid_loss": loss}, registered=True)
    with evaluation_run(fingerprint, {"knn": 2}, {}, recording) as (parent, child):
        for place in (parent, child):
            place.log_metrics({"test_bpb_on": loss})
    assert parent.run_id == run.run_id
    return run.run_id


def test_everything_goes_to_the_server_and_comes_back_from_its_registry(
    root: Path,
    written: str,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "our trials")
    best = record("key-1", root / "models/retro", 1.0, Recording(registered_model="ours", system_metrics=True))
    other = root / "models/baseline"  # so that two runs have two models
    record("key-2", other, 2.0, Recording())
    client, experiment_id = open_store()
    assert client.get_experiment(experiment_id).name == "our trials"
    found = client.get_run(best)
    assert found.info.status == "FINISHED" and found.data.params == {"knn": "2"}
    assert found.data.metrics["loss"] == found.data.metrics["test_bpb_on"] == 1.0
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == (
        "data/chunks/train",
        "012345678901234567890123456789012345",
    )
    files = {item.path for item in client.list_artifacts(best, "best")}
    assert files >= {"best/MLmodel", "best/artifact.json", "best/model.safetensors"}
    (version,) = client.search_model_versions("name = 'ours'")
    assert version.run_id == best, "a version for the run whose setting names a model"

    write_params(Path.cwd(), runtime__registered_model="ours")
    monkeypatch.setattr(sys, "argv", documented("docs/team.md", "python -m stages.promote"))
    promote_as_typed()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"models:/ours@champion is version 1: run {best}, test_bpb_on 1.0000"
    client.delete_run(best)
    assert promote("valid_loss", "champion", "ours").startswith("models:/ours@champion is version 2: run ")
    client.set_registered_model_alias("ours", "champion", "1")

    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    config = {"data": str(root / "data"), "encoder": str(root / "encoder")}
    model = mlflow.pyfunc.load_model("models:/ours@champion", model_config=config)
    assert [printable(text) for text in model.predict([{"prompt": PROMPT}], params=PARAMS)] == [written]
    assert [path.name for path in (tmp_path / "project").glob("ml*")] == [], "nothing is recorded here"


def test_a_server_that_comes_back_has_all_that_was_logged_meanwhile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outbox, "LEAST_WAIT_SECONDS", 1e6)  # tries again at the end alone
    monkeypatch.setattr(outbox, "SHARE_OF_WAITING", 1e6)
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with tracking_server(tmp_path, port):
        opened = training_run("train", "key", {"knn": 2}, {}, Recording("best_effort"))
        run = opened.__enter__()
        run.log_step(10, {"loss": 3.0})
    run.log_step(20, {"loss": 2.0})
    run.log_folder(root / "models/retro", "best")
    assert "Connection refused; the stage goes on" in capsys.readouterr().err
    with tracking_server(tmp_path, port):
        opened.__exit__(None, None, None)
        client, _ = open_store()
        assert [point.step for point in client.get_metric_history(run.run_id, "loss")] == [10, 20]
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert client.list_artifacts(run.run_id, "best")
    assert "can be reached again, and all is recorded" in capsys.readouterr().err


@pytest.mark.parametrize("database", [True, False])
def test_a_served_model_writes_what_retro_generate_writes(
    root: Path, written: str, tmp_path: Path, database: bool
) -> None:
    """`mlflow models serve` on the folder; without a database it refuses, and says what to set."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [*documented("docs/serving.md", "mlflow models serve"), "-h", "127.0.0.1", "-p", str(port)]
    command[command.index("models/retro")] = str(root / "models/retro")
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if database:
        environment |= {"RETRO_DATA": str(root / "data"), "RETRO_ENCODER": str(root / "encoder")}
    asked = json.dumps({"dataframe_records": [{"prompt": PROMPT}], "params": PARAMS}).encode()
    request = urllib.request.Request(f"{address}/invocations", asked, {"Content-Type": "application/json"})
    with serving(command, f"{address}/ping", environment, tmp_path / "log"):
        if database:
            with urllib.request.urlopen(request) as answer:
                (text,) = json.load(answer)["predictions"]
            assert printable(text) == written
        else:
            with pytest.raises(HTTPError) as caught:
                urllib.request.urlopen(request)
            assert (
                caught.value.code == 400 and "set the environment variable RETRO_DATA" in caught.value.read().decode()
            )
            assert "set the environment variable RETRO_DATA" in (tmp_path / "log").read_text()
