# The environment is .venv in the checkout; every target sets it up first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: setup run test check dev clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Found Python %d.%d, expected 3.11 to 3.13. Use: make PYTHON=python3.12" % v)'
	@echo "Setting up $(VENV), once (some minutes, most of them downloading)."
	@$(PYTHON) -m venv $(VENV)
	@echo "1 of 2: torch"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@echo "2 of 2: everything else"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

run: setup
	$(VENV)/bin/align run tiny

test: setup
	$(VENV)/bin/python -m pytest

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

dev: setup
	$(VENV)/bin/align dev

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@echo "Results in .alignment were kept; delete that folder to remove them."
