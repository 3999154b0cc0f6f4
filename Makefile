# `make run` and `make test` set up everything they need in .venv by themselves.
PYTHON ?= python3
GPUS ?= 2
# Files of tests at a time: twice two cores, since some mostly wait.
TEST_WORKERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
# Tests start hundreds of processes, each of which would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test check format clean

run: $(VENV)/installed  ## the main job: the demo model on GPUS ranks (cards, or CPU processes where there are none)
	$(BIN)/torchrun -m launcher gpus=$(GPUS)

test: $(VENV)/installed  ## every test that needs no card
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

# DeepSpeed's ops are not compiled: the parts used here are plain Python, and no CUDA toolkit is needed.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
