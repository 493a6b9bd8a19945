# Every target sets up what it needs; `make demo` and `make test` work on a fresh clone with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# One tested version. On a machine with NVIDIA GPUs the same version brings CUDA with it.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo check test test-slow test-all test-gpu bench-kernels bench bench-planner proto clean

help:
	@echo "make demo      plan an unlike cluster, run the bundled model over it on Ray, ask it over gRPC and HTTP"
	@echo "make test      the tests (under twelve minutes on two cores); make test-all adds the slow ones"
	@echo "make check     ruff, mypy --strict, import-linter"
	@echo "make test-gpu  the tests that need a CUDA device; make bench-kernels measures the kernels on it"
	@echo "make bench     speed against transformers.generate on this machine"
	@echo "make bench-planner  plans against the baselines: rewrites docs/benchmark-planner.md"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: setup
	$(BIN)/python examples/demo.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package hexgen
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest -m "not slow and not long and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not long and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,cuda]"
	$(BIN)/python -c "import torch; exit(None if torch.cuda.is_available() else 'no CUDA device here, or no CUDA build of torch')"
	$(BIN)/python -m pytest -m gpu

bench: setup
	$(BIN)/python benchmarks/engine.py

bench-kernels: setup
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/decode.py --transformers

bench-planner: setup
	$(BIN)/python benchmarks/planner.py --docs

proto: setup
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. hexgen/proto/inference.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
