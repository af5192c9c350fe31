# fedloom: the commands a person types. Every target brings .venv up to requirements.lock first; with nothing changed
# that takes a moment. PyTorch is taken as a CPU build; GPU=1 takes the CUDA build, TORCH_INDEX=<url> names an index.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
BIN := .venv/bin
export GPU TORCH_INDEX
# Set in many containers. Without bytecode every process compiles what it imports anew: three times the start-up.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check bench install lock clean

# What the install leaves out: nothing, or (for the demo) all that only tests, checks and extras need.
TIER :=

help:
	@echo "make demo      the built-in model and tasks, offline, ends with report.html"
	@echo "make test      all tests                      (WORKERS=2 processes; PYTEST_ARGS=... goes to pytest)"
	@echo "make check     style, types and import layers"
	@echo "make bench     speed and memory against a bare training loop"
	@echo "make install   .venv with everything from requirements.lock, and nothing else"
	@echo "make lock      remake requirements.lock       (UPGRADE=1 takes the newest versions)"
	@echo "make clean     remove .venv, caches and build output; runs/ stays"

install:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "fedloom needs Python 3.11 or later, and there is no $(PYTHON) here: name one, e.g. make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || [ -x $(BIN)/python ] || { \
	  echo "fedloom needs Python 3.11 or later, and $(PYTHON) is `$(PYTHON) -V 2>&1`: name another, e.g. make install PYTHON=python3.12" >&2; exit 2; }
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(PYTHON) tools/install.py $(TIER); else $(BIN)/python tools/install.py $(TIER); fi

demo: TIER := --core
demo: install
	$(BIN)/fedloom demo

test: install
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: install
	$(BIN)/python -m benchmarks.throughput

lock: install
	$(BIN)/python -m pip install -qq uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/lock.py $(if $(UPGRADE),--upgrade)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
