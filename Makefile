# make demo and make test do everything on a fresh machine with Python >= 3.10 and a C++20 compiler: they create $(VENV),
# install pywm in it (editable, compiled) under $(CONSTRAINTS), and run. The second time they only run.
#
#   PYTHON=python3.12           the Python of the virtual environment
#   CONSTRAINTS=file            other versions; /dev/null for the newest of everything
#   TORCH_CONSTRAINT=torch==2.12.0   another torch than the one in $(CONSTRAINTS)
#   PIP_ARGS="..."              passed to pip, for example another index for torch
#   PYWM_CUDA=ON|OFF            CUDA kernels must or must not be built (default AUTO: where nvcc is found)
#   ARGS="..."                  passed to the program that the target runs

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH_CONSTRAINT ?=
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
# A build that fails is an error here, not a pure-Python install.
PIP := PYWM_REQUIRE_EXT=$(if $(PYWM_NO_EXT),0,1) PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet $(PIP_ARGS)
NATIVE_SOURCES := CMakeLists.txt pyproject.toml pywm/_version.py \
  $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
CXX_FILES := $(shell find csrc benchmarks tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help demo test bench build lint format docs clean FORCE
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.built  ## train DreamerV3 on CartPole-v1 in runs/demo (minutes), evaluate it, draw its curve and its dream
	$(BIN)/pywm train dreamer_v3 CartPole-v1 --steps 20000 --run-dir runs/demo --fresh $(ARGS)
	$(BIN)/pywm plot runs/demo --out runs/demo/curve.png
	$(BIN)/pywm dream runs/demo
	$(BIN)/pywm eval runs/demo
	@echo "learning curve: runs/demo/curve.png"
	@echo "dream (the world model's prediction beside the truth): runs/demo/dreams/dream.png, runs/demo/dreams/dream.gif"

test: $(VENV)/.dev $(VENV)/.built  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

bench: $(VENV)/.dev $(VENV)/.built  ## time the ops against their references and the memory bound
	$(BIN)/python benchmarks/run.py $(ARGS)

build: $(VENV)/.dev $(VENV)/.built  ## set up $(VENV) for development and compile what changed
	@$(BIN)/python -c "import pywm; print(*pywm.backend().values(), sep='\n')"

lint: $(VENV)/.dev $(VENV)/.built  ## check style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/typos
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the sources into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/.dev $(VENV)/.built  ## write docs/api.md from the docstrings and pywm/_C.pyi from the module
	$(BIN)/python docs/generate.py

clean:  ## remove what was built, but not the virtual environment
	rm -rf build dist $(VENV)/.built

# ---- set-up, in steps that are remembered ----------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"pywm needs Python >= 3.10, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# The constraints in force: rewritten only when they change, so that nothing is installed again otherwise.
$(VENV)/constraints.txt: FORCE | $(BIN)/python
	@{ if [ -n "$(TORCH_CONSTRAINT)" ]; then grep -v '^torch *[=<>~!]' $(CONSTRAINTS); echo "$(TORCH_CONSTRAINT)"; else cat $(CONSTRAINTS); fi; } > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# The tools first: with them in place, later builds are incremental and work offline.
$(VENV)/.tools: $(VENV)/constraints.txt
	$(PIP) -c $< "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.26" "ninja>=1.11"
	@touch $@

# Only what it depends on, and what the demo plays and draws with: pure Python, for the next step compiles.
$(VENV)/.base: $(VENV)/.tools pyproject.toml
	PYWM_NO_EXT=1 $(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e ".[classic,plot]"
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -c $(VENV)/constraints.txt "pywm[dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.base $(NATIVE_SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

FORCE:
