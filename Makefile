# Two commands do everything: `make run` serves, `make test` runs all that CI runs. Both set themselves up.
SHELL := /bin/bash
QUICK := tests/core tests/layers tests/config tests/cli tests/fuzz tests/router tests/proxy_protocol \
	tests/policy/test_feeds.py tests/policy/test_egress.py tests/policy/test_layout.py tests/socks5/test_machine.py
VENV := .venv
BIN := $(VENV)/bin
PYTEST ?= $(BIN)/python -m pytest
# Many tests wait for a time to pass: half as many processes again as there are cores, and not more than memory bears.
WORKERS ?= $(shell cores=$$(nproc); n=$$((cores + (cores + 1) / 2)); echo $$((n < 8 ? n : 8)))

.PHONY: run test check lint crash faults hammer upgrades setup setup-test docs docker-test serial kernels vagrant-test clean help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup:
	@packaging/setup run

setup-test:
	@packaging/setup test

run: setup ## set up, load the gate, serve a SOCKS5 proxy on 127.0.0.1:1080; ARGS="…" goes to `rama-ebpf run`
	@exec $(BIN)/rama-ebpf run $(ARGS)

lint: setup-test ## ruff, mypy --strict and the import rule
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## lint, and the tests that need neither root nor another program; under a minute
	$(PYTEST) -n $(WORKERS) $(QUICK) -m "not (root or ebpf or docker or vm)" $(PYTEST_ARGS)

test: lint ## everything that CI runs; needs root
	$(PYTEST) -n $(WORKERS) tests integration -m "not vm" $(PYTEST_ARGS)

docs: setup ## the documentation as a site in build/site, with every link and anchor checked
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

serial: setup-test ## a thousand rounds of twenty writers that are stopped and continued; needs root
	$(BIN)/python -m tests.policy.serial

docker-test: setup-test ## the proxy among containers, on a Docker daemon of its own (part of `make test`)
	@$(BIN)/python -m integration.require docker
	$(PYTEST) integration/docker $(PYTEST_ARGS)

kernels: setup-test ## the kernel suite on the host's kernel and on Debian's, in emulated machines; writes docs/kernels.md
	@$(BIN)/python -m integration.kernels $(KERNELS)

vagrant-test: setup-test ## a Debian 12 machine: install the project, run the suite in it, bring the reports out, destroy it
	@vagrant/test

crash: setup-test ## every writer of the policy, and the server, killed and failed at each of their calls; an hour
	nice $(BIN)/python -m tests.crash $(CRASH)

faults: setup-test ## 500 rounds of random faults, and a million messages of a hostile worker; an hour
	RAMA_EBPF_FAULT_ROUNDS=500 nice $(PYTEST) tests/faults $(PYTEST_ARGS)

hammer: setup-test ## denied clients through 100 starts, reloads, stops, loads and trials; N=100
	nice $(BIN)/python -m tests.hammering $(or $(N),100)

upgrades: setup-test ## 100 upgrades under load, and each step of one made to fail; an hour; N=100
	nice $(BIN)/python -m tests.upgrading $(or $(N),100)
	nice $(BIN)/python -m tests.upgrading --faults

clean: ## remove the virtual environment and caches (also of images, kernels and boxes)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache
