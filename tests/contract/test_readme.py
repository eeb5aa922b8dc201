"""What the README says is so; its commands run in test_pipeline.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import tiny_corpus, tiny_encoder

from stages.common.params import read_yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_network_in_ten_lines_runs() -> None:
    (program,) = [
        block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "torch.randint" in block
    ]
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(loss.item())"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 9.0 < float(done.stdout) < 11.0  # ln 20,000 = 9.9


def test_the_functions_over_raw_files_run(tmp_path: Path) -> None:
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "knn_" in block]
    tiny_corpus(tmp_path / "texts", num_documents=6)
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(*seq.shape, *retrieved.shape, (retrieved > 0).any())"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RETRO_BERT": str(tiny_encoder(tmp_path / "bert"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "513 8 2 128 tensor(True)"


def test_the_wrapper_trains_and_writes(tmp_path: Path) -> None:
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "Wrapper" in block]
    tiny_corpus(tmp_path / "texts", num_documents=6)
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(loss.item())"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RETRO_BERT": str(tiny_encoder(tmp_path / "bert"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.splitlines()[-1]) < 10


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, flags=re.MULTILINE))))
def test_the_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_public_name_loads() -> None:
    import retro_model

    assert sorted(retro_model._PUBLIC) == sorted(retro_model.__all__)
    for name in retro_model.__all__:
        assert getattr(retro_model, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'; it has "):
        _ = retro_model.Nothing


def test_the_params_that_it_names_exist() -> None:
    params = read_yaml(ROOT / "params.yaml")
    named = re.findall(r"`([a-z]+\.[a-z_]+)`", README) + re.findall(r"-S '?([a-z._]+)=", README)
    named = [name for name in named if name.split(".")[0] in params]
    assert len(named) >= 5
    for name in named:
        section, _, key = name.partition(".")
        assert section in params and (not key or key in params[section]), name


def test_the_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_section_of_params_is_in_the_table_of_what_runs_again() -> None:
    table = README[README.index("| you change | runs again |") :].split("\n\n")[0]
    for name in read_yaml(ROOT / "params.yaml"):
        assert name == "sample" or f"`{name}`" in table, name
