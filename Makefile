# Everything a newcomer types. VENV and PYTHON may be set: make test PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# PyPI's torch for Linux carries CUDA (about 6 GB); CPU wheels are a tenth of it:
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

.PHONY: help install quickstart test test-fast lint format

help:
	@echo "make quickstart   install, train Llip on the embedded scenes, evaluate it zero-shot, draw its figures"
	@echo "make test         install, run the tests;  make test-fast leaves out those that take seconds each"
	@echo "make lint         check style with ruff and types with mypy;  make format applies it"

# The package itself is installed editable, so that `llip` is a command. The stamp is newer than the requirements once
# they are installed. uv, where it is there, is much faster than pip.
install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt requirements-test.txt pyproject.toml
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null; then uv pip install -q --compile-bytecode --python $(RUN) $(PIP_ARGS) -r requirements-test.txt -e .; \
	else $(RUN) -m pip install -q $(PIP_ARGS) -r requirements-test.txt -e .; fi
	@touch $@

quickstart: install
	$(RUN) -m llip.main llip_quickstart
	$(RUN) -m evals.main_mc --fname config_evals/llip_quickstart.yaml --devices cpu
	@echo "run:      logs/llip_quickstart   (metrics.jsonl, log.txt, tensorboard, checkpoints/latest.pt)"
	@echo "curves:   logs/llip_quickstart/figures/curves.png"
	@echo "results:  logs/llip_quickstart/evals/results.md and results.json"

test: install
	$(RUN) -m pytest -q -n 2 --dist loadfile

test-fast: install
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "not slow"

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
