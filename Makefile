# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check bench-core system clean

demo: $(INSTALLED) system
	$(BIN)/jepa demo dir=runs/demo

test: $(INSTALLED) system
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# One pretraining step against transformers' layers, and against a reference checkout: make bench-core ARGS="--reference PATH"
bench-core: $(INSTALLED)
	$(BIN)/python tests/bench/bench_core.py $(ARGS)

# Headless OpenGL for the simulated robot; says what to install where it cannot do so itself.
system: $(INSTALLED)
	@infra/system-packages $(BIN)/python

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: apt-get install python3.11 python3.11-venv, or set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .import_linter_cache
