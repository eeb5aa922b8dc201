"""The pipeline as a user runs it: real `dvc repro`, `dvc exp run`, `dvc push` and `dvc pull` in a fresh repository.

Slow: each stage is a process of its own, and most of its time goes into imports. So everything runs once, and after
that a test runs as few stages as show what it is about. What the stages write is tested in test_stages.py.

The first run and most tests have DVC link the workspace to its cache by hard links, two have symbolic links, and the
experiments have copies, DVC's default: with links, a write into an input would be a write into the cache.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import time
import warnings
from pathlib import Path

import pytest
from paths import ROOT
from project import Project, stages_run
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow

STAGES = ["sample", "tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which everything has run, with hard links, and is committed."""
    project = Project.create(tmp_path_factory.mktemp("project"))
    project.run("dvc", "config", "--local", "cache.type", "hardlink")
    assert sorted(project.repro()) == sorted(STAGES)
    check_cache(project, "hardlink")
    project.commit("first run")
    return project


def link(project: Project, kind: str) -> None:
    """Makes the workspace's files links of that kind to DVC's cache, now and from now on."""
    project.run("dvc", "config", "--local", "cache.type", kind)
    project.run("dvc", "checkout", "--relink")


def copy_of(project: Project, root: Path) -> Project:
    """A copy of the project, in which MLflow's store begins anew and no work is left over."""
    ignored = shutil.ignore_patterns("mlflow.db", "mlartifacts", ".retro")
    return Project(Path(shutil.copytree(project.root, root, symlinks=True, ignore=ignored)))


def as_after_the_first_run(project: Project, root: Path) -> Project:
    """A copy in which the first run is not committed yet; files are copies of those in the cache."""
    copy = copy_of(project, root)
    copy.run("dvc", "config", "--local", "--unset", "cache.type")
    copy.run("git", "reset", "-q", copy.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.strip())
    assert copy.repro() == []
    return copy


def check_cache(project: Project, kind: str) -> None:
    """Every object of the cache has the hash that its name says, and the workspace does link to them."""
    objects = [path for path in (project.root / ".dvc" / "cache" / "files" / "md5").rglob("*") if path.is_file()]
    assert len(objects) > 20
    for path in objects:
        name = path.parent.name + path.name
        assert hashlib.md5(path.read_bytes()).hexdigest() == name.removesuffix(".dir"), path
    weights = project.root / "models" / "retro" / "model.safetensors"
    assert weights.is_symlink() if kind == "symlink" else weights.stat().st_nlink > 1


def would_run(project: Project) -> list[str]:
    """The stages that `dvc repro` would run, in order, where each writes something new: `--dry --force-downstream`.

    Asked in this process, because the command takes seconds to start.
    """
    from dvc.repo import Repo

    before = os.getcwd()
    os.chdir(project.root)  # DVC looks for what it has run from there
    try:
        with warnings.catch_warnings(), Repo() as repo:
            warnings.simplefilter("ignore")  # DVC's own
            return [stage.name for stage in repo.reproduce(dry=True, force_downstream=True)]
    finally:
        os.chdir(before)


def metrics(project: Project, stage: str) -> dict[str, float]:
    content: dict[str, float] = json.loads((project.root / "metrics" / f"{stage}.json").read_text())
    return content


def locked_hashes(project: Project, *stages: str) -> dict[str, str]:
    """The hash of each stage's outputs, as dvc.lock has them."""
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
    ({"retrofit.init_from": "models/none"}, ["train", "evaluate"]),
    ({"retrofit.enc_dim": 64, "retrofit.cross_attn_layers": [2], "retrofit.heads": 2}, ["train", "evaluate"]),
    ({"neighbors.stored": 6}, ["knn", "train", "evaluate"]),
    ({"seq_len": 32, "seed": 1}, LEARN),
    ({"train.lr": 1e-3, "model.dec_depth": 3}, LEARN),
    ({"train.processes": 2}, LEARN),
    ({"index.key": "IVF2,Flat"}, ["index", "knn", "train", "evaluate"]),
    ({"embed.pooling": "cls"}, ["embed", "index", "knn", "train", "evaluate"]),
    ({"chunk_size": 8}, ["chunk", "embed", "index", "knn", *LEARN]),
    ({"retrofit.base": "tiny/base"}, ["tokenizer", "chunk", "embed", "index", "knn", *LEARN]),
    ({"tokenizer.vocab_size": 380}, ["tokenizer", "chunk", "embed", "index", "knn", *LEARN]),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_a_change_runs_what_depends_on_it_and_nothing_else(
    project: Project, change: dict[str, object], expected: list[str]
) -> None:
    before = (project.root / "params.yaml").read_bytes()
    project.set(**change)
    try:
        assert sorted(would_run(project)) == sorted(expected)
    finally:
        (project.root / "params.yaml").write_bytes(before)


def test_a_changed_index_is_built_and_all_that_depends_on_it_is_made_from_links(project: Project) -> None:
    """One change for real, with symbolic links; back again, everything comes from the run cache."""
    before = (project.root / "params.yaml").read_bytes()
    link(project, "symlink")
    project.set(**{"index.key": "IVF4,Flat"})
    try:
        assert project.repro() == ["index", "knn", "train", "evaluate"]
        check_cache(project, "symlink")
    finally:
        (project.root / "params.yaml").write_bytes(before)
        link(project, "hardlink")
        assert project.repro() == [], "back to the first run, without running anything"


def test_a_changed_module_runs_the_stages_that_import_from_its_package(project: Project) -> None:
    file = project.root / "retro_model" / "evaluation" / "report" / "html.py"
    before = file.read_bytes()
    file.write_bytes(before + b"\n# changed\n")
    try:
        assert would_run(project) == ["evaluate"]
    finally:
        file.write_bytes(before)


def test_dvc_commit_keeps_what_older_code_has_made(project: Project) -> None:
    """After an upgrade `dvc repro` would delete the embeddings and make them again; docs/upgrading.md says this."""
    file = project.root / "retro_model" / "embedding" / "embed.py"
    before, made = file.read_bytes(), locked_hashes(project, "embed")
    file.write_bytes(before + b"\n# the code of a newer version\n")
    try:
        assert "embed:" in project.run("dvc", "status").stdout
        project.run("dvc", "commit", "-f", "embed")
        assert would_run(project) == ["evaluate"], "it embeds queries by that code; its outputs are quick to make"
        assert locked_hashes(project, "embed") == made
    finally:
        file.write_bytes(before)
        assert project.repro() == []


@pytest.mark.torture  # test_stages.py has every stage write the same bytes again, without DVC
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


def test_experiments_here_and_two_at_a_time_in_the_queue(project: Project, tmp_path: Path) -> None:
    """From one commit, with nothing of the first run committed yet, in values that no other test has tried.

    The two of the queue have one seed: their baselines are the same stage, and their evaluations are not.
    """
    fresh = as_after_the_first_run(project, tmp_path / "fresh")
    done = fresh.run("dvc", "exp", "run", "-S", "knn=3", "-n", "here")
    assert sorted(stages_run(done.stdout)) == ["evaluate", "train"]
    fresh.run("dvc", "exp", "run", "-S", "knn=1,4", "-S", "seed=21", "--queue")
    fresh.run("dvc", "queue", "start", "-j", "2")
    deadline = time.monotonic() + 1500  # it waits for an end, not for speed
    while "Queued" in (status := fresh.run("dvc", "queue", "status").stdout) or "Running" in status:
        assert time.monotonic() < deadline, status
        time.sleep(5)
    assert status.count("Success") == 2, status
    rows = [row for row in experiment_rows(fresh) if row["Experiment"]]
    queued = {(row["knn"], row["seed"]) for row in rows if row["Experiment"] != "here"}
    assert queued == {("1", "21"), ("4", "21")}
    assert len(rows) == len({row["test_bpb_on"] for row in rows}) == 3
    names = {run["tags"].get("dvc.experiment") for run in mlflow_runs(fresh)}  # type: ignore[attr-defined]
    assert {row["Experiment"] for row in rows} <= names, "those of the queue too, in this store"


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
    colleague.run("dvc", "config", "--local", "cache.type", "symlink")
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
    check_cache(colleague, "symlink")
    colleague.set(**{"train.steps": 8})
    assert sorted(would_run(colleague)) == sorted(LEARN)


def forget(project: Project, *stages: str) -> None:
    """Makes DVC run these stages again, as if it never had."""
    yaml, file = YAML(), project.root / "dvc.lock"
    lock = yaml.load(file)
    for stage in stages:
        del lock["stages"][stage]
    with file.open("w") as stream:
        yaml.dump(lock, stream)
    shutil.rmtree(project.root / ".dvc" / "cache" / "runs")


def test_a_machine_that_stops_in_a_stage_loses_nothing(project: Project, tmp_path: Path) -> None:
    """SIGKILL for all that runs, in a stage of the data and in one that trains; then the same outputs as before.

    Each kill lands at a point of a stage (tests/support/faults), so that it is never DVC that is killed while it
    writes its own files. torture.py has many more.
    """
    other = copy_of(project, tmp_path / "killed")
    forget(other, "embed", "train")
    calm = dict(other.environment)
    for stage, point in (("embed", 9), ("train", 30)):
        fault = {"stage": stage, "action": "kill everything", "point": point, "folder": str(tmp_path)}
        other.environment |= {
            "PYTHONPATH": str(other.root / "tests" / "support" / "faults"),
            "RETRO_FAULT": json.dumps(fault),
        }
        assert other.run("dvc", "repro", check=False, apart=True).returncode == -signal.SIGKILL
        (tmp_path / "reached").unlink()
    other.environment = calm
    assert other.repro() == ["train"], "embed ended in the second run, and nothing after it has changed"
    assert locked_hashes(other, *STAGES[1:]) == locked_hashes(project, *STAGES[1:])
    assert not list(other.root.glob("*/*.partial"))


# ---- last, because it breaks the project -----------------------------------------------------------


def test_no_stage_has_written_into_a_cached_file(project: Project) -> None:
    """After all of the above; and it would be seen: one byte of an input, written in place."""
    check_cache(project, "hardlink")
    path = project.root / "data" / "chunks" / "train" / "tokens-00000.npy"
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    with pytest.raises(AssertionError):
        check_cache(project, "hardlink")
