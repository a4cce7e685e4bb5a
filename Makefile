# Every target sets up what it needs in .venv; Python 3.11+ and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CORES := $(shell nproc 2>/dev/null || echo 2)
# torch and the Triton language stand beside the service's environment, which does without them.
GPU_SITE := .venv-gpu
TORCH ?= torch==2.13.0
WITH_TORCH := PYTHONPATH=$(GPU_SITE) $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-gpu-interpreted bench-gpu test-cluster cluster-demo bench-cluster test-long test-ops drills dashboards lock sbom ops-files lint bench bench-search bench-soak wire clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the service into $(VENV)"
	@$(PIP) -e '.[cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing the test tools into $(VENV)"
	@$(PIP) -e '.[cpu,dev,bench]'
	@touch $@

$(VENV)/.ops: $(VENV)/.dev
	@echo "Installing the validators of manifests, queries and images into $(VENV)"
	@$(PIP) -e '.[cpu,dev,ops]'
	@touch $@

$(VENV)/.cluster: $(VENV)/.dev
	@echo "Installing the Triton client, the PostgreSQL driver and the embedder into $(VENV)"
	@$(PIP) -e '.[cpu,dev,postgres,triton,embedder,onnx]'
	@touch $@

$(VENV)/.bench: $(VENV)/.core
	@echo "Installing the benchmark's rivals into $(VENV)"
	@$(PIP) -e '.[cpu,bench]'
	@touch $@

$(VENV)/.comparison: $(VENV)/.bench
	@echo "Installing LanceDB into $(VENV); without it the comparison goes on and says so"
	@$(PIP) lancedb || true
	@touch $@

demo: $(VENV)/.core  ## the main job on real templates, start to finish
	@$(BIN)/matcher demo

test: $(VENV)/.dev  ## lint, types and the default tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -n $(CORES) --dist worksteal -m 'not slow and not cluster'
	@$(MAKE) --no-print-directory test-gpu-interpreted

test-cluster: $(VENV)/.cluster  ## the tests on a real Triton server, which is set up in .venv-triton
	@$(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder -m 'cluster and not slow' \
	    tests/cluster/test_numpy_1.py tests/cluster tests/contract  # the longest first

cluster-demo: $(VENV)/.cluster  ## a cluster loses a server: what changes and what does not; needs PostgreSQL 15 or newer
	@$(BIN)/python -m benchmarks.cluster_demo

bench-cluster: $(VENV)/.cluster  ## the search through gateway and Triton beside the same engine in process
	@$(BIN)/python -m benchmarks.cluster

$(GPU_SITE)/.ready: | $(VENV)/.dev
	@echo "Installing torch and the Triton language into $(GPU_SITE)"
	@$(PIP) --upgrade --target $(GPU_SITE) $(TORCH) triton
	@touch $@

test-gpu-interpreted: $(VENV)/.dev  ## the GPU scanner's tests in the Triton language's interpreter; part of make test
	@if $(MAKE) --no-print-directory $(GPU_SITE)/.ready; then \
	    $(WITH_TORCH) -m pytest -n $(CORES) --confcutdir=tests/gpu -m 'not slow' tests/gpu; \
	elif [ -n "$$CI" ]; then exit 1; \
	else echo "Skipped the tests of the GPU scanner: torch cannot be installed here"; fi

test-gpu: $(GPU_SITE)/.ready  ## the same tests on this machine's GPU, at sizes for one
	@MATCHER_TEST_GPU=1 $(WITH_TORCH) -m pytest --confcutdir=tests/gpu tests/gpu tests/unit/test_gpu_faiss.py

bench-gpu: $(GPU_SITE)/.ready  ## the GPU scanner beside its rivals, and the ceilings of this machine's GPU
	@$(WITH_TORCH) -m benchmarks.gpu

test-long: $(VENV)/.dev $(VENV)/.cluster  ## the long forms: crash loops, state machines, mutations, upgrades and supervision of a cluster
	@$(BIN)/python -m pytest -m 'slow and not cluster'
	@$(BIN)/python -m pytest -m 'slow and cluster' tests/cluster

test-ops: $(VENV)/.ops $(VENV)/.cluster  ## rules, fault drills, dashboards, manifests, image; needs prometheus, skips what is missing
	@$(BIN)/python -m pytest -n $$((2 * $(CORES))) --dist worksteal -m 'not slow' tests/ops  # drills mostly wait

dashboards: $(VENV)/.ops $(VENV)/.bench  ## minutes of Locust in a real Prometheus, every dashboard drawn to build/dashboards
	@$(BIN)/python -m pytest -m slow tests/ops/test_load.py

drills: $(VENV)/.ops $(VENV)/.cluster  ## the fault drills in real time, as a deployment would see them
	@MATCHER_DRILL_PACE=1 $(BIN)/python -m pytest -n 4 tests/ops/test_drills.py tests/ops/test_drills_cluster.py

lock: $(VENV)/.dev  ## lock what the images install, each wheel by its hash
	@$(BIN)/python -m ops.lock

sbom: $(VENV)/.ops  ## what the images hold, as CycloneDX in build/sbom
	@$(BIN)/python -m ops.sbom build/sbom

ops-files: $(VENV)/.dev  ## regenerate docs/METRICS.md and the PrometheusRule
	@$(BIN)/python -m ops.generate

lint: $(VENV)/.dev  ## ruff, mypy, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: bench-search bench-gateway bench-access bench-load bench-comparison  ## the benchmark tables

bench-search: $(VENV)/.bench  ## exact search beside its rivals
	@$(BIN)/python -m benchmarks.search

bench-gateway: $(VENV)/.bench  ## what the path from socket to decision costs, station by station
	@$(BIN)/python -m benchmarks.gateway

bench-access: $(VENV)/.bench  ## what access control and the audit cost, beside the same without
	@$(BIN)/python -m benchmarks.access

bench-load: $(VENV)/.bench  ## latency against load, then edge nodes and clerks on a match day
	@$(BIN)/python -m benchmarks.open_loop --png docs/latency-against-rate.png
	@$(BIN)/locust -f benchmarks/locustfile.py --headless --only-summary --shape match-day

bench-soak: $(VENV)/.bench  ## memory and open files over half an hour of ordinary use
	@$(BIN)/python -m benchmarks.soak

bench-comparison: $(VENV)/.comparison  ## this service beside what one would use instead
	@$(BIN)/python -m benchmarks.comparison

wire: $(VENV)/.dev  ## regenerate the code of matcher_service/wire/matcher.proto
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=. \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy matcher_service/wire/matcher.proto

clean:  ## remove the virtual environment and the caches
	@rm -rf $(VENV) $(GPU_SITE) .venv-triton .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
