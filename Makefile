PYTHON ?= python
PYTEST = $(PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help bench install test check parity test-slow test-gpu examples docs results clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "%-12s %s\n", $$1, $$2}'

install: ## install the package from this folder, with what its tests need
	$(PYTHON) -m pip install -e '.[test]'

test: ## fast tests and those that need the default model (93 MB, downloaded once)
	$(PYTEST)

check: ## before every commit: format, lint, types, fast tests
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTEST) -m "not slow and not gpu and not model"

parity: ## reference against engine, and causality
	$(PYTEST) tests/parity

test-slow: ## tests of more than half a minute
	$(PYTEST) -m "slow and not gpu"

bench: ## decode time against the ledger's bytes, on this machine
	$(PYTHON) benchmarks/decode_time.py

test-gpu: ## tests that need an NVIDIA GPU
	$(PYTEST) -m gpu

examples: ## run every example in order
	@set -e; for example in examples/[0-9]*.py; do echo "== $$example"; $(PYTHON) "$$example"; done

docs: ## everything public has a docstring, every link in the docs resolves
	$(PYTHON) -m ruff check --select D src
	$(PYTEST) tests/test_docs.py tests/test_repository.py

results: ## make every table and figure again, from results/ alone
	$(PYTHON) benchmarks/render_results.py

clean: ## remove build products and caches; runs/ and results/ stay
	rm -rf build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	find src -name '*.so' -delete
