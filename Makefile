# Every target makes the environment it needs; a second call starts at once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NATIVE := vllm_offq/kernels/cpu/src

.PHONY: help demo test check setup clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## quantize a real model, serve it, compare its answer with the original's
	$(BIN)/python -m serving.demo

test: $(READY) ## run all tests, two processes at a time
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations=30

check: $(READY) ## lint, types and the fast tests (a few minutes)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)/* tests/kernels/cpu/* benchmarks/*.cpp
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

setup: $(READY) ## make the environment .venv (the other targets do it themselves)

clean: ## remove .venv and everything under build/
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): pyproject.toml setup.py scripts/setup_env.py $(wildcard $(NATIVE)/*)
	$(PYTHON) scripts/setup_env.py
	@touch $@
