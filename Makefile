# `make demo`: a Babai-quantized model answers over the OpenAI API; `MODEL=…` takes another than the bundled one.
# `make test`: the checks, no GPU or network needed.
# `make test-all`: those marked `long`, too. All set up .venv themselves, once. tests/README.md tells what is where.

VENV := .venv/bin
CODE := vllm_babai offline triton_kernels deploy tests

# Two test files at a time, each on one thread; `make test WORKERS=` runs one after the other.
WORKERS := -n 2 --dist loadfile
test test-all: export OMP_NUM_THREADS := 1

.PHONY: demo test test-all faults lint format setup clean

demo: setup
	@$(VENV)/python deploy/demo/demo.py $(MODEL)

test: lint
	$(VENV)/python -m pytest $(WORKERS) -m "not long"

test-all: lint
	$(VENV)/python -m pytest $(WORKERS)

# Mistakes, damaged files and damage drawn at random, with a table of how each ended.
faults: setup
	$(VENV)/python -m pytest tests/faults

lint: setup
	$(VENV)/ruff check $(CODE)
	$(VENV)/ruff format --check $(CODE)
	@# mypy has to see the packages where they are imported from, all in vllm_babai.
	@rm -rf build/types && mkdir -p build/types
	@cp -rs $(CURDIR)/vllm_babai build/types && ln -s $(CURDIR)/offline $(CURDIR)/triton_kernels build/types/vllm_babai
	cd build/types && ../../$(VENV)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p vllm_babai

format: setup
	$(VENV)/ruff check --fix $(CODE)
	$(VENV)/ruff format $(CODE)

setup:
	@deploy/setup.sh

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
