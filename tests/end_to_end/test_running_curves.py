"""DVC draws the curves of a training that still runs; the training is a stand-in that writes as the trainer does."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from project import Project
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow

STAND_IN = """
import time
from pathlib import Path
from retro_model.core.artifacts import write_csv

rows = [{"step": 400, "valid_bits_per_byte": 1.25}, {"step": 800, "valid_bits_per_byte": 1.125}]
write_csv(Path("plots/train.csv"), rows)
while not Path("go-on").exists():
    time.sleep(0.1)
"""


def test_dvc_draws_a_training_that_still_runs(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.environment["PYTHONPATH"] = str(ROOT)
    declared = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["train"]["plots"]
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    with (tmp_path / "dvc.yaml").open("w") as stream:
        YAML().dump({"stages": {"train": {"cmd": "python stand_in.py", "plots": declared}}}, stream)
    for command in ("git init -q", "dvc init -q"):
        project.run(*command.split())
    training = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"], cwd=tmp_path, env=project.environment, stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "plots/train.csv").exists():
            assert training.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        project.run("dvc", "plots", "show")
        assert training.poll() is None, "it still runs"
        assert "1.125" in (tmp_path / "dvc_plots/index.html").read_text()
    finally:
        (tmp_path / "go-on").touch()
        assert training.wait(300) == 0
