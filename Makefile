# Everything lives in .venv; a stamp file keeps set-up from being repeated.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two workers, one thread each: more threads only wait for each other on small tensors.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# `make test SELECT=slow` runs only what `make check` leaves out.
SELECT ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types fast clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed  ## Quantize the embedded model three ways, compare, write a report
	$(BIN)/lowbit demo --out demo-out --overwrite

test: $(VENV)/.installed-dev  ## Run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(if $(SELECT),-m $(SELECT))

check: lint types fast  ## Lint, type check, and the fast tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

fast: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

clean:  ## Remove what make made
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .pytest_cache

-include engines.mk
