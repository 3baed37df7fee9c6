# `make serve` and `make test` work on a fresh clone; all dependencies are installed into .venv.
# Pass arguments to a target's command in ARGS: make serve ARGS="--port 9000".

VENV  := .venv
BIN   := $(VENV)/bin
# One environment, installed in two steps: serving needs no linters, test doubles or peers.
SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing

# An interpreter is used only if it runs (a version manager's shim may not), is new enough and can create environments.
PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14)
USABLE  = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

unexport PYTHONDONTWRITEBYTECODE # without bytecode files every process compiles all of its modules at each start

.DEFAULT_GOAL := help
.PHONY: help install serve check test slow interpret operators clients abuse kills ray charts sweep docs clean bench gpu demo demo-tools

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- everyday ------------------------------------------------------------------------------------

install: $(TESTING) ## create .venv with the dependencies of serving and testing; instant if nothing changed

# Install this project with the given extras; creates the environment if there is none.
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

serve: $(SERVING) ## download the default model if needed and serve it on http://127.0.0.1:8000
	$(BIN)/lorakeet serve $(ARGS)

check: $(TESTING) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(TESTING) check ## all checks and the whole test suite
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'not prometheus' $(ARGS)

slow: $(TESTING) ## the long-running tests, which `make test` leaves out
	$(BIN)/pytest --numprocesses 2 --dist loadfile --timeout 900 -m slow --deselect tests/faults/test_kills.py $(ARGS)

interpret: $(TESTING) ## the engine's tests with the GPU kernels, in Triton's interpreter
	LORAKEET_TRITON=interpret $(BIN)/pytest --numprocesses 2 --timeout 900 tests/server/engine $(ARGS)

operators: $(TESTING) ## check deploy/ and all metric names with Prometheus's own programs (Debian: prometheus)
	$(BIN)/pytest tests/deploy $(ARGS)

clients: $(TESTING) ## the client libraries of docs/reference/clients.md against a real server, each in its environment
	$(BIN)/python -m tests.support.clients $(ARGS)

ray: $(TESTING) ## deploy/ray: two replicas on Ray Serve, a crash, scaling, and Ray's overhead; takes minutes
	@[ -x .venv-ray/bin/serve ] || $(BIN)/python -m venv --clear .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check 'ray[serve]>=2.60,<3'
	$(BIN)/pytest -m ray -s tests/deploy/test_ray.py $(ARGS)

charts: $(TESTING) ## check the Helm chart with Helm itself and Kubernetes's schemas
	$(BIN)/python -m tests.support.charts $(ARGS)

abuse: $(TESTING) ## every operation with its worst bodies in full size, beside a client that must not be affected; takes minutes
	$(BIN)/pytest -m abuse -s tests/faults/test_abuse.py $(ARGS)

kills: $(TESTING) ## 200 random kill -9 of either process during changes, on a disk that fills and empties; KILLS=20 for fewer
	$(BIN)/pytest -m slow tests/faults/test_kills.py $(ARGS)

sweep: $(TESTING) ## serve a tiny model of every type registered in transformers; writes docs/reference/models.md
	$(BIN)/python -m tests.sweep $(ARGS)

docs: $(TESTING) ## rewrite the generated tables of docs/ and the README
	UPDATE_DOCS=1 $(BIN)/pytest -q tests/test_docs.py -k tables
	$(BIN)/python -m loadtest docs

clean: ## remove the environments and all generated files
	rm -rf $(VENV) .venv-clients .venv-ray .venv-charts build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- benchmarks and demonstrations ---------------------------------------------------------------

bench: $(TESTING) ## the whole CPU comparison with all installed peers; results in loadtest/results
	$(BIN)/python -m loadtest bench $(ARGS)

# Uses .venv if it exists, else the machine's own Python, because the machine may have no network.
gpu: ## the tests and benchmarks for an NVIDIA GPU, with a verdict per line; results in loadtest/results
	$(or $(PYTHON),$(firstword $(wildcard $(BIN)/python) python3)) -m loadtest.gpu $(ARGS)

demo: $(SERVING) ## serve, fine-tune on the example orders and compare with the base, in a few minutes
	$(BIN)/python docs/demo/demo.py $(ARGS)

demo-tools: $(TESTING) ## the same for function calls, through OpenAI's client
	$(BIN)/python docs/demo/tools.py $(ARGS)
