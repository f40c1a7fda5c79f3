# Two commands do everything on a fresh machine: `make demo` and `make test`. See CONTRIBUTING.md for the rest.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PYTHON3 ?= python3
export DEMAND_PORT_PYTHON := $(abspath $(PYTHON))
export PYTHONPATH := $(abspath python)

.PHONY: demo test check dialyzer test-python test-elixir bench bench-codec bench-faults bench-inference soak clean setup

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

# The types of the compiled Elixir modules. What Erlang and Elixir themselves are is found out once, in some minutes.
PLT := _build/plt/demand_port.plt
DIALYZER = ERL_LIBS=$$(elixir -e 'IO.puts(Path.dirname(:code.lib_dir(:elixir)))') dialyzer

dialyzer: .elixir-found $(PLT)
	MIX_ENV=dev mix compile --warnings-as-errors
	$(DIALYZER) --plt $(PLT) _build/dev/lib/demand_port/ebin

$(PLT):
	@command -v dialyzer >/dev/null || { echo "dialyzer is missing (Debian: apt-get install erlang-dialyzer)" >&2; exit 1; }
	@mkdir -p $(@D)
	$(DIALYZER) --build_plt --quiet --output_plt $@ --apps erts kernel stdlib crypto compiler elixir logger mix ex_unit eex || [ $$? = 2 ]

bench: setup
	$(PYTHON) bench/run.py

# Beside Msgpax too where MSGPAX_EBIN names its compiled modules.
bench-codec: .elixir-found
	mix run bench/codec.exs

# How soon kills, cancels and malformed frames are over.
bench-faults: setup
	$(PYTHON) bench/faults.py

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
