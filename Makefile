# make repro   set up and run the whole pipeline        make test   set up and run all tests
# make help    everything else

# The first Python from 3.10 to 3.12 that answers; or say `make PYTHON=/path/to/python ...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$python; break; }; done)

# A pip that fails must not look like the grep behind it that does not.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
INSTALLED := $(VENV)/installed
# The tests of a file share what they need, so a file is one process's; more than four fill memory, not cores.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist loadfile
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help repro install test test-fast torture coverage bench check lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

repro: install  ## run what has changed of the pipeline, from documents to the evaluation report
	dvc repro
	@python -m stages.summary

install: $(INSTALLED) $(if $(GPU),$(INSTALLED)-gpu)  ## make .venv, install the locked dependencies (GPU=1: faiss for CUDA 12)

# The lock is for several Pythons; pip's lines about what it has for the others would be all that one sees first.
$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "retro needs Python 3.10, 3.11 or 3.12; name one: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing the locked dependencies (2 to 3 minutes, a little over 2 GB; several more with torch for CUDA)"
	python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock \
		| grep -v --line-buffered '^Ignoring .*: markers'
	python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

# faiss-cpu and faiss-gpu own the same folder, so one has to go before the other comes.
$(INSTALLED)-gpu: $(INSTALLED)
	python -m pip uninstall --disable-pip-version-check -q -y faiss-cpu
	python -m pip install --disable-pip-version-check --progress-bar off faiss-gpu-cu12==1.12.0 numpy==$$(sed -n 's/^numpy==//p' requirements.lock)
	@touch $@

test: install  ## the tests, none of which needs a GPU, the fast ones first
	python $(PYTEST) -m "not slow"
	python $(PYTEST) -m "slow and not torture" --durations 20

test-fast: install  ## the inner loop
	python $(PYTEST) -m "not slow" -x -q

torture: install  ## repeats of tests at more places, then a hundred faults, none of which may be lost (over half an hour)
	python $(PYTEST) -m torture
	python tests/end_to_end/torture.py

coverage: install  ## the same tests, with the lines and branches that they run; at least 90% of them
	coverage erase
	coverage run $(PYTEST) -m "not slow"
	coverage run $(PYTEST) -m "slow and not torture"
	coverage combine -q
	coverage report

bench: install  ## all benchmarks beside retro-pytorch and their limits, as one table (about an hour)
	dvc repro knn
	python benchmarks/run_all.py

check: install  ## formatter, linter, types, who imports whom
	ruff format --check .
	ruff check .
	mypy retro_model stages
	lint-imports

lock: install  ## resolve pyproject.toml anew into requirements.lock
	python -m pip install -q uv
	@echo "# The versions that the tests ran with, for Python 3.10 - 3.12. Written by 'make lock'; do not edit." > requirements.lock.partial
	# torch brings the CUDA packages that its build wants, so that the lock need not name them.
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --fork-strategy requires-python \
		--no-header --no-annotate --quiet \
		| grep -v -E '^(nvidia-|cuda-|triton=)' | sed 's/+cpu//' >> requirements.lock.partial
	mv requirements.lock.partial requirements.lock

clean:  ## remove work in progress (not: data, models, the DVC cache, MLflow's runs)
	rm -rf .retro dvc_plots .coverage .coverage.* .pytest_cache .hypothesis .ruff_cache .mypy_cache
