# make demo PYTHON=python3.12 chooses the interpreter; ARGS are passed on: make test ARGS="-x tests/data/test_emoji.py"
PYTHON ?= python3
ARGS ?=
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check install

PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check docs

help:
	@echo "make demo        a small model from 1,898 labelled emoji, distilled from a larger one: the built-in example"
	@echo "make test        all tests: seven to nine minutes on 2 cores"
	@echo "make test-fast   those that are not marked slow: a minute and a half at most"
	@echo "make check       ruff and pyright, as in CI"
	@echo "make docs        the documentation site, in docs/_build/html"
	@echo "Each sets up .venv first: about two minutes and 5.5 GB, once. PYTHON=... chooses the interpreter (3.11 or later)."

demo: .venv/.demo-installed
	.venv/bin/tutelage demo $(ARGS)

test: .venv/.dev-installed
	$(PYTEST) $(ARGS)

test-fast: .venv/.dev-installed
	$(PYTEST) -m "not slow" $(ARGS)

check: .venv/.dev-installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

docs: .venv/.docs-installed
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not to be found'); Python 3.11 or later is needed" >&2; \
		echo "hint: make $(MAKECMDGOALS) PYTHON=python3.12 (or the path of one that you have)" >&2; \
		exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

# The stamps keep a second call from installing again until pyproject.toml changes; [dev] contains [demo] and [docs].
.venv/.demo-installed: pyproject.toml | .venv/bin/python
	@echo "Installing tutelage into .venv; the first time takes about two minutes"
	@$(PIP) --editable '.[demo]'
	@touch $@

.venv/.docs-installed: pyproject.toml | .venv/bin/python
	@echo "Installing tutelage and Sphinx into .venv; the first time takes about two minutes"
	@$(PIP) --editable '.[docs]'
	@touch $@

.venv/.dev-installed: pyproject.toml | .venv/bin/python
	@echo "Installing tutelage and its tools into .venv; the first time takes about two minutes"
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps lightly==1.6.0  # an oracle of the tests; what it depends on is not wanted here
	@touch .venv/.demo-installed .venv/.docs-installed $@
