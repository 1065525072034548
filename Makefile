# Two commands do everything: `make run` serves, `make test` runs all that CI runs. Both set themselves up.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTEST ?= $(BIN)/python -m pytest

.PHONY: run test lint unit setup setup-test clean help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup:
	@packaging/setup run

setup-test:
	@packaging/setup test

run: setup ## set up, load the gate, serve a SOCKS5 proxy on 127.0.0.1:1080; ARGS="…" goes to `rama-ebpf run`
	@exec $(BIN)/rama-ebpf run $(ARGS)

lint: setup-test ## ruff and mypy --strict
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## everything that CI runs; needs root
	$(PYTEST) tests integration -m "not docker and not vm" $(PYTEST_ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
