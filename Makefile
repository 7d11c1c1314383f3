# `make run` and `make test` need Python 3.11 or newer, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: run plan test check lint deps docs lock clean help

help:  ## show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"winnow needs Python 3.11 or newer, and this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV) (4.3 GB to download, 8.3 GB on the disk with CUDA's libraries; 3.5 minutes on a fast line)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# The lock names every package: without --no-deps, pip 23 may resolve `package[extra]` to a release that the lock does not hold.
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

run: $(STAMP)  ## the whole job of params.yaml: by default on scenes that winnow draws
	@python -m pipeline check
	@python -m pipeline scan
	-@python -m flows plan --save .scratch/plan.json
	WINNOW_PLAN=.scratch/plan.json dvc repro
	@python -m pipeline.tracking flush
	@python -m pipeline.stages.compare --show data/compare/results

plan: $(STAMP)  ## what `make run` would do now, why, and for how long; ARGS="--images 14_000_000 --val 50_000 --params FILE" before there are data
	@python -m pipeline check
	@$(if $(findstring --images,$(ARGS)),:,python -m pipeline scan)
	@python -m flows plan $(ARGS)

test: $(STAMP) lint  ## check, and all other tests: the whole DAG on tiny images, Prefect, kills (two processes)
	python -m pytest -n 2

check: $(STAMP) lint  ## lint, types, import contract, unit tests: what to run before each commit
	python -m pytest -n 2 -m "not whole and not flows" --ignore tests/flows

lint: $(STAMP)  ## ruff, mypy, import-linter
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

deps: $(STAMP)  ## write the code that each stage depends on into dvc.yaml
	python -m tests.deps

docs: run  ## write the demo's table in docs/results.md anew, from a run of params.yaml at the last commit
	python -m benchmarks.docs --run data/compare/results

lock:  ## write requirements.lock anew from pyproject.toml
	$(BIN)/python -m pip install -q uv
	uv pip compile --universal --python-version 3.11 --generate-hashes --extra train --extra dev --no-header -o requirements.lock pyproject.toml

clean:  ## remove what runs have made, but not the environment and not DVC's cache
	rm -rf .scratch $(addprefix data/,draw prepare search dedup pretrain teach ensemble score select pack label distil self_distil evaluate export compare live)
