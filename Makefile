# Two commands do everything: `make train` and `make test`; both install first.
PYTHON ?= python3
# Versions: constraints.txt for the oldest JAX that is supported, constraints-newest.txt for the
# newest, which needs Python 3.12 or later. Each has an environment: .venv, .venv-newest.
CONSTRAINTS ?= constraints.txt
VENV := .venv$(patsubst constraints%.txt,%,$(notdir $(CONSTRAINTS)))
BIN := $(VENV)/bin
# Tests wait for XLA's compiler, which keeps one core busy in each of these processes.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: install train test test-newest lint bench clean

install: $(VENV)/.installed
	@test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || { echo "error: $(VENV) has" \
	    "$$($(BIN)/python -V), but PYTHON=$(PYTHON) is $$($(PYTHON) -V): set PYTHON" \
	    "to the one that made it, or rm -r $(VENV)"; exit 1; }

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[train,data,tfds,notebooks,dev]'
	touch $@

train: install  ## a tiny GPT on Shakespeare with Sophia-G, in under two minutes
	$(BIN)/python -m train

test: install
	$(PYTEST)

test-newest: install  ## what depends most on JAX's version; set PYTHON and CONSTRAINTS too
	$(PYTEST) -m 'newest and not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: install  ## the tables of README.md and docs/results.md
	$(BIN)/python -m benchmarks.update_cost
	$(BIN)/python -m benchmarks.matrix_cost
	$(BIN)/python -m benchmarks.estimator_variance
	$(BIN)/python -m benchmarks.curvature_cost
	$(BIN)/python -m benchmarks.scaling

clean:
	rm -rf .venv .venv-* runs build *.egg-info
