# make train    a virtual environment, the package, and the default model trained on this machine
# make test     the same environment, all tests
# EXTRA=cuda12 (or cuda13, tpu) installs for an accelerator; PYTHON=python3.12 chooses the interpreter;
# RUN=..., ARGS="--train.steps 200" choose the run directory and override fields of the config.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?=
CONFIG ?= configs/gpt_stdlib.py
RUN ?= runs/gpt_stdlib
ARGS ?=
BIN := $(VENV)/bin
comma := ,
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed$(EXTRA)
	@PATH="$(abspath $(BIN)):$$PATH" jaxmodels train $(CONFIG) --run-dir $(RUN) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "got Python %d.%d, expected 3.11 or newer, try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed$(EXTRA): $(VENV)/bin/python pyproject.toml
	$(INSTALL) -e '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(VENV)/.installed-%: $(VENV)/bin/python pyproject.toml
	$(INSTALL) -e '.[$*$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
