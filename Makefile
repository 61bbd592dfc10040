# The commands of the README. Each makes its own environment in .venv the first time.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test compile lint clean
demo: $(VENV)/installed
	$(BIN)/python -m fastlayers demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto

# The kernels compiled for six GPU generations, and their machine code compared with what is committed; needs no GPU.
compile: $(VENV)/installed
	$(BIN)/python -m bench audit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# torch first and by exact version: asked for by anything else, pip may take another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)" "$$(grep '^triton==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
