# `make demo`: a Babai-quantized model answers over the OpenAI API.   `make test`: every check, no GPU or network needed.
# Both set up .venv themselves, once.

VENV := .venv/bin
CODE := vllm_babai offline triton_kernels deploy tests

.PHONY: demo test lint format setup clean

demo: setup
	@$(VENV)/python deploy/demo/demo.py

test: lint
	$(VENV)/python -m pytest

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
