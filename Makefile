# Everything starts from nothing: `make demo` and `make test` create .venv, install, and fetch what they need.
# A stamp file a step makes a second run take seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
CXX ?= c++

.PHONY: help demo test test-gpu test-slow test-ray lint format clean

help:
	@echo "make demo   install what running needs and answer a question with the default model"
	@echo "make test   install the test extras, lint, run the whole suite"
	@echo "make lint   ruff; make format writes its fixes"
	@echo "make test-gpu, make test-slow, make test-ray   the checks that need a GPU, minutes, or Ray"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Where there is no C++ compiler the model runs on torch, pinned: an open range may resolve to a far larger build.
$(VENV)/.core: pyproject.toml setup.py $(wildcard csrc/cpu/*) | $(BIN)/python
	command -v $(CXX) >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[train,test]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/martlet infer --prompt "What is the capital of France?" --temperature 0 --max_new_tokens 64

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/martlet models pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m "not gpu and not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not ray"

test-ray: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[ray]'
	$(BIN)/martlet models pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m ray

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache
