# Two commands do everything on a fresh machine: `make demo` and `make test`. See CONTRIBUTING.md for the rest.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PYTHON3 ?= python3
export DEMAND_PORT_PYTHON := $(abspath $(PYTHON))
export PYTHONPATH := $(abspath python)

.PHONY: demo test check test-python test-elixir bench bench-inference soak clean setup

demo: setup
	MODEL="$(or $(MODEL),tiny)" $(if $(PROMPT),PROMPT="$(PROMPT)") mix run examples/demo.exs

test: setup test-python test-elixir

test-python: setup
	$(PYTHON) -m pytest

test-elixir: setup
	MIX_ENV=test mix do compile --warnings-as-errors, test

check: setup
	$(VENV)/bin/ruff check --no-cache python tests bench tools examples
	$(VENV)/bin/ruff format --check python tests bench tools examples
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	mix format --check-formatted
	mix do compile --warnings-as-errors, xref graph --format cycles --fail-above 0

bench: setup
	$(PYTHON) bench/run.py

# Beside llama-server too where LLAMA_SERVER names one.
bench-inference: setup
	$(PYTHON) bench/inference.py

# Tests that count rounds, with many more of them: faults, properties, a real BEAM.
soak: setup
	DEMANDPORT_SOAK=1 $(PYTHON) -m pytest tests/faults tests/property tests/interop

setup: $(VENV)/.installed .elixir-found

# llama-cpp-python is published as source only: the first install compiles it for about five minutes.
$(VENV)/.installed: pyproject.toml tools/setup.sh
	@PYTHON3="$(PYTHON3)" bash tools/setup.sh python $(VENV)
	@touch $@

.PHONY: .elixir-found
.elixir-found:
	@bash tools/setup.sh elixir

clean:
	rm -rf $(VENV) _build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
