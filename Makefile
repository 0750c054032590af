# The two commands of the README, and what a maintainer needs. Each sets up all that it uses.
#
#   make demo           a real model answers with its KV cache beyond its memory budget
#   make test           all tests
#   make check          formatting, lints, types, fast tests (some minutes)
#   make lint           the first three
#   make check-native   the native engine's tests under sanitizers
#   make lab            device tests in a guest with emulated NVMe drives, two guests at once
#   make dist           sdist and wheel in dist/, and the wheel tried outside the clone

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install -q -c constraints.txt
STAMP := $(VENV)/.installed$(if $(wildcard /usr/include/liburing.h),,-posix)
NATIVE := CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.hpp' 2>/dev/null)

.PHONY: demo test check lint check-native lab dist test-packages venv clean
.NOTPARALLEL:  # two of them install Debian packages
export PYTHON

demo: venv
	$(BIN)/dualblade demo

test: venv test-packages
	$(BIN)/python -m pytest

check: lint test-packages
	$(BIN)/python -m pytest -q tests/test_tidy.py tests/unit tests/property tests/contract

lint: venv
	$(BIN)/ruff format --check src tests scripts examples
	$(BIN)/ruff check src tests scripts examples
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find native -name '*.cpp' -o -name '*.hpp')

check-native: venv
	bash native/check.sh

lab: venv test-packages
	$(BIN)/python -m pytest tests/lab

dist: venv
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	bash scripts/try_wheel dist/*.whl

test-packages:
	bash scripts/system_packages tests

venv: $(STAMP)

# torch comes first and by number: on a machine with a CPU build at hand it is taken, and nothing
# later asks for another. The rest has the versions that the tests were run with, whatever is new.
# Rebuilt when the build files or the native sources change, and once liburing is there.
$(STAMP): pyproject.toml constraints.txt $(NATIVE) scripts/system_packages
	bash scripts/system_packages
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(INSTALL) scikit-build-core nanobind cmake ninja
	$(INSTALL) --no-build-isolation -e '.[dev,gguf,report]'
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
