# Two commands do all the set-up: `make search` and `make test`. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: search test test-slow lint clean

search: $(VENV)/installed ## install, then run the whole search on scikit-learn's digits
	$(BIN)/llp search digits

test: $(VENV)/tests-installed ## the tests, without the slow ones
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/tests-installed ## the slow tests: minutes, real searches, kills
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/tests-installed ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/tests-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean: ## the environment and what runs left behind; studies stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
