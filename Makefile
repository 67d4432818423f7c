# make help lists the targets. The first one that runs makes .venv with what it needs; none does that twice.

PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests, each with one thread.
WORKERS ?= auto
# Further settings, as in make demo DEMO_ARGS="run.seed=1"
DEMO_ARGS ?=
# Further options of pytest, as in make bench BENCH_ARGS="--full"
BENCH_ARGS ?=

BIN := $(VENV)/bin
# Byte code is made on first use: doing it for every module of every package takes longer than the download. Where the
# environment forbids it, every process would compile PyTorch's sources anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:benchmark -n $(WORKERS) --maxprocesses 8 --dist worksteal tests
# Where `make test-wheel` works, and which tests it runs; it takes another PyTorch, too (TORCH=torch==2.14.1).
WHEEL := build/wheel
WHEEL_INSTALL := $(WHEEL)/venv/bin/python -m pip --disable-pip-version-check install -q --no-compile
TEST_WHEEL ?= tests
TORCH := $(shell sed -n '/^torch==/p' requirements.txt)
# The oldest Triton that the kernels must compile under, in a folder that only their tests look into.
OLDEST_TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-wheel bench lint docs clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "PYTHON=python3.12 chooses the interpreter for a new $(VENV). PyTorch comes from where pip looks, on Linux with CUDA;"
	@echo "PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds before the first run gets the smaller one."

demo: $(VENV)/.built ## Post-train a small Stable Diffusion 3 pipeline with STAR and show what it gained
	$(BIN)/star-train tiny $(DEMO_ARGS)

test: $(VENV)/.built-dev ## Run the tests but the exhaustive ones
	$(PYTEST) -m "not exhaustive"

test-all: $(VENV)/.built-dev $(VENV)/.installed-triton-3.6 ## Run all tests
	$(PYTEST)

# In an environment that has never seen this checkout. The tests come out of the sdist, whose packages are taken away so that
# only the installed ones are left to import; what tests those files themselves stays out with them, and so does what needs
# the scripts that made the small models, which no wheel has.
test-wheel: ## Build an sdist and a wheel in build/wheel/dist, and run the tests against the installed wheel
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL_INSTALL) '$(TORCH)'
	sed '/^-r/d; /^torch==/d; /^triton/d' requirements.txt requirements-dev.txt > $(WHEEL)/requirements.txt
	$(WHEEL_INSTALL) -r $(WHEEL)/requirements.txt
	STAR_KERNELS_NAME_TORCH=1 $(WHEEL)/venv/bin/python -m build --no-isolation --outdir $(WHEEL)/dist
	$(WHEEL_INSTALL) $(WHEEL)/dist/*.whl
	mkdir $(WHEEL)/tree
	tar -xzf $(WHEEL)/dist/*.tar.gz --strip-components 1 -C $(WHEEL)/tree
	rm -r $(WHEEL)/tree/star_kernels* $(WHEEL)/tree/python
	cd $(WHEEL)/tree && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -q -p no:benchmark -n $(WORKERS) --maxprocesses 8 \
		--dist worksteal -m "not exhaustive" --ignore tests/test_package.py --ignore tests/test_docs.py \
		--ignore-glob 'tests/trainer/worlds/test_tiny_*.py' $(TEST_WHEEL)

bench: $(VENV)/.built-dev ## Measure the operators, a rollout and an update against their unfused baselines
	$(BIN)/python -m pytest -q bench --benchmark-quiet $(BENCH_ARGS)

lint: $(VENV)/.built-dev ## Check style, formatting, types and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.installed-dev ## Build the site from docs/ into build/site; what is not as it should be is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

clean: ## Remove what was built and installed; runs/ stays
	rm -rf $(VENV) build dist *.egg-info star_kernels/_C*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find star_kernels python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch comes first and alone, so that nothing after it brings a second one.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "star-kernels needs Python 3.10 or newer (make PYTHON=...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) and the packages of requirements.txt into $(VENV) (once; some minutes)"
	$(INSTALL) $(TORCH)
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(INSTALL) -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-triton-3.6: | $(VENV)/.installed
	@echo "Installing the oldest supported Triton into $(VENV)/triton-3.6, for the tests that compile kernels"
	$(INSTALL) --no-deps --upgrade --target $(VENV)/triton-3.6 '$(OLDEST_TRITON); sys_platform == "linux"'
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(wildcard csrc/*)
	@echo "Building the C++ extension (about a minute)"
	$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.built-dev: $(VENV)/.built $(VENV)/.installed-dev
	@touch $@
