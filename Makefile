# `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test test-gpu lint install clean

# torch first and by itself, so that an index with a CPU build is used for it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	rm -rf $(DEMO)
	$(BIN)/ctflow phantom $(DEMO)/in --shape 48,128,128
	$(BIN)/python app -i $(DEMO)/in/ct -o $(DEMO)/out --overlap 0

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# Types and import direction are house tests: they need the rooms as a wheel lays them out.
test: lint
	$(BIN)/python -m pytest -m "not gpu" --cov --cov-report=term-missing --durations=10

test-gpu: install
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) $(DEMO) build dist src/*.egg-info
