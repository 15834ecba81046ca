# `make demo` and `make test` work on a clean clone: each makes its own virtual environment first (with uv where it is there, else
# with venv and pip), in the versions of constraints.txt. A second call finds the stamp and starts at once.

PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-frameworks lint bench clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: .venv-demo/stamp ## train a small detector from scratch on drawn shapes, evaluate it and draw what it finds
	rm -rf runs/demo
	.venv-demo/bin/python tools/train_det.py --config configs/demo_shapes.yaml --output runs/demo
	@echo "The drawn detections lie in runs/demo/samples"

test: .venv-test/stamp ## every test but the slow ones
	.venv-test/bin/python -m pytest -q -n 2

test-slow: .venv-test/stamp ## the slow tests: kill and resume, short trainings
	.venv-test/bin/python -m pytest -q -m slow

test-gpu: .venv-test/stamp ## the tests that need a CUDA device
	.venv-test/bin/python -m pytest -q -m gpu

test-frameworks: .venv-frameworks/stamp ## our networks in MMDetection, in an environment of its own; detectron2 where it is installed
	.venv-frameworks/bin/python -m pytest -q tests/frameworks tests/resbackbone/integrations/test_integration_docs.py

lint: .venv-dev/stamp ## ruff (lint and format) and mypy, as pre-commit runs them
	.venv-dev/bin/python -m ruff check .
	.venv-dev/bin/python -m ruff format --check .
	.venv-dev/bin/python -m mypy

bench: .venv-test/stamp ## the side-by-side ratios of benchmarks/
	@for script in benchmarks/bench_*.py; do [ -e "$$script" ] || continue; echo "== $$script"; .venv-test/bin/python "$$script" || exit 1; done

clean: ## remove the environments and what building and testing left; runs/ stays
	rm -rf .venv-demo .venv-test .venv-frameworks .venv-dev build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What each environment holds besides the project itself.
.venv-demo/stamp: EXTRAS = [fast]
.venv-test/stamp: EXTRAS = [fast,timm,test]
.venv-frameworks/stamp: EXTRAS = [timm,test]
.venv-frameworks/stamp: MORE = onedl-mmengine==0.10.12 onedl-mmcv==2.3.6 onedl-mmdetection==3.5.1
.venv-dev/stamp: EXTRAS = [dev]

.venv-%/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@rm -rf $(@D)
	@echo "installing .$(EXTRAS) into $(@D) in the versions of constraints.txt; once"
	@if uv --version >/dev/null 2>&1; then \
	  uv venv --quiet --python "$(PYTHON)" $(@D) && uv pip install --quiet --python $(@D)/bin/python -c constraints.txt -e ".$(EXTRAS)" $(MORE); \
	else \
	  "$(PYTHON)" -m venv $(@D) && $(@D)/bin/python -m pip install --quiet -c constraints.txt -e ".$(EXTRAS)" $(MORE); \
	fi
	@touch $@
