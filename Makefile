# Everything runs from a bare checkout with only Python: each target makes .venv first if it must.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tiny-llama

.PHONY: demo test test-slow check bases bench malformed hostile clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       five methods at once on an embedded base (MODEL=tiny-llama or tiny-bloom)"
	@echo "make test       the tests (six to ten minutes on two cores)"
	@echo "make test-slow  the long ones as well"
	@echo "make check      ruff, mypy, import layers"
	@echo "make bases      pre-train the embedded bases again"
	@echo "make malformed  10,000 malformed rows among 100,000 good ones, and lines of 1 GiB"
	@echo "make hostile    900 hostile files and folders under an audit hook (ten minutes)"
	@echo "make bench      time Weft beside peft + transformers.Trainer"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/weft demo --model $(MODEL) --output-dir runs/demo

# One thread a process and two processes: small matrices gain nothing from a second thread.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

bases: $(VENV)/.installed
	$(BIN)/python tools/build_bases.py

hostile: $(VENV)/.installed-dev
	$(BIN)/python -m tests.hostile.report

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/train_speed.py

malformed: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/malformed.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis runs
