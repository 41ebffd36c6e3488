# make train    a virtual environment, the package, and the default model trained on this machine
# make test     the same environment, all tests but the slowest (tests/slow.txt), which CI runs too: ARGS="-m slow"
# make lint     ruff's rules and format, and pyright, as pre-commit and CI run them, and hadolint's of the container
# make docs     the documentation as a site, in build/site; every warning is an error
# make kit      wheels in build/kit, for a machine with an accelerator and no network
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
with = $(if $(EXTRA),$(comma)$(EXTRA))
# the extras of a stamp: train has none of its own
extras = $(subst train,,$(subst train$(comma),,$*))

.PHONY: train test lint docs kit clean

train: $(VENV)/.installed-train$(with)
	@PATH="$(abspath $(BIN)):$$PATH" jaxmodels train $(CONFIG) --run-dir $(RUN) $(ARGS)

test: $(VENV)/.installed-test$(with)
	$(BIN)/python -m pytest $(or $(ARGS),-m "not slow")

lint: $(VENV)/.installed-lint$(with)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/hadolint containers/Dockerfile

docs: $(VENV)/.installed-docs$(with)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# the most MiB that the kit may have
KIT_MIB ?= 60
MANYLINUX := $(foreach tag,2_28 2_27 2_17 2014,--platform manylinux$(if $(findstring _,$(tag)),_)$(tag)_x86_64)

kit: $(BIN)/python
	@rm -rf build/kit && mkdir -p build/kit
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--implementation cp --python-version 3.12 $(MANYLINUX) --dest build/kit --requirement benchmarks/kit.txt
	@# tensorflow-datasets needs it, and it comes as source alone
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/kit promise
	@size=$$(du -sm build/kit | cut -f1); \
		[ $$size -lt $(KIT_MIB) ] || { echo "got a kit of $$size MiB, expected less than $(KIT_MIB)"; exit 1; }; \
		echo "build/kit has $$size MiB; on the machine, from this folder:"
	@echo "  python -m pip install --no-index --find-links build/kit tyro rich tensorboardX tensorflow-datasets array-record importlib_resources"
	@echo "  python -m benchmarks device --budget 480"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "got Python %d.%d, expected 3.11 or newer, try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(BIN)/python pyproject.toml
	@echo "installing into $(VENV)$(if $(extras), with $(extras)) ..."
	@$(INSTALL) -e '.$(if $(extras),[$(extras)])'
	@touch '$@'

clean:
	rm -rf $(VENV) build *.egg-info
