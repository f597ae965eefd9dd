# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg

.PHONY: help demo test test-all parity-adapters lint type contracts docs bench wheel clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(DEV): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY) ## fine-tune a real language model in minutes, and see the difference
	$(BIN)/deltatune quickstart

test: $(DEV) ## the tests, in minutes
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow" --durations=15

test-all: $(DEV) ## the tests and the slow ones: real models, killed runs
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --durations=15

parity-adapters: $(DEV) ## AdapterHub's `adapters` in an environment of its own: save anew what the tests read, and test
	rm -rf build/adapters tests/parity/adapters_saved && $(PYTHON) -m venv build/adapters
	build/adapters/bin/pip install -q "torch==2.13.0" "adapters==1.3.*"
	$(TEST_ENV) build/adapters/bin/python tests/parity/adapters_library.py tests/parity/adapters_saved
	$(TEST_ENV) $(BIN)/python -m pytest tests/parity/test_adapters_library.py

lint: $(DEV) ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: $(DEV) ## types
	$(BIN)/mypy

contracts: $(DEV) ## who may import whom
	$(BIN)/lint-imports

docs: $(DEV) ## build the documentation into site/
	$(BIN)/mkdocs build --strict -q

DATA ?= alpaca_en_demo.json
BENCH = training.py:--data:$(DATA) training.py:--data:$(DATA):--only:methods parts.py:--data:$(DATA) \
        curves.py:--data:$(DATA) shares.py adapter_drop.py overhead.py switching.py

bench: $(DEV) ## speed and memory against PEFT, on an otherwise idle machine, into build/bench.md: DATA=alpaca.json
	test -f $(DATA) || { echo "$(DATA): no such file; give rows in alpaca's format: make bench DATA=alpaca.json"; exit 2; }
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,bench]"
	mkdir -p build && : > build/bench.md
	set -e; for run in $(BENCH); do \
	  printf '\n`%s`\n\n' "$$run" | tr : ' ' | tee -a build/bench.md; \
	  HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/$$(echo $$run | tr : ' ') > build/bench.part; \
	  tee -a build/bench.md < build/bench.part; done

wheel: $(DEV) ## build the wheel, install it into a bare environment, and use it there
	rm -rf dist build && $(BIN)/python -m build -q --wheel
	rm -rf build/bare && $(PYTHON) -m venv build/bare
	build/bare/bin/pip install -q -c constraints.txt "torch==2.13.0"
	build/bare/bin/pip install -q -c constraints.txt dist/*.whl
	$(TEST_ENV) build/bare/bin/python tests/wheel_smoke.py build/bare/bin/deltatune

clean: ## remove what was built
	rm -rf $(VENV) build dist site src/*.egg-info
