# Each target stands alone: on a machine with Python 3.11 or newer it makes .venv, installs and runs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILT_FROM := pyproject.toml setup.py fastensdistill/kernels/extension.py $(wildcard csrc/*)

.PHONY: demo test lint clean

demo: .venv/.demo
	$(BIN)/fastensdistill demo

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv .venv

# PyTorch comes first: the extension is built against the one it finds.
.venv/.torch: .venv/bin/python
	$(PIP) 'torch>=2.10' torchvision
	touch $@

.venv/.demo: .venv/.torch $(BUILT_FROM)
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.torch $(BUILT_FROM)
	$(PIP) --editable '.[dev,tensorboard,onnx]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
