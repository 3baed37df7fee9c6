# `make serve` and `make test` work on a fresh clone; everything lives in .venv and nothing else has to be installed.
# Arguments for the command behind a target go in ARGS: make serve ARGS="--port 9000".

VENV  := .venv
BIN   := $(VENV)/bin
# One environment, filled in two steps: a server needs no linters, fakes or peers.
SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing

# An interpreter is taken only if it runs (a version manager's shim may not), is new enough and can make environments.
PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14)
USABLE  = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

unexport PYTHONDONTWRITEBYTECODE # without bytecode every process compiles all of its modules, whenever it starts

.DEFAULT_GOAL := help
.PHONY: help install serve check test slow interpret operators clients abuse kills ray charts sweep docs clean bench gpu demo demo-tools

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- everyday ------------------------------------------------------------------------------------

install: $(TESTING) ## create .venv with everything that serving and testing need; instant when nothing changed

# Install this project with the extras given, into an environment that is made first where there is none.
define install
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
		for python in $(PYTHONS); do "$$python" -c '$(USABLE)' 2>/dev/null && break; python=; done; \
		[ -n "$$python" ] || { echo 'No usable Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python' >&2; exit 1; }; \
		echo "Creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.$(1)'
	@touch $@
endef

$(SERVING): pyproject.toml constraints.txt
	$(call install)

$(TESTING): $(SERVING)
	$(call install,[test])

serve: $(SERVING) ## fetch the default model if needed and serve it on http://127.0.0.1:8000
	$(BIN)/lorakeet serve $(ARGS)

check: $(TESTING) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(TESTING) check ## all checks and the whole test suite
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'not prometheus' $(ARGS)

slow: $(TESTING) ## the tests that `make test` leaves out because they take long
	$(BIN)/pytest --numprocesses 2 --dist loadfile --timeout 900 -m slow --deselect tests/faults/test_kills.py $(ARGS)

interpret: $(TESTING) ## the engine's tests with the GPU's kernels, in Triton's interpreter
	LORAKEET_TRITON=interpret $(BIN)/pytest --numprocesses 2 --timeout 900 tests/server/engine $(ARGS)

operators: $(TESTING) ## deploy/ and every metric's name, held against Prometheus's own programs (Debian: prometheus)
	$(BIN)/pytest tests/deploy $(ARGS)

clients: $(TESTING) ## every client library of docs/reference/clients.md against a real server, each in its environment
	$(BIN)/python -m tests.support.clients $(ARGS)

ray: $(TESTING) ## deploy/ray: two replicas on Ray Serve, one killed, scaled, and the cost of the way through it; minutes
	@[ -x .venv-ray/bin/serve ] || $(BIN)/python -m venv --clear .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check 'ray[serve]>=2.60,<3'
	$(BIN)/pytest -m ray -s tests/deploy/test_ray.py $(ARGS)

charts: $(TESTING) ## the Helm chart, held against Helm itself and Kubernetes's schemas
	$(BIN)/python -m tests.support.charts $(ARGS)

abuse: $(TESTING) ## every operation with its worst bodies in full size, beside a client who must not notice; minutes
	$(BIN)/pytest -m abuse -s tests/faults/test_abuse.py $(ARGS)

kills: $(TESTING) ## 200 random kill -9 of a server under changes, on a disk that fills and frees; KILLS=20 for fewer
	$(BIN)/pytest -m slow tests/faults/test_kills.py $(ARGS)

sweep: $(TESTING) ## serve a tiny model of every type that transformers registers; writes docs/reference/models.md
	$(BIN)/python -m tests.sweep $(ARGS)

docs: $(TESTING) ## rewrite the generated tables of docs/ and the README
	UPDATE_DOCS=1 $(BIN)/pytest -q tests/test_docs.py -k tables
	$(BIN)/python -m loadtest docs

clean: ## remove the environment and everything the tools leave behind
	rm -rf $(VENV) .venv-clients .venv-ray .venv-charts build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- benchmarks and demonstrations ---------------------------------------------------------------

bench: $(TESTING) ## the whole CPU table, beside every peer that is installed; kept under loadtest/results
	$(BIN)/python -m loadtest bench $(ARGS)

# The environment where there is one, else whatever Python the machine has: it may have no network.
gpu: ## on a machine with an NVIDIA GPU: its tests and benchmarks, a verdict per line; kept under loadtest/results
	$(or $(PYTHON),$(firstword $(wildcard $(BIN)/python) python3)) -m loadtest.gpu $(ARGS)

demo: $(SERVING) ## serve, fine-tune on the example orders and compare with the base, in a few minutes
	$(BIN)/python docs/demo/demo.py $(ARGS)

demo-tools: $(TESTING) ## the same on calls of functions, asked through OpenAI's client
	$(BIN)/python docs/demo/tools.py $(ARGS)
