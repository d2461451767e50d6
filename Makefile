# Two commands matter: `make demo` (tilt a real flow, read the verdict) and `make test`.
# Everything runs from .venv, which `make setup` builds once from nothing but a Python >= 3.11.

PYTHON ?= python3
# For a machine whose default torch is a CUDA build of several GB:
#   make setup TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=
OMP_NUM_THREADS ?= 2
# Threads that wait must not spin: on a busy machine spinning costs an order of magnitude.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_NUM_THREADS OMP_WAIT_POLICY

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
STAMP := $(VENV)/.installed

# The main job, and the benchmark: what `make demo` and `make bench` pass to tiltflow.
DEMO ?= finetune --base digits --reward thickness --strength 3 --out runs/demo --overwrite
BENCH ?= bench tilt

.PHONY: setup demo test test-all test-energies energy-ani energy-aimnet2 energy-xtb bench docs lint fuzz audit clean clean-venv

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tiltflow needs Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
ifneq ($(strip $(TORCH_INDEX_URL)),)
	$(PIP) --no-deps --index-url $(TORCH_INDEX_URL) torch
endif
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/tiltflow $(DEMO)

# One process per core and one thread per process: tests are too small for more threads each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(OMP_NUM_THREADS) --dist loadfile

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

# Molecular energies whose packages exclude each other: `make energy-xtb` builds .venv-energy-xtb, which is .venv and tblite.
ENERGIES := ani aimnet2 xtb

$(ENERGIES:%=energy-%): energy-%: .venv-energy-%/.energy

.venv-energy-%/.energy: requirements/energy-%.txt pyproject.toml constraints.txt
	$(MAKE) --no-print-directory setup VENV=.venv-energy-$*
	.venv-energy-$*/bin/python -m pip install --disable-pip-version-check -q --no-deps -r $<
	@touch $@

test-energies: $(ENERGIES:%=energy-%)
	set -e; for energy in $(ENERGIES); do \
		.venv-energy-$$energy/bin/python -m pytest tests/test_molecular_energies.py; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# 10,000 inputs of every kind; `make test` tries a few.
FUZZ ?= 10000

fuzz: setup
	TILTFLOW_FUZZ=$(FUZZ) $(PYTEST) tests/test_fuzz.py

# Known holes in what is installed (asks the vulnerability database of PyPI), and doubtful calls in the source.
audit: setup
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install -q pip-audit bandit; }
	.venv-audit/bin/bandit -q -r tiltflow -c pyproject.toml
	.venv-audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

bench: setup
	$(BIN)/tiltflow $(BENCH)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean:
	rm -rf site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV) .venv-audit $(ENERGIES:%=.venv-energy-%)
