# Every target sets up what it needs: make test, make demo, make bench, make lint, make format.
#
# PYTHON      the interpreter that .venv is made with        make test PYTHON=python3.12
# PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS   options handed on     make bench BENCH_ARGS="--dtype float32"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DELETE_ON_ERROR:
.PHONY: test lint pytest format demo bench clean

# Side by side: to check types takes one core for as long as the tests' workers start.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 lint pytest

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "some files are not formatted: run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy

pytest: $(READY)
	@$(BIN)/python -m pytest --quiet --numprocesses auto --dist worksteal $(PYTEST_ARGS)

format: $(READY)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

demo: $(READY)
	@$(BIN)/python examples/quickstart.py $(DEMO_ARGS)

bench: $(READY)
	@$(BIN)/python benchmarks/prefill.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp is younger than everything that the environment was made from. pip's own words go to a log: what
# a reader needs of them is the last line. Python compiles what is imported; pip compiling all of torch's files would
# take as long as the rest.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "needs Python 3.10 or newer, found $$($(PYTHON) --version); try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes, most of them for torch)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --no-compile --retries 1 --constraint constraints.txt --editable '.[test]' \
		> $(VENV)/install.log 2>&1 \
	|| { echo "could not set up $(VENV), is there no network?" \
		"$$(sed -n 's/^ *ERROR: //p' $(VENV)/install.log | tail -1) (log: $(VENV)/install.log)" >&2; exit 1; }
	@touch $(READY)
