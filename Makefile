# Two commands do everything: `make train` and `make test`; both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests wait for XLA's compiler, which keeps one core busy in each of these processes.
WORKERS ?= 2

.PHONY: install train test lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,data,tfds,notebooks,dev]'
	touch $@

train: install  ## a tiny GPT on Shakespeare with Sophia-G, in under two minutes
	$(BIN)/python -m train

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: install  ## the tables that the README quotes
	$(BIN)/python -m benchmarks.update_cost
	$(BIN)/python -m benchmarks.matrix_cost
	$(BIN)/python -m benchmarks.estimator_variance
	$(BIN)/python -m benchmarks.curvature_cost
	$(BIN)/python -m benchmarks.scaling

clean:
	rm -rf $(VENV) runs build *.egg-info
