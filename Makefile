PYTHON ?= python
PYTEST = $(PYTHON) -m pytest
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64-static
CORE = src/vesicle/engine/core
DRIVER = tests/native/driver.cpp $(CORE)/*.cpp
CHECKED = $(CXX) -std=c++17 -O1 -g -fno-omit-frame-pointer -fPIC -pthread
MEMORY = -fsanitize=address,undefined -fno-sanitize-recover=undefined
# Fresh memory holds numbers that are none, so that whatever is read before it was written shows.
FILLED = ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=16777216:malloc_fill_byte=255
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
# Objects of the native core with some flags in a folder, as many at a time as there are processors.
COMPILED = ls $(CORE)/*.cpp | xargs -P $$(nproc) -I{} sh -c '$(CHECKED) $(1) -c {} -o $(2)/$$(basename {}).o'
# The floor that pyproject.toml names, in full.
OLDEST = 5.0.0
NATIVE_TESTS = tests/native/test_fuzz.py tests/native/test_damage.py tests/engine/test_decode.py \
	tests/engine/test_packed.py tests/parity/test_forgetting.py tests/parity/test_observing.py \
	tests/parity/test_small_modules.py

.DEFAULT_GOAL := help
.PHONY: help arm test-arm bench install test check parity sanitize sanitize-threads test-slow test-gemma test-ray \
	test-kvpress test-oldest examples docs results clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "%-18s %s\n", $$1, $$2}'

install: ## install the package from this folder, with what its tests need
	$(PYTHON) -m pip install -e '.[test]'

test: ## fast tests and those that need the default model (93 MB, downloaded once)
	$(PYTEST)

check: ## before every commit: format, lint, types, fast tests
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTEST) -m "not slow and not model"

parity: ## reference against engine, and causality
	$(PYTEST) tests/parity

test-slow: ## tests of more than half a minute
	$(PYTEST) -m slow

test-gemma: ## tests of Gemma 3 270M (238 MB, downloaded once, under Gemma's terms of use)
	$(PYTEST) -m gemma -n0

bench: ## this engine beside Hugging Face and llama.cpp, on this machine (needs the bench extra)
	$(PYTHON) -m vesicle.cli bench --against hf,llamacpp --overhead

arm: ## the kernels compile for 64-bit ARM, with and without dot products (needs a cross compiler)
	@for source in $$(find src -name '*.cpp' | sort); do for cpu in armv8-a armv8.2-a+dotprod; do \
		echo "$$cpu $$source"; \
		$(ARM_CXX) -march=$$cpu -O3 -std=c++17 -fPIC -c -o /dev/null "$$source" || exit 1; \
	done; done

test-arm: ## passes on an emulated 64-bit ARM core (needs a cross compiler and qemu-user)
	mkdir -p build/arm
	$(ARM_CXX) -O2 -std=c++17 -static -pthread -I$(CORE) $(DRIVER) -o build/arm/driver
	$(ARM_RUN) build/arm/driver 40

sanitize: ## the native code under checks of memory and undefined behaviour (GCC on Linux; minutes)
	mkdir -p build/sanitize/memory
	$(call COMPILED,$(MEMORY),build/sanitize/memory)
	$(CHECKED) $(MEMORY) -shared build/sanitize/memory/*.o -o build/sanitize/_core.so
	$(CHECKED) $(MEMORY) -I$(CORE) tests/native/driver.cpp build/sanitize/_core.so \
		-Wl,-rpath,'$$ORIGIN' -o build/sanitize/driver
	$(FILLED) build/sanitize/driver 100
	$(FILLED) LD_PRELOAD="$(RUNTIMES)" VESICLE_LIBRARIES=build/sanitize $(PYTEST) $(NATIVE_TESTS)

sanitize-threads: ## passes under checks of what threads share (GCC on Linux)
	mkdir -p build/sanitize/threads
	$(call COMPILED,-fsanitize=thread,build/sanitize/threads)
	$(CHECKED) -fsanitize=thread -I$(CORE) tests/native/driver.cpp build/sanitize/threads/*.o \
		-o build/sanitize/race
	setarch -R build/sanitize/race 60

test-ray: ## evolution on a Ray cluster of this machine, in .venv-ray (made if missing; needs minutes)
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install -q '.[ray]' pytest pytest-timeout pytest-xdist hypothesis
	.venv-ray/bin/python -m pytest tests/evolution -m ray -n0

test-kvpress: ## the bridge to NVIDIA's kvpress, in .venv-kvpress (made if missing; needs minutes)
	test -x .venv-kvpress/bin/python || $(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/pip install -q '.[kvpress]' pytest pytest-timeout pytest-xdist hypothesis
	.venv-kvpress/bin/python -m pytest tests/integrations/kvpress -m kvpress

test-oldest: ## fast tests with the oldest transformers, in .venv-oldest (made if missing; needs minutes)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q '.[test]' 'transformers==$(OLDEST)'
	.venv-oldest/bin/python -m pytest -m "not slow and not kvpress and not model and not gemma and not ray"

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
