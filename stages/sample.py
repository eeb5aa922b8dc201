"""Writes data/sample: docstrings of installed Python modules, as documents for a first run without a network."""

from pathlib import Path

from retro_model.sample import write_sample
from stages.common.harness import run_stage
from stages.common.params import read_params


def main() -> None:
    """Writes the sample documents."""
    params = read_params("sample")
    write_sample(Path("data/sample"), params.sample)


if __name__ == "__main__":
    run_stage("sample", main)
