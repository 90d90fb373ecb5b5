# Two commands for a newcomer: `make demo` and `make test`. Both need only Python (>= 3.10) and make, build `.venv`
# themselves, and start at once when nothing changed. `make demo PYTHON=python3.12` picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --dist worksteal
BIN := $(VENV)/bin
LOCK := requirements.lock
# torch comes first and alone: its build decides which CUDA packages come along, and those are not in the lock.
# Python compiles what is imported, when it is: compiling all of every package takes longer than installing it.
PIP = $(BIN)/python -m pip install --quiet --no-compile
INSTALL = $(PIP) --constraint $(LOCK)
# uv takes a fifth of pip's time; pip does it where there is no uv.
FROM_LOCK = pip install --quiet --no-deps --requirement $(LOCK)
SOURCES := setup.cfg pyproject.toml $(LOCK)

.PHONY: image image-cuda walk demo test check types compat compat-newest compat-all lock lint format clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	@$(BIN)/video-ma2mba demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# The core checks (ask, pipeline, remote code, ...) in environments of their own: with the oldest versions that setup.cfg
# allows, with the newest of everything, and with every minor release of transformers.
compat: $(VENV)/.test
	$(BIN)/python tests/compat/environments.py oldest

compat-newest: $(VENV)/.test
	$(BIN)/python tests/compat/environments.py newest

compat-all: $(VENV)/.test
	$(BIN)/python tests/compat/environments.py all --table docs/compatibility.md

# The only way to change the locks: the newest releases for Python 3.10 to 3.13, and the oldest that setup.cfg allows on
# Python 3.11, for answering and training. torch is named, so that a build of that version which the machine has fits.
lock:
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install --quiet --upgrade uv
	printf 'torch==2.13.0\nlmms-eval\n' | $(RESOLVE) --extra test --universal --python-version 3.10 --output-file $(LOCK)
	printf 'torch==2.13.0\n' | $(RESOLVE) --extra train --resolution lowest-direct --python-version 3.11 \
		--output-file requirements-oldest.lock
RESOLVE = $(VENV)/lock/bin/uv pip compile setup.cfg - --upgrade --quiet --no-annotate --custom-compile-command 'make lock'

# README and docs as a reader meets them: the wheel in fresh environments, terminals of several kinds (tmux), and pipes.
walk: $(VENV)/.test
	$(BIN)/python tests/compat/walk.py --pythons $(WALK_PYTHONS) $(WALK_ARGS)
WALK_PYTHONS ?= python3.11 python3.13

# Containers that answer, train and serve; IMAGE_ARGS='--build-arg EXTRAS=train' and more: see the Dockerfile.
DOCKER ?= docker
image:
	$(DOCKER) build --target cpu --tag video-ma2mba:cpu $(IMAGE_ARGS) .

image-cuda:
	$(DOCKER) build --target cuda --tag video-ma2mba:cuda $(IMAGE_ARGS) .

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# What to run before every commit: style, types, and tests of single functions and classes, in less than three minutes
# on two cores. Left out are tests that start processes, export, compile, train, or decode many videos.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not slow and not gpu' $(QUICK)
QUICK = tests/modeling_video_ma2mba tests/processing tests/files tests/planning tests/test_structure.py \
	tests/test_types.py tests/test_private_names.py $(addprefix --ignore-glob=*/test_,$(addsuffix .py,$(LENGTHY)))
LENGTHY = broken_videos decode_interpreted distributed export hub_citizenship language_model parallel_borders \
	pipeline_video_ma2mba reading_together recompute_schedule remote_code selective_scan_triton state_writing \
	training_integration transformers_arguments video_containers video_decoding

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(LOCK) | $(VENV)/bin/python
	@echo "Installing PyTorch into $(VENV) (once) ..."
	$(INSTALL) torch setuptools
	@touch $@

$(VENV)/.demo: $(SOURCES) $(VENV)/.torch
	@echo "Installing video-ma2mba into $(VENV) (once) ..."
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(SOURCES) $(VENV)/.torch
	@echo "Installing video-ma2mba and what its tests need into $(VENV) (once) ..."
	$(PIP) uv && $(BIN)/python -m uv $(FROM_LOCK) || $(BIN)/python -m $(FROM_LOCK) --no-compile
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@ $(VENV)/.demo
