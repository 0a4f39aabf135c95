# What a checkout can do. `make help` lists it.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO ?= demo
GPU_ARGS ?= -p tests.gpu_run --results gpu-tests.jsonl --limit 60 -m gpu -v -n 8 --dist worksteal

BIN := .venv/bin
RUNTIME := .venv/.runtime
INSTALLED := .venv/.installed

# Two test processes with one thread each finish sooner than one with two, and add numbers in a fixed order.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all gpu bench catalogue docs lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNTIME) ## prune the embedded model by four methods, side by side; results in demo/
	$(BIN)/admm-prune compare --model embedded --data embedded --methods magnitude,wanda,sparsegpt,admm \
		--sparsity 0.5,0.7 --pattern 2:4 --samples 32 --eval-samples 32 --overwrite --out $(DEMO) \
		$(if $(wildcard $(DEMO).partial),--resume) # an interrupted demo is continued

test: $(INSTALLED) ## the tests, without those marked slow or gpu
	$(ONE_THREAD) $(PYTEST) $(PYTEST_ARGS)

test-all: $(INSTALLED) ## every test that this machine can run
	$(ONE_THREAD) $(PYTEST) $(PYTEST_ARGS) -m 'not gpu'
	@$(MAKE) --no-print-directory gpu

gpu: $(INSTALLED) ## the tests that need a CUDA device, in at most 4 minutes, into gpu-tests.jsonl; says so where there is none
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
		then TRITON_CACHE_DIR=$(CURDIR)/.triton timeout 240 $(PYTEST) $(GPU_ARGS) tests; else echo 'no CUDA device: the tests marked gpu are left out'; fi

bench: $(INSTALLED) ## micro-benchmarks of single operations, with lower bounds; benchmarks/README.md has the larger ones
	$(ONE_THREAD) $(PYTEST) benchmarks/micro -p no:xdist --benchmark-timer=time.process_time $(BENCH_ARGS)

catalogue: $(INSTALLED) ## try every solver on every problem and set, and write down what `list` and the docs show
	$(ONE_THREAD) $(BIN)/python scripts/write_catalogue.py
	$(BIN)/python scripts/write_reference.py
	$(BIN)/python -m benchmarks.results_page
	$(BIN)/python -m collection.page

docs: $(INSTALLED) ## the documentation as a site, in site/
	$(BIN)/zensical build --strict

lint: $(INSTALLED) ## ruff, mypy and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

clean: ## remove what was built, cached and demonstrated; .venv stays
	rm -rf build dist *.egg-info admm_prune/ops/_packed.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache demo demo.partial
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# What the demo runs. Where there is a compiler, this also builds the library of CPU kernels, admm_prune/ops/_packed.so.
# torch comes first, in a call of its own: a CPU build at hand is then taken, and later ranges leave it in place.
# Compiling all of the packages' 200 MB of source takes a minute. The demo imports a part of it, which Python compiles
# then; for the tests, whose processes are many, everything is compiled once.
$(RUNTIME): pyproject.toml constraints.txt setup.py $(wildcard admm_prune/csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("admm-prune needs Python 3.11 or newer: \
	make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[models,plots,cli]'
	@touch $@

$(INSTALLED): $(RUNTIME)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev]'
	-@$(BIN)/python -m compileall -qq -j 2 .venv/lib # some packages contain templates that are no Python
	@touch $@
