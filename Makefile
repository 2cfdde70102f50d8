# Everything starts from python3 alone: .venv -> uv -> the pinned, hashed requirements -> this package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= $(if $(wildcard backend/training/models/deep_hair_v1.safetensors),configs/rtx3060.yaml,configs/demo.yaml)

.PHONY: help demo test test-long lint serve lock clean

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DeepHair needs python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@echo "setting up $(VENV) (the first time downloads about 5 GB of packages)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(READY)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 18

demo: $(READY)  ## miniature photos -> training data -> trained, evaluated, deployed model; 8 minutes at most on 2 cores
	$(BIN)/deephair demo-data --config configs/demo.yaml
	$(BIN)/deephair run --config configs/demo.yaml; code=$$?; [ $$code -eq 0 ] || [ $$code -eq 3 ] || exit $$code
	@echo "report: runs/demo/report/index.html     try it on: make serve"

# One process of tests and one thread for each of two cores.
test test-long: export OMP_NUM_THREADS := 1
test: $(READY)  ## the tests, 8 minutes at most on 2 cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long"

test-long: $(READY)  ## what takes longer: kill and resume, fuzzing, the way to real weights on a stand-in hub
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m long --ignore tests/test_app_fuzz.py
	$(BIN)/python -m pytest -q -m long tests/test_app_fuzz.py  # its tests share one name, of which processes would run one

lint: $(READY)  ## formatting, types, import rules
	$(BIN)/ruff format --check backend tests benchmarks
	$(BIN)/ruff check backend tests benchmarks
	$(BIN)/mypy backend
	$(BIN)/lint-imports

serve: $(READY)  ## the deployed model (the demo's where no other is) on 127.0.0.1:8000
	$(BIN)/deephair serve --config $(CONFIG)

lock:  ## renew requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --extra dev pyproject.toml --output-file requirements.lock

clean:  ## removes .venv and runs
	rm -rf runs $(VENV)
