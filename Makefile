# make demo: compress the embedded network.   make test: pass the tests.   Both create what they need.
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/.demo
	$(BIN)/transquant demo

test: .venv/.test
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.demo: pyproject.toml constraints.txt | .venv/.made
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo]"
	@touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/.made
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch $@

.venv/.made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'transquant needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Say which to use: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	@touch $@

.PHONY: demo test lint
