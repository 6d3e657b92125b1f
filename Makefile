# Every target sets itself up: a virtual environment in $(VENV), filled once and again when pyproject.toml changes.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# The torch build: any pip requirement, with pip options if you like (a CUDA build, an index, a wheel file).
TORCH ?= torch==2.13.0
# Passed on to pytest, e.g. make test ARGS="-k golden"
ARGS ?=

BIN := $(VENV)/bin
# Another TORCH is another stamp, so that it gets installed.
TORCH_STAMP := $(VENV)/.installed-torch-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
export OMP_NUM_THREADS ?= 2

# The whole of slime without a GPU: an environment of its own, whose numpy and SGLang the tests' own cannot have.
WHOLE_VENV ?= .venv-whole
SGLANG_VERSION ?= 0.5.15.post1
WHOLE_STAMP := $(WHOLE_VENV)/.installed-loop-$(SGLANG_VERSION)

.PHONY: help demo demo-slime compare evidence rehearsal-env test test-slime test-whole test-cluster bench bench-gpu screenshots lint clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed-local ## train a small model with FIPO on this machine (about 2 minutes, CPU)
	$(BIN)/slime-fipo local --save runs/demo --fipo-record runs/demo/records --fipo-record-interval 3 $(ARGS)

demo-slime: $(WHOLE_STAMP) ## the demo's task through slime's own train.py, no GPU: SLIME_ROOT=… MEGATRON_ROOT=…
	$(WHOLE_VENV)/bin/python -m slime_fipo.rehearsal.demo --slime-root "$(SLIME_ROOT)" --megatron-root "$(MEGATRON_ROOT)" $(ARGS)

rehearsal-env: $(WHOLE_STAMP) ## an environment whose bin/slime-fipo can rehearse a launch command without a GPU (3.2 GB)
	@echo "$(abspath $(WHOLE_VENV))/bin/slime-fipo rehearse --slime-root … --megatron-root … -- <train command>"

compare: $(VENV)/.installed-local ## a paired study: DAPO, FIPO and its placebos, 12 seeds (hours, CPU; continues if interrupted)
	$(BIN)/slime-fipo compare $(ARGS)

# One --save: the ablations share base models and the runs of FIPO 7b with the first six seeds.
EVIDENCE := $(BIN)/slime-fipo compare --save runs/evidence $(ARGS)
evidence: $(VENV)/.installed-local ## every number of docs/evidence/: the study and the ablations (hours, CPU; continues)
	$(EVIDENCE) --results docs/evidence/dapo
	$(EVIDENCE) --results docs/evidence/fipo-7b --baseline "FIPO 7b"
	$(EVIDENCE) --results docs/evidence/ablations --arms ablations --seeds 6

test: $(VENV)/.installed-dev ## all tests that need neither a cluster nor a GPU
	$(BIN)/python -m pytest -m "not cluster" $(ARGS)

test-slime: $(VENV)/.installed-dev $(VENV)/.installed-sglang ## tests against a checkout of slime: SLIME_ROOT=… [MEGATRON_ROOT=…]
	$(BIN)/python -m pytest -m slime $(ARGS)

test-whole: $(VENV)/.installed-dev $(WHOLE_STAMP) ## slime, Megatron-LM, SGLang and Ray whole, no GPU: SLIME_ROOT=… MEGATRON_ROOT=…
	WHOLE_PYTHON="$(abspath $(WHOLE_VENV))/bin/python" $(BIN)/python -m pytest -m whole $(ARGS)

test-cluster: $(VENV)/.installed-dev $(VENV)/.installed-cluster ## launch scripts on real Ray and real Slurm, on this machine
	$(BIN)/python -m pytest -m cluster $(ARGS)

bench: $(VENV)/.installed-dev ## the README's figures on cost, on a CPU
	$(BIN)/python -m benchmarks.bench

bench-gpu: $(VENV)/.installed-dev ## cost on a CUDA device
	$(BIN)/python -m benchmarks.gpu

screenshots: $(VENV)/.installed-dev demo ## the README's pictures, from the demo's run; needs Chromium
	$(BIN)/python -m benchmarks.screenshots runs/demo

lint: $(VENV)/.installed-dev ## ruff, as pre-commit runs it
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove the virtual environments; runs/ stays
	rm -rf -- "$(VENV)" "$(WHOLE_VENV)"

# torch first and alone, so that nothing that depends on it chooses another build.
$(TORCH_STAMP):
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	touch $@

$(VENV)/.installed-%: pyproject.toml $(TORCH_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

# The parser's flags are all that slime's tests need of SGLang; its dependencies are for GPUs.
$(VENV)/.installed-sglang: $(VENV)/.installed-slime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps sglang sglang-router
	touch $@

$(WHOLE_STAMP): pyproject.toml
	$(MAKE) VENV="$(WHOLE_VENV)" "$(WHOLE_VENV)/.installed-whole"
	$(WHOLE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		"sglang==$(SGLANG_VERSION)" sglang-router==0.3.2
	touch $@

.PRECIOUS: $(TORCH_STAMP) $(VENV)/.installed-%
