# The commands of a working day. Everything is installed into .venv, at the versions of constraints.txt;
# `make CONSTRAINTS= ...` takes the newest versions that pyproject.toml admits instead.

PYTHON      ?= $(firstword $(shell command -v python3.11) $(shell command -v python3) python3)
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= auto
OUT         ?= demo
PYTEST_ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check -qq install $(addprefix --constraint ,$(CONSTRAINTS))
SPEC  := pyproject.toml hooked_vlm/version.py $(CONSTRAINTS)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint format dev clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(STAMP)-run  ## trace the embedded model on an embedded picture, into ./demo
	$(BIN)/hooked-vlm trace --out $(OUT)

test: $(STAMP)-test  ## run the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

test-full: $(STAMP)-test $(STAMP)-quantization  ## run all tests, those at full size too (one process: they need the memory)
	$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

lint: $(STAMP)-lint  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)-lint  ## mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dev: $(STAMP)-dev  ## install everything for development, and the pre-commit hook
	$(BIN)/pre-commit install

clean:  ## remove the environment and all that was made
	rm -rf $(VENV) $(OUT) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hooked_vlm weights_conversion tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# One stamp for each set of requirements. A stamp is touched only after its installation succeeded.
$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; try make PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(STAMP)-run: $(STAMP)-venv $(SPEC)
	@echo "installing hooked-vlm into $(VENV) (torch among it; this takes some minutes once)"
	$(PIP) --editable .
	@touch $@

$(STAMP)-%: $(STAMP)-venv $(SPEC)
	@echo "installing hooked-vlm into $(VENV), with what '$*' needs (torch among it; this takes some minutes once)"
	$(PIP) --editable '.[$*]'
	@touch $@
