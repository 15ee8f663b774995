# make setup   environment in .venv, idempotent
# make train   the main job: DGL on the embedded data, backprop beside it (a few minutes, 2 cores)
# make test    all tests
# make quick   a quick part of the tests; TESTS="FILE ..." of these only
# make slow    the other tests
# make smoke   all methods, a kill, a search ... on the devices at hand: SIZE=tiny on a CPU
# make lint    formatting and lint

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
SIZE ?= full
BIN = $(VENV)/bin
# A host with an NVIDIA GPU gets jax with CUDA.
REQUIREMENTS = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo requirements-cuda.txt || echo requirements.txt)
STAMP = $(VENV)/.installed

.PHONY: setup train test quick slow smoke lint clean

setup: $(STAMP)

$(STAMP): requirements.txt requirements-cuda.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS) -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

QUICKSTART = experiments/train.py --config=experiments/configs/quickstart.py

train: setup
	$(BIN)/python $(QUICKSTART) --workdir=runs/quickstart
	$(BIN)/python $(QUICKSTART) --workdir=runs/quickstart_backprop --config.method.name=backprop
	$(BIN)/python experiments/compare.py runs/quickstart runs/quickstart_backprop

test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

quick: setup
	$(BIN)/python -m pytest $(TESTS) -n 2 --dist loadfile -m "not slow"

slow: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -m slow

smoke: setup
	$(BIN)/python experiments/smoke.py --size=$(SIZE) --out=runs/smoke

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
