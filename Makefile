# Each target makes the environment (.venv) first if it is not there or its pins have changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CORES ?= all

.PHONY: venv run test test-all lint docs clean

venv: .venv/ready

.venv/ready: requirements.txt requirements-without-dependencies.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11 venv")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements-without-dependencies.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

run: venv   ## the whole workflow at the embedded default; continues where an interrupted run stopped
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES)

test: venv  ## the fast tests, in two processes of one thread each: on few cores, more threads wait for each other
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not ci" -n 2

test-all: venv  ## all tests, with whole runs of the workflow
	$(BIN)/pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

docs: .venv/docs-ready  ## the documentation, in build/site; a broken link or a page outside the navigation fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv/docs-ready: .venv/ready docs/requirements.txt
	$(BIN)/pip install --quiet --requirement docs/requirements.txt
	touch $@

clean:  ## everything that was made, the environment included
	rm -rf .venv results build .snakemake *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
