# Every target makes what it needs: a virtual environment in .venv, with the packages that the target asks for.
#
#   make demo       a training is killed in the middle of a save and loses nothing
#   make test       everything that is quick; make test-slow: the rest
#   make lint       ruff, mypy, import-linter
#   make bench      times beside Orbax, safetensors and plain files; BENCH="--cases one,many" for some of it
#   make docs       the documentation as web pages in site/

PYTHON ?= python3
BENCH ?=
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.PHONY: demo test test-slow lint bench docs clean

demo: $(VENV)/with-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/with-test
	$(BIN)/python -m pytest -m "not slow"

# pytest exits with 5 when no test is marked slow, which is no failure.
test-slow: $(VENV)/with-test
	$(BIN)/python -m pytest -m slow || test $$? -eq 5

lint: $(VENV)/with-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/with-bench
	$(BIN)/python benchmarks/peers.py $(BENCH)

docs: $(VENV)/with-docs
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Plugins are tested where the core is, and bring what their tests need. They come second, so that the ckptkit they ask for is there.
$(VENV)/with-test: WITH_PLUGINS = $(PIP) $(PLUGINS:%=--editable '%[test]')

# torch without CUDA, where an index offers that build; the tests that need it are skipped without.
$(VENV)/with-test: OPTIONAL = -$(PIP) --editable 'plugins/ckptkit-torch[cpu]'

# One stamp for each extra of pyproject.toml: pip runs again only when a list of packages has changed.
$(VENV)/with-%: pyproject.toml $(PLUGINS:%=%/pyproject.toml) | $(BIN)/python
	$(PIP) --editable '.[$*]'
	$(WITH_PLUGINS)
	$(OPTIONAL)
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
