"""The pipeline as a user runs it: real `dvc repro`, `dvc exp run`, `dvc push` and `dvc pull` in a fresh repository.

Slow: each stage is a process of its own. What the stages write is tested in test_stages.py.
"""

import csv
import hashlib
import io
import json
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from project import Project, stages_run

pytestmark = pytest.mark.slow

STAGES = ["sample", "tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which everything has run and is committed."""
    project = Project.create(tmp_path_factory.mktemp("project"))
    assert sorted(project.repro()) == sorted(STAGES)
    project.commit("first run")
    return project


def as_after_the_first_run(project: Project, root: Path) -> Project:
    """A copy of the project in which the first run is not committed yet, and MLflow's store begins anew."""
    shutil.copytree(project.root, root, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    copy = Project(root)
    copy.run("git", "reset", "-q", copy.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.strip())
    assert copy.repro() == []
    return copy


def metrics(project: Project, stage: str) -> dict[str, float]:
    content: dict[str, float] = json.loads((project.root / "metrics" / f"{stage}.json").read_text())
    return content


def locked_hashes(project: Project, *stages: str) -> dict[str, str]:
    """The hash of each stage's outputs, as dvc.lock has them."""
    from ruamel.yaml import YAML

    lock = YAML(typ="safe", pure=True).load(project.root / "dvc.lock")["stages"]
    return {out["path"]: out["md5"] for stage in stages for out in lock[stage]["outs"]}


def mlflow_runs(project: Project) -> list[dict[str, object]]:
    """The runs in the store, read as plain SQL: name, status, tags, metrics, params."""
    with sqlite3.connect(f"file:{project.root / 'mlflow.db'}?mode=ro", uri=True) as store:
        runs = []
        for run_id, name, status in store.execute("select run_uuid, name, status from runs order by start_time"):
            pairs = {
                kind: dict(store.execute(f"select key, value from {table} where run_uuid = ?", (run_id,)))
                for kind, table in (("tags", "tags"), ("params", "params"), ("metrics", "latest_metrics"))
            }
            runs.append({"id": run_id, "name": name, "status": status, **pairs})
        return runs


def test_everything_ran_and_a_second_run_does_nothing(project: Project) -> None:
    assert project.repro() == []
    assert "up to date" in project.run("dvc", "status").stdout


# What each change must run again: the table of the design, row by row. That each param alone is among those that
# dvc.yaml names for the stages that read it is tests/contract/test_contract.py's.
LEARN = ["baseline", "train", "evaluate"]
CHANGES = [
    ({"runtime.evaluate_batch_size": 3}, []),
    ({"evaluate.bootstrap_samples": 40, "evaluate.compare": "models/baseline"}, ["evaluate"]),
    ({"evaluate.database": "tiny/documents"}, ["evaluate"]),
    ({"knn": 1}, ["train", "evaluate"]),
    ({"retrofit.steps": 4, "retrofit.lr": 2e-3}, ["train", "evaluate"]),
    ({"neighbors.stored": 6}, ["knn", "train", "evaluate"]),
    ({"seq_len": 32, "seed": 1}, LEARN),
    ({"train.lr": 1e-3, "model.dec_depth": 3}, LEARN),
    ({"index.key": "IVF4,Flat"}, ["index", "knn", "train", "evaluate"]),
    ({"embed.pooling": "cls"}, ["embed", "index", "knn", "train", "evaluate"]),
    ({"chunk_size": 8}, ["chunk", "embed", "index", "knn", *LEARN]),
    ({"tokenizer.vocab_size": 380}, ["tokenizer", "chunk", "embed", "index", "knn", *LEARN]),
]


@pytest.fixture(scope="class")
def changing(project: Project) -> Iterator[Project]:
    """The project, for changes one after the other."""
    yield project
    assert project.repro() == [], "back to the first run, without running anything"


class TestAChange:
    """Each is made in the outputs of the one before: what it does not touch has to come from the run cache."""

    @pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
    def test_it_runs_what_depends_on_it_and_nothing_else(
        self, changing: Project, change: dict[str, object], expected: list[str]
    ) -> None:
        before = (changing.root / "params.yaml").read_bytes()
        changing.set(**change)
        try:
            assert sorted(changing.repro()) == sorted(expected)
        finally:
            (changing.root / "params.yaml").write_bytes(before)


def test_retrieval_is_trained_around_the_frozen_baseline_or_from_new_weights(project: Project) -> None:
    """The default is RETROfit: without neighbors RETRO is the baseline. From scratch is one setting away."""
    found = metrics(project, "evaluate")
    assert found["test_bpb_off"] == found["test_bpb_baseline"] != found["test_bpb_on"]
    before = (project.root / "params.yaml").read_bytes()
    project.set(**{"retrofit.init_from": "models/none"})
    try:
        assert project.repro() == ["train", "evaluate"]
        found = metrics(project, "evaluate")
        assert found["test_bpb_off"] != found["test_bpb_baseline"]
        assert project.repro() == []
    finally:
        (project.root / "params.yaml").write_bytes(before)
        assert project.repro() == []


def test_the_stages_start_several_processes_themselves(project: Project) -> None:
    before = (project.root / "params.yaml").read_bytes()
    runs = len(mlflow_runs(project))
    project.set(**{"train.processes": 2, "train.lr": 3e-3})
    try:
        assert project.repro() == LEARN
        names = [run["name"] for run in mlflow_runs(project)[runs:]]
        assert sorted(names) == sorted(LEARN), "process 0 alone logs"
        project.set(**{"train.processes": 3})
        done = project.run("dvc", "repro", "baseline", check=False)
        assert "baseline: train.batch_size: found 4 in 1 portions, expected a multiple of 3 for 3" in done.stderr
    finally:
        (project.root / "params.yaml").write_bytes(before)
        assert project.repro() == []


def test_a_changed_module_runs_the_stages_that_import_from_its_package(project: Project) -> None:
    file = project.root / "retro_model" / "evaluation" / "report" / "html.py"
    before = file.read_bytes()
    file.write_bytes(before + b"\n# changed\n")
    try:
        assert project.repro() == ["evaluate"]
    finally:
        file.write_bytes(before)
        assert project.repro() == []


def test_dvc_commit_keeps_what_older_code_has_made(project: Project) -> None:
    """After an upgrade `dvc repro` would delete the embeddings and make them again; docs/upgrading.md says this."""
    file = project.root / "retro_model" / "embedding" / "embed.py"
    before, made = file.read_bytes(), locked_hashes(project, "embed")
    file.write_bytes(before + b"\n# the code of a newer version\n")
    try:
        assert "embed:" in project.run("dvc", "status").stdout
        project.run("dvc", "commit", "-f", "embed")
        assert project.repro() == ["evaluate"], "it embeds queries by that code; its outputs are quick to make"
        assert locked_hashes(project, "embed") == made
    finally:
        file.write_bytes(before)
        assert project.repro() == []


def test_the_cache_holds_what_its_names_say(project: Project) -> None:
    """After all stages, training and evaluation included: nothing was written into a cached file."""
    objects = [path for path in (project.root / ".dvc" / "cache" / "files" / "md5").rglob("*") if path.is_file()]
    assert len(objects) > 20
    for path in objects:
        name = path.parent.name + path.name
        assert hashlib.md5(path.read_bytes()).hexdigest() == name.removesuffix(".dir"), path


@pytest.mark.torture  # the clone that is killed at the end of this file has the same hashes, too
def test_two_clones_write_the_same_bytes(project: Project, tmp_path: Path) -> None:
    other = project.clone(tmp_path / "clone")
    (other.root / "dvc.lock").unlink()
    stages = ["tokenizer", "chunk", "embed", "index", "knn"]
    assert other.repro("knn") == stages  # sample is no part of it: these documents are the user's own
    assert locked_hashes(other, *stages) == locked_hashes(project, *stages)


def test_broken_params_stop_with_one_line_and_leave_no_lock_entry(project: Project) -> None:
    lock = (project.root / "dvc.lock").read_bytes()
    params = (project.root / "params.yaml").read_bytes()
    project.set(**{"knn": 99, "evaluate.passages": 1})
    try:
        done = project.run("dvc", "repro", check=False)
        assert done.returncode != 0
        assert "train: knn: found 99, expected at most neighbors.stored = 8" in done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        assert (project.root / "dvc.lock").read_bytes() == lock
        assert not (project.root / "models" / "retro").exists()  # DVC removed it; nothing half-done took its place
    finally:
        (project.root / "params.yaml").write_bytes(params)
        assert project.repro() == []


def test_mlflow_has_a_run_for_each_model_with_the_metrics_of_its_stage(project: Project) -> None:
    runs = mlflow_runs(project)
    whole = [run for run in runs if run["name"] == "evaluate" or "retro.model" in run["tags"]]  # type: ignore[operator]
    assert {run["status"] for run in whole} == {"FINISHED"}
    assert all(run["status"] == "FAILED" for run in runs if run not in whole), "what refuses its settings"
    for stage, name in (("baseline", "baseline"), ("train", "retro")):
        fingerprint = hashlib.sha256((project.root / "models" / name / "artifact.json").read_bytes()).hexdigest()
        (run,) = [run for run in runs if run["tags"].get("retro.model") == fingerprint]  # type: ignore[attr-defined]
        for key, value in metrics(project, stage).items():
            assert run["metrics"][key] == pytest.approx(value), key  # type: ignore[index]
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(run["metrics"])  # type: ignore[call-overload]
        assert run["params"]["train.steps"] == "6"  # type: ignore[index]
        assert run["tags"]["git.commit"] and run["tags"]["input.data/chunks/train"]  # type: ignore[index]
        timings = {name for name in run["metrics"] if name.endswith(".milliseconds_per_query")}  # type: ignore[attr-defined]
        searches = {"index.search.milliseconds_per_query", "knn.search.milliseconds_per_query"}
        assert timings == (searches if stage == "train" else set()), "where they were measured, never in metrics/*.json"
    for key, value in metrics(project, "evaluate").items():  # the newest evaluation, on the model's own run
        assert run["metrics"][key] == pytest.approx(value), key  # type: ignore[index]
    children = [child for child in runs if child["tags"].get("mlflow.parentRunId") == run["id"]]  # type: ignore[attr-defined]
    assert children and all(child["name"] == "evaluate" for child in children)
    artifacts = project.root / "mlartifacts" / str(run["id"]) / "artifacts"
    assert {path.name for path in artifacts.iterdir()} >= {"best", "last", "evaluate"}
    assert list((project.root / "mlartifacts").rglob("models/*/artifacts/model.safetensors"))


def test_what_dvc_shows_is_worth_looking_at(project: Project) -> None:
    table = project.run("dvc", "metrics", "show", "--md").stdout
    assert "test_bpb_on" in table and "valid_loss" in table
    params = (project.root / "params.yaml").read_bytes()
    project.set(**{"evaluate.max_chunks": 20})
    try:
        project.repro()
        assert "test_chunks" in project.run("dvc", "metrics", "diff", "HEAD", "--md").stdout
        assert "evaluate.max_chunks" in project.run("dvc", "params", "diff", "HEAD", "--md").stdout
        project.run("dvc", "plots", "diff", "HEAD")
        page = (project.root / "dvc_plots" / "index.html").read_text()
        for title in ("Validation loss", "Training loss", "What is saved on held-out", "Bits per byte", "nats a token"):
            assert title in page, title
    finally:
        (project.root / "params.yaml").write_bytes(params)
        project.repro()
    assert "flowchart" in project.run("dvc", "dag", "--md").stdout


# ---- experiments -----------------------------------------------------------------------------------


def experiment_rows(project: Project) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(project.run("dvc", "exp", "show", "--csv").stdout)))


def test_experiments_here_in_temporary_checkouts_and_in_the_queue(project: Project, tmp_path: Path) -> None:
    """From one commit, with nothing of the first run committed yet, in values that no other test has tried."""
    fresh = as_after_the_first_run(project, tmp_path / "fresh")
    done = fresh.run("dvc", "exp", "run", "-S", "knn=3", "-n", "here")
    assert sorted(stages_run(done.stdout)) == ["evaluate", "train"]
    done = fresh.run("dvc", "exp", "run", "--temp", "-S", "knn=5", "-n", "temporary")
    assert "Running stage 'train'" in done.stdout and "Running stage 'embed'" not in done.stdout
    fresh.run("dvc", "exp", "run", "-S", "knn=1,4", "-S", "evaluate.passages=1", "--queue")
    fresh.run("dvc", "queue", "start")
    deadline = time.monotonic() + 1500  # it waits for an end, not for speed
    while True:
        status = fresh.run("dvc", "queue", "status").stdout
        if "Queued" not in status and "Running" not in status:
            break
        assert time.monotonic() < deadline, status
        time.sleep(2)
    assert status.count("Success") == 2, status + fresh.run("dvc", "queue", "logs", "--help").stdout
    rows = experiment_rows(fresh)
    tried = {row["knn"] for row in rows if row["Experiment"]}
    assert tried >= {"1", "3", "4", "5"}
    assert all(row["test_bpb_on"] for row in rows if row["Experiment"])
    names = {run["tags"].get("dvc.experiment") for run in mlflow_runs(fresh)}  # type: ignore[attr-defined]
    assert {"here", "temporary"} <= names and len(names - {None}) >= 4  # those of the queue too, in this store


def test_experiments_at_the_same_time_share_what_is_the_same(project: Project, tmp_path: Path) -> None:
    """Two with each seed: their baselines are the same stage, and no evaluation is the same as another."""
    fresh = as_after_the_first_run(project, tmp_path / "fresh")
    fresh.run("dvc", "exp", "run", "-S", "knn=1,4", "-S", "seed=21,22", "--queue")
    fresh.run("dvc", "queue", "start", "-j", "2")
    deadline = time.monotonic() + 1500  # it waits for an end, not for speed
    while "Queued" in (status := fresh.run("dvc", "queue", "status").stdout) or "Running" in status:
        assert time.monotonic() < deadline, status
        time.sleep(5)
    assert status.count("Success") == 4, status
    rows = [row for row in experiment_rows(fresh) if row["Experiment"]]
    assert {(row["knn"], row["seed"]) for row in rows} == {("1", "21"), ("1", "22"), ("4", "21"), ("4", "22")}
    assert len({row["test_bpb_on"] for row in rows}) == 4


def test_the_readme_shows_the_pipeline_as_it_is(project: Project) -> None:
    readme = (project.root / "README.md").read_text()
    params = (project.root / "params.yaml").read_bytes()
    project.set(documents="data/sample")  # the default: with other documents, sample stands alone
    try:
        drawn = project.run("dvc", "dag", "--md").stdout
    finally:
        (project.root / "params.yaml").write_bytes(params)
    edges = set(re.findall(r"(\w+)-->(\w+)", drawn))
    names = dict(re.findall(r'(node\d+)\["([^"]+)"\]', drawn))
    arrows = re.findall(r"^ *(\w+) --> ([\w &]+)$", readme, flags=re.MULTILINE)
    shown = {(name, other) for name, others in arrows for other in others.split(" & ")}
    assert shown == {(names[one], names[other]) for one, other in edges}


# ---- a team ----------------------------------------------------------------------------------------


def readme_program(which: str) -> str:
    """The Python of the README that holds `which`."""
    readme = (ROOT / "README.md").read_text()
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if which in block]
    return str(program)


def test_a_colleague_pulls_everything_and_works_on(project: Project, tmp_path: Path) -> None:
    project.run("dvc", "remote", "add", "-d", "-f", "storage", str(tmp_path / "storage"))
    project.commit("a place for the data")
    project.run("dvc", "push")
    colleague = project.clone(tmp_path / "colleague")
    colleague.run("dvc", "pull")
    for folder in ("data/chunks", "data/embeddings", "data/index", "data/neighbors", "models/baseline", "models/retro"):
        assert any((colleague.root / folder).rglob("artifact.json")), folder
    assert colleague.repro() == []
    assert colleague.repro("--force", "--single-item", "evaluate") == ["evaluate"]
    assert metrics(colleague, "evaluate") == metrics(project, "evaluate")
    assert colleague.run("git", "status", "--porcelain", "metrics", "plots").stdout == ""
    (restored, evaluated) = mlflow_runs(colleague)
    assert restored["name"] == "restored" and evaluated["tags"]["mlflow.parentRunId"] == restored["id"]  # type: ignore[index]
    # The README's program; the tiny encoder is no package, so here its folder has to be named.
    program = readme_program("Retriever.open").replace('open("data")', 'open("data", encoder="tiny/encoder")')
    program = program.replace("max_new_tokens=100", "max_new_tokens=40")
    assert "Return the indices of the largest" in colleague.run("python", "-c", program).stdout
    colleague.set(**{"train.steps": 8})
    assert sorted(colleague.repro()) == sorted(LEARN)


def test_a_machine_that_stops_in_a_stage_loses_nothing(project: Project, tmp_path: Path) -> None:
    """SIGKILL for all that runs, again and again; then the same outputs as if nothing had been.

    Each kill lands at a point of a stage (tests/support/faults), so that it is never DVC that is killed while it
    writes its own files. torture.py has many more.
    """
    other = project.clone(tmp_path / "killed")
    (other.root / "dvc.lock").unlink()
    calm = dict(other.environment)
    for stage, point in (("chunk", 12), ("embed", 9), ("index", 7), ("train", 30)):
        fault = {"stage": stage, "action": "kill everything", "point": point, "folder": str(tmp_path)}
        other.environment |= {
            "PYTHONPATH": str(other.root / "tests" / "support" / "faults"),
            "RETRO_FAULT": json.dumps(fault),
        }
        assert other.run("dvc", "repro", check=False, apart=True).returncode == -signal.SIGKILL
        (tmp_path / "reached").unlink()
    other.environment = calm
    other.repro()
    assert locked_hashes(other, *STAGES[1:]) == locked_hashes(project, *STAGES[1:])
    assert not list(other.root.glob("*/*.partial"))
    shutil.rmtree(other.root)
