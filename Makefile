# Everything runs from a bare checkout with only Python: each target makes .venv first if it must.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tiny-llama

.PHONY: help demo test-fast test test-slow test-newest test-oldest test-machines check breakages lock bases bench malformed hostile clean
.DEFAULT_GOAL := help

help:
	@echo "make demo           five methods at once on an embedded base (MODEL=tiny-llama or tiny-bloom)"
	@echo "make test-fast      the inner loop: ops, data, core, one contract per method"
	@echo "                    (one test: .venv/bin/pytest tests/layouts/test_stream.py -k every_row)"
	@echo "make test           the tests (about six minutes on two cores), with the locked versions"
	@echo "make test-slow      the long ones as well"
	@echo "make breakages      break Weft in ten ways and show which tests see it"
	@echo "make test-newest    the tests with the newest versions that pyproject.toml allows; writes a result file"
	@echo "make test-oldest    and with the oldest (a CUDA build of torch on Linux: 5 GB)"
	@echo "make test-machines  the numeric tests with 1, 2, 4 threads and with AVX2 and plain kernels; a result file"
	@echo "make check          ruff, mypy, import layers"
	@echo "make lock           write requirements/*.txt anew"
	@echo "make bases          pre-train the embedded bases again"
	@echo "make malformed      10,000 malformed rows among 100,000 good ones, and lines of 1 GiB"
	@echo "make hostile        900 hostile files and folders under an audit hook (five minutes)"
	@echo "make bench          time Weft beside peft + transformers.Trainer"

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# torch stands apart: which build is right depends on the machine, and each pins its own CUDA libraries.
INSTALL_WEFT := $(PIP_INSTALL) --no-deps --no-build-isolation -e .

$(VENV)/.installed: pyproject.toml requirements/run.txt requirements/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --no-deps --require-hashes -r requirements/run.txt
	$(BIN)/python $(PIP_INSTALL) -r requirements/torch.txt
	$(BIN)/python $(INSTALL_WEFT)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps --require-hashes -r requirements/dev.txt
	touch $@

.venv-newest/.installed: pyproject.toml
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP_INSTALL) -e ".[test]"
	touch $@

.venv-oldest/.installed: requirements/oldest.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) -r requirements/oldest.txt
	.venv-oldest/bin/python $(INSTALL_WEFT)
	touch $@

.venv-lock/.installed:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP_INSTALL) uv
	touch $@

demo: $(VENV)/.installed
	$(BIN)/weft demo --model $(MODEL) --output-dir runs/demo

FAST := tests/ops tests/data tests/core tests/layouts tests/test_layering.py tests/test_api.py \
	tests/contracts/test_each_method.py \
	tests/contracts/test_routing.py::test_a_sample_alone_has_the_loss_of_plain_cross_entropy \
	tests/files tests/combine tests/preview "tests/training/test_resume.py::test_asked_to_stop_anywhere[4]"

# One thread a process and two processes: small matrices gain nothing from a second thread.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long" $(FAST)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-newest test-oldest: test-%: .venv-%/.installed
	.venv-$*/bin/python tools/versions.py $*

test-machines: $(VENV)/.installed-dev
	$(BIN)/python tools/machines.py

breakages: $(VENV)/.installed-dev
	$(BIN)/python tools/breakages.py

lock: .venv-lock/.installed
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" .venv-lock/bin/python tools/lock.py

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
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-lock .pytest_cache .ruff_cache .mypy_cache .hypothesis runs
