# The two commands of the README, and what a maintainer needs. Each sets up all that it uses.
#
#   make demo           a real model answers with its KV cache beyond its memory budget
#   make test           all tests
#   make check          formatting, lints, types, fast tests (six minutes)
#   make check-native   the native engine's tests under sanitizers
#   make lab            device tests in a guest with emulated NVMe drives, two guests at once

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.hpp' 2>/dev/null)

.PHONY: demo test check check-native lab test-packages venv clean

demo: venv
	$(BIN)/dualblade demo

test: venv test-packages
	$(BIN)/python -m pytest

check: venv test-packages
	$(BIN)/ruff format --check src tests scripts examples
	$(BIN)/ruff check src tests scripts examples
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find native -name '*.cpp' -o -name '*.hpp')
	$(BIN)/python -m pytest -q tests/test_tidy.py tests/unit tests/property tests/contract

check-native: venv
	bash native/check.sh

lab: venv test-packages
	$(BIN)/python -m pytest tests/lab

test-packages:
	bash scripts/system_packages tests

venv: $(VENV)/.installed

# torch comes first and by number: on a machine with a CPU build at hand it is taken, and nothing
# later asks for another. Rebuilt when the build files or the native sources change.
$(VENV)/.installed: pyproject.toml $(NATIVE) scripts/system_packages
	bash scripts/system_packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q 'scikit-build-core>=0.10' 'nanobind>=2.4' cmake ninja
	$(BIN)/pip install -q --no-build-isolation -e '.[dev,gguf,report]'
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
