# Two commands for a newcomer: `make demo` and `make test`. Both need only Python (>= 3.10) and make, build `.venv`
# themselves, and start at once when nothing changed. `make demo PYTHON=python3.12` picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --dist worksteal
BIN := $(VENV)/bin
OLDEST := $(VENV)/oldest-transformers
# torch comes first and alone, so that the rest is resolved beside the build that this machine found.
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test compat lint format clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	@$(BIN)/video-ma2mba demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Checkpoints must also load on the oldest supported transformers, which gets an environment of its own.
compat: $(VENV)/.test $(OLDEST)/.installed
	VIDEO_MA2MBA_COMPAT_PYTHON=$(abspath $(OLDEST)/bin/python) $(BIN)/python -m pytest tests/compat

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "Installing PyTorch into $(VENV) (once) ..."
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(SOURCES) $(VENV)/.torch
	@echo "Installing video-ma2mba into $(VENV) (once) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(SOURCES) $(VENV)/.torch
	@echo "Installing video-ma2mba and what its tests need into $(VENV) (once) ..."
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps lmms-eval
	@touch $@ $(VENV)/.demo

$(OLDEST)/.installed: constraints.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(OLDEST)/bin/python -m pip install --quiet 'transformers==5.10.*' numpy pillow av jinja2
	@touch $@
