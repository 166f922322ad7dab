# make quickstart   install into .venv and train a ControlNet on this machine, from nothing
# make dreambooth-demo   train eight subjects that the built-in base has never seen, and measure them
# make test         all tests                         make check    ruff and pyright
# make test-unit    those of tests/unit that are not slow, for the daily loop: about 3 minutes of two cores
# make test-cluster   a run on a real Slurm of two nodes, disturbed; needs root and Debian's slurm-wlm, munge, iproute2
# make test-tracking  MLflow on PostgreSQL as deploy/compose.yaml has it, killed and back; needs Debian's postgresql
# make bench        the benchmarks that need no run   make clean    delete what tools made; .venv and runs stay
# make bench-gpu    what one GPU gives, in nine minutes: speed, share of its peak, memory beside the plan; without one in small
# make docs         the site of docs/, in build/site  make setup    only install; runs once
#
# Variables: PYTHON=python3.12  DEVICE=cpu|cuda  JOBS=2 (test processes)
#   PEER="--peer-diffusers CHECKOUT --peer-python PYTHON"   times diffusers' own program beside ours in `make bench`
#   GPU="--seconds 240 --output rows.jsonl"   options of `make bench-gpu`, which goes on with the rows that a file lacks
#   TORCH_INDEX=URL of a package index with CPU builds of torch, or empty to use what pip is configured for

DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
JOBS ?= 2

BIN := .venv/bin
READY := .venv/ready-$(DEVICE)

.PHONY: quickstart dreambooth-demo test test-unit test-cluster test-tracking check docs bench bench-gpu clean setup
.DELETE_ON_ERROR:

quickstart: setup
	$(BIN)/controlbooth quickstart

dreambooth-demo: setup
	$(BIN)/controlbooth dreambooth demo

test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-unit: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow" tests/unit

test-cluster: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -rs -m cluster tests/cluster

test-tracking: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -rs -m tracking tests/tracking

# pyright finds controlbooth.* in the folder above the checkout; a link makes it so whatever the checkout is called.
check: setup
	$(BIN)/ruff check .
	@mkdir -p build/namespace && ln -sfn "$(CURDIR)" build/namespace/controlbooth
	$(BIN)/pyright -p build/namespace/controlbooth --pythonpath $(BIN)/python

# The pages of the reference are made of the code of this checkout, which the link makes controlbooth.
docs: setup
	@$(BIN)/python -c 'import material, mkdocs' 2>/dev/null \
	  || $(BIN)/python -m pip install -q -c constraints-$(DEVICE).txt -e ".[docs]"
	@mkdir -p build/namespace && ln -sfn "$(CURDIR)" build/namespace/controlbooth
	PYTHONPATH=build/namespace NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html, or with its search: $(BIN)/python -m http.server -d build/site"

bench: setup
	$(BIN)/python tests/benchmarks/exactness.py
	$(BIN)/python tests/benchmarks/independence.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 tests/benchmarks/sd15_step.py
	$(BIN)/python tests/benchmarks/controlnet_step.py $(PEER)
	$(BIN)/python tests/benchmarks/subjects.py $(PEER)
	$(BIN)/python tests/benchmarks/sampling.py
	$(BIN)/python tests/benchmarks/checkpoint_speed.py
	$(BIN)/python tests/benchmarks/decode_speed.py
	$(BIN)/python tests/benchmarks/loader_rates.py
	$(BIN)/python tests/benchmarks/growth.py
	$(BIN)/python tests/benchmarks/startup.py

bench-gpu: setup
	$(BIN)/python tests/benchmarks/gpu.py $(GPU)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find data deploy launch models trainer tests -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(READY)

ifeq ($(DEVICE),cuda)

$(READY): setup.py constraints-cuda.txt | .venv/bin/python
	@echo "Installing the CUDA set. These very versions have not run on a GPU yet, see docs/results/h200.md; DEVICE=cpu takes a set that has run."
	$(BIN)/python -m pip install -q -c constraints-cuda.txt -e ".[dev,measure,mlflow,optimizers,quantized,remote,cuda]"
	@$(BIN)/python -c 'import torch; raise SystemExit(None if torch.version.cuda else \
	  f"torch {torch.__version__} has no CUDA: pip is configured for CPU builds. Change that, or use DEVICE=cpu")'
	@touch $@

else

# torch comes first and alone. Its pin in constraints-cpu.txt is the +cpu build, which PyPI does not have, so that the
# CUDA build cannot slip in: pip's own configuration is asked for it, then TORCH_INDEX.
$(READY): setup.py constraints-cpu.txt | .venv/bin/python
	@echo "Installing the CPU set into .venv (about 2 GB; minutes)"
	@$(BIN)/python -m pip install -q --no-deps -c constraints-cpu.txt torch >/dev/null 2>&1 \
	  || $(BIN)/python -m pip install -q --no-deps -c constraints-cpu.txt $(addprefix --index-url ,$(TORCH_INDEX)) torch \
	  || { echo "No CPU build of torch found. Give an index that has one: make setup TORCH_INDEX=URL" >&2; exit 1; }
	$(BIN)/python -m pip install -q -c constraints-cpu.txt -e ".[dev,measure,mlflow,optimizers,quantized,remote]"
	@$(BIN)/python -c 'import torch; raise SystemExit(torch.version.cuda and \
	  f"torch {torch.__version__} is a CUDA build of several GB. Delete .venv and give an index of CPU builds: " \
	  "make setup TORCH_INDEX=URL")'
	@touch $@

endif

.venv/bin/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; echo "No Python >= 3.11 on the PATH. Install one, or say where it is: make setup PYTHON=/path/to/python" >&2; exit 1
