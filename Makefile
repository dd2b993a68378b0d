# Everything a new machine needs is Python 3.11, make, a C++ compiler and the package registries.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-fast matrix check format benchmarks assets tables clean help

help:           ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), sys.version' \
	  || { echo "raypeft needs Python 3.11 to 3.13; $(PYTHON) is another. Say: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "This Python cannot make virtual environments. On Debian: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

quickstart: $(READY)    ## train, gate, register, deploy and ask, on the embedded data
	$(BIN)/raypeft run jobs/quickstart.yaml

test: $(READY)          ## all tests but the full matrix
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not matrix"; first=$$?; \
	  $(BIN)/python -m pytest -m "ray and not matrix" && exit $$first

test-fast: $(READY)     ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not ray and not matrix"

matrix: $(READY)        ## every method x ZeRO stage x storage, a quarter of an hour; writes docs/methods.md
	$(BIN)/python -m tests.matrix
	$(BIN)/python -m tests.contract.methods_table
	$(BIN)/python -m pytest -m matrix

check: $(READY)         ## style, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)        ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(READY)    ## the claims of speed and memory, each beside its peer
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

tables: $(READY)        ## write docs/methods.md anew, by running every method
	$(BIN)/python -m tests.contract.methods_table

assets: $(READY)        ## rebuild the embedded base, tokenizer and data
	$(BIN)/python jobs/assets/build.py all

clean:          ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
