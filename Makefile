# make demo: two vLLM engines share one S3 bucket.   make test: everything.   See README.md.

# The first Python that is 3.11 or newer and runs; override with PYTHON=…
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3)
BIN := .venv/bin

.PHONY: setup demo test quick lint bench bench-gpu clean

setup:
	@$(PYTHON) scripts/setup.py

# CODEC=transform shows the calibrated codec: right answers from a thirtieth of the bytes.
CODEC ?= fast
demo: setup
	@$(BIN)/python -m lmcache_s3.benchmarks.demo --codec $(CODEC)

# Linters first, so that the output ends with pytest's summary.
test: lint
	$(BIN)/python -m pytest

quick: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

# Every figure of the main job, with its goal; JSON=… also writes them to a file.
JSON ?= bench-e2e.json
bench: setup
	$(BIN)/lmcache-s3 bench e2e --json $(JSON)

# On a machine with an NVIDIA GPU: checks the Triton kernels' bits, then measures (exit 2: no GPU, nothing measured).
# Takes PYTHON's own torch where that has CUDA.
GPU_JSON ?= bench-gpu.json
HAS_CUDA = import torch; torch.cuda.is_available() and print("--system-site-packages")
bench-gpu:
	@[ -x .venv-gpu/bin/python ] || $(PYTHON) -m venv $$($(PYTHON) -c '$(HAS_CUDA)' 2>/dev/null) .venv-gpu
	@.venv-gpu/bin/python -m pip install --quiet -e '.[gpu]'
	@.venv-gpu/bin/lmcache-s3 bench gpu --json $(GPU_JSON)

clean:
	rm -rf .venv .venv-gpu build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
