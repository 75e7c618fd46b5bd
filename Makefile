# make demo   set up, then run recipes/quickstart.yaml: pretrain, LoRA, reward model, PPO, evaluation
# make test   set up, then lint, type-check and test
# make models set up, then download and convert the real models that some tests and recipes use
# make test-cluster  tests on several hosts, which are namespaces of this machine; needs root and iproute2
# make setup  the virtual environment in .venv alone
# make setup-vllm  vLLM's environment in .venv-vllm, for rollout.engine: {name: vllm} without a GPU
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
VLLM := .venv-vllm
#: torch's builds without CUDA lie in an index of their own.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
JOBS ?= 2
#: Some images set it; then each of the tests' many processes compiles the sources once more. Empty is unset.
export PYTHONDONTWRITEBYTECODE :=
#: Folders with tests that have the machine for themselves; collecting the others again takes as long as some of these tests.
ALONE := tests/e2e tests/faults/run tests/gpu tests/integration/cluster

.PHONY: demo models test test-long test-cluster lint setup setup-vllm clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make setup: needs Python 3.11 or newer: apt-get install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make setup: $(PYTHON) lacks venv: apt-get install $$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info.minor)')"; exit 2; }
	@start=$$(date +%s); set -e; \
	$(PYTHON) -m venv .venv; \
	pip="$(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt"; \
	echo "setup: torch"; $$pip torch==2.13.0; \
	echo "setup: deepspeed"; $$pip setuptools wheel numpy; $$pip --no-build-isolation deepspeed; \
	echo "setup: the rest"; $$pip --no-build-isolation -e '.[dev]'; \
	touch $(READY); echo "setup: ready in $$(( $$(date +%s) - start )) s (.venv)"

setup-vllm: $(VLLM)/.ready

$(VLLM)/.ready: constraints-vllm.txt
	@start=$$(date +%s); set -e; \
	$(PYTHON) -m venv $(VLLM); \
	pip="$(VLLM)/bin/pip --disable-pip-version-check install --quiet --no-deps"; \
	echo "setup: torch"; $$pip --extra-index-url $(TORCH_INDEX) $$(grep ^torch== constraints-vllm.txt); \
	echo "setup: vllm"; $$pip -r constraints-vllm.txt; \
	touch $@; echo "setup: ready in $$(( $$(date +%s) - start )) s ($(VLLM))"

demo: setup
	$(BIN)/trainwright run recipes/quickstart.yaml

models: setup
	$(BIN)/python tests/real_models.py $(if $(OPTIONAL),--optional)

lint: setup
	$(BIN)/pre-commit validate-config
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

#: In the order of the folders long files come first, and the many short ones of tests/unit fill what is left.
test: lint
	$(BIN)/python -m pytest -q -m "not long and not serial" -n $(JOBS) --dist loadfile --no-loadscope-reorder tests
	$(BIN)/python -m pytest -q -m "serial and not long" $(ALONE)

test-long: setup
	$(BIN)/python -m pytest -q -m long tests

test-cluster: setup
	$(BIN)/python -m pytest -q -m long tests/cluster

clean:
	rm -rf .venv $(VLLM) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
