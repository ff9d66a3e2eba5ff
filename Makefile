# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

ENGINES := .venv-engines
ENGINES_STAMP := $(ENGINES)/.installed
ENGINE_TESTS := tests/integration/engines

.PHONY: demo test test-all test-engines check format bench clean

demo: $(STAMP)
	$(BIN)/poise demo

test: $(STAMP)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -m "not gpu"

# The plug-in and the formats against the real vLLM and SGLang, without a GPU, in an environment of their own.
test-engines: $(ENGINES_STAMP)
	$(ENGINES)/bin/python -m pytest -q -rs -W default -p no:cacheprovider $(ENGINE_TESTS)

check: $(STAMP)
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -x tests/unit tests/property tests/architecture

format: $(STAMP)
	$(BIN)/ruff format src tests tools benchmarks
	$(BIN)/ruff check --fix src tests tools benchmarks

bench: $(STAMP)
	$(BIN)/poise bench reader --output benchmarks/results

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,dev]'
	touch $(STAMP)

$(ENGINES_STAMP): pyproject.toml constraints.txt $(ENGINE_TESTS)/requirements.txt
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(ENGINES)/bin/python -m pip install --quiet --no-deps --requirement $(ENGINE_TESTS)/requirements.txt && \
	$(ENGINES)/bin/python -m pip install --quiet --no-deps --upgrade --target $(ENGINES)/torchvision torchvision==0.28.0 && \
	for engine in vllm==0.33.0 sglang==0.5.23; do \
		$(ENGINES)/bin/python -m pip install --quiet --no-deps $$engine || echo "$$engine cannot be installed: its tests are skipped"; \
	done
	touch $(ENGINES_STAMP)

clean:
	rm -rf $(VENV) $(ENGINES)
