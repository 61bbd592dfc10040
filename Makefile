# The commands of the README. Each makes its own environment in .venv the first time.
PYTHON ?= python3
# OLDEST=1, for make or in the environment of .ci/run: with the oldest versions of torch and triton that are supported.
OLDEST ?=
VENV ?= .venv$(if $(OLDEST),-oldest)
BIN = $(VENV)/bin
CONSTRAINTS = $(VENV)/constraints.txt

.PHONY: demo demo-emulated test slow machine coverage exam compile lint docs clean
demo: $(VENV)/installed
	$(BIN)/python -m fastlayers demo

# The same on compiled kernels, in the emulator of tests/ptx_machine: one epoch of each network.
demo-emulated: $(VENV)/installed
	$(BIN)/python tests/ptx_machine -m fastlayers demo --epochs 1

# SHARE=0/8 is the first of eight shares.
SHARE ?= 0/1
test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto -m "not slow and not long and not exam" --share $(SHARE)

# What `make test` leaves out, because it takes long and rarely tells anything new.
slow: $(VENV)/installed
	$(BIN)/python -m pytest -n auto -m "slow and not long and not exam" --share $(SHARE)

# Every kernel's compiled code, run in the emulator of tests/ptx_machine; ONLY=half0 and ONLY=half1 are a half each.
ONLY ?= half
machine: $(VENV)/installed
	$(BIN)/python -m pytest -n auto -m long -k "$(ONLY)"

# The same, of what is new; what has passed goes into tests/ptx_machine/coverage.json.
coverage: $(VENV)/installed
	$(BIN)/python tests/ptx_machine/update_coverage.py

# Models of transformers and timm, tiny, trained on the kernels. timm without torchvision, which it imports for images and PyPI
# builds against CUDA's torch.
exam: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[demo,test,exam]"
	$(BIN)/pip install --quiet --no-deps "$$(grep '^timm==' $(CONSTRAINTS))"
	$(BIN)/python -m pytest -n auto tests/exam

# The kernels compiled for six GPU generations, and their machine code compared with what is committed; needs no GPU.
compile: $(VENV)/installed
	$(BIN)/python -m bench audit

# pyright reads torch's own annotations, and names that the oldest torch doesn't have; so it runs with the newest alone.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(OLDEST),,$(BIN)/pyright --pythonpath $(BIN)/python)

# The site, into site/: warnings are errors. The variable silences a notice that
# mkdocs-material has a successor and is kept up until May 2027.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# torch first and by exact version: asked for by anything else, pip may take another build of it.
$(VENV)/installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)
	awk -F == '!pinned[$$1]++' $(if $(OLDEST),constraints-oldest.txt) constraints.txt > $(CONSTRAINTS)
	$(BIN)/pip install --quiet "$$(grep '^torch==' $(CONSTRAINTS))" "$$(grep '^triton==' $(CONSTRAINTS))"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[demo,test]"
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
