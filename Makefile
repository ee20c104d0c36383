# Everything a newcomer needs: `make demo`. Python 3.11 or later; no GPU, no root.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.DEFAULT_GOAL := help
.PHONY: help setup test cuda-check gpu gpu-site matrix fuzz load accuracy dist lint format types demo bench-cpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with this project and vLLM for CPU in it

# Quick when nothing it depends on has changed.
$(STAMP): pyproject.toml setup.py benchmarks/demo/install.py $(wildcard csrc/*/*)
	@$(PYTHON) benchmarks/demo/install.py $(VENV)
	@touch $@

# Two processes of one thread each: with two each, two cores spend most of their time waiting for one another.
test: setup ## Run the default tests (no GPU, nothing slow)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

cuda-check: setup ## Test the CUDA kernels without a GPU, all of it (10 minutes at most)
	$(BIN)/python -m pytest -n 2 -m "not gpu" tests/cuda

# Other versions of vLLM that are built for the same torch; the results are in docs/compatibility.md.
MATRIX ?= 0.29.0

matrix: ## Run the plugin's tests beside other versions of vLLM (MATRIX="0.29.0 ...")
	@set -e; for version in $(MATRIX); do \
	  $(PYTHON) benchmarks/demo/install.py build/matrix/$$version --vllm $$version; \
	  build/matrix/$$version/bin/python -m pytest tests/plugin; \
	done

# On a machine with a GPU and CUDA's compiler. It needs no .venv; see docs/cuda.md.
gpu: ## Build, test and measure the CUDA kernels on this machine's GPU (10 minutes at most)
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

# For a GPU machine without a network, and with Python 3.12: run this elsewhere, and take build/gpu/site along.
gpu-site: ## Fetch what `make gpu` needs beside torch, transformers and pytest into build/gpu/site
	$(PYTHON) -m pip install --quiet --no-compile --target build/gpu/site --upgrade --only-binary=:all: --implementation cp \
		--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
		pydantic google-re2 hypothesis

fuzz: setup ## Spoil thousands of checkpoints and load them: SEED=0 CASES=5000
	$(BIN)/python -m tests.fuzz $(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES))

load: setup ## Serve SmolLM2 to 32 clients at once, some of which misbehave (about 10 minutes)
	$(BIN)/python -m benchmarks.load

# What it is to measure, on which text: make accuracy ARGUMENTS="--calibration web.jsonl --text wikitext2=test.txt"
accuracy: setup ## Compare GQSA with other methods of compression on one model (hours on a CPU; resumes)
	$(BIN)/python -m benchmarks.accuracy $(ARGUMENTS)

# For every supported GPU, whatever is in this machine.
dist: setup ## Build the wheel and the source distribution, and install both into fresh environments
	@rm -rf dist
	GQSA_CUDA_ARCHS="80;86;89;90;100;120" $(BIN)/python -m build --no-isolation --outdir dist
	GQSA_DIST=dist $(BIN)/python -m pytest -m slow tests/test_dist.py

lint: setup ## Check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy knows no import hooks, which an editable install of offline/ as vllm_gqsa.offline needs. So it reads a tree of
# links that looks as the installed package does.
types: setup ## Check types with mypy
	@rm -rf build/types && mkdir -p build/types/vllm_gqsa
	@ln -s $(addprefix ../../../,$(filter-out %__pycache__,$(wildcard vllm_gqsa/*)) offline) build/types/vllm_gqsa/
	$(BIN)/mypy

demo: setup ## Compress SmolLM2-135M and talk to it through vllm serve
	$(BIN)/python -m benchmarks.demo.run

bench-cpu: setup ## Measure kernels, vLLM and llama.cpp on one thread of this CPU
	$(BIN)/python -m benchmarks.cpu all

clean: ## Remove .venv, build and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
