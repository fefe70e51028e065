# Everything runs in .venv, which `setup` makes. Choose another Python with `make setup PYTHON=python3.12`.
# DeepSpeed looks for `ninja` on the PATH when it compiles its kernels; it is in .venv/bin.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
# Threads of OpenMP that wait for one another would spin on cores that other processes need (tests/bench/NOTES.md).
SHARED := OMP_WAIT_POLICY=passive

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-models test-ray test-engine test-slow test-tokenizers test-api-server bench bench-data bench-memory bench-ppo bench-preference bench-train matrix techniques lint format clean
# Checks go from quick to slow, and two test runs at once would starve each other.
.NOTPARALLEL:

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

setup: ## make .venv, or bring it up to date (well under a second when it is)
	@bash cluster/setup.sh

demo: setup ## train a small model from start to finish on this machine
	$(RUN) .venv/bin/python jobs/demo.py

test: lint test-unit test-models test-ray test-engine ## lint, types and all tests: what CI runs

test-unit: setup ## tests that need no Ray
	$(RUN) OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/unit --numprocesses auto --maxprocesses 4 --dist loadfile

test-models: setup ## a dozen model types of widely different architecture, from `make matrix`
	$(RUN) $(SHARED) .venv/bin/python -m pytest tests/matrix

test-ray: setup ## tests on a local Ray cluster
	$(RUN) $(SHARED) .venv/bin/python -m pytest tests/ray -m "not slow"

test-engine: setup ## tests with vLLM engines, alone and as a fleet
	$(RUN) $(SHARED) .venv/bin/python -m pytest tests/engine -m "not slow"

test-slow: setup ## tests on Ray that start the workers several times, kill them, or run the recipes (long)
	$(RUN) $(SHARED) .venv/bin/python -m pytest tests/ray tests/engine -m slow

test-tokenizers: setup ## chat templates and cuts with ten real tokenizers (downloads 77 MB once)
	$(RUN) bash tests/real_tokenizers.sh

test-api-server: setup ## the manifests and a real API server, built once from Debian's sources: CRDS=FOLDER of KubeRay's CRDs
	$(RUN) bash tests/api_server.sh "$(CRDS)"

matrix: setup ## every causal model type of transformers: train, save, load, merge; writes tests/matrix/matrix.md (five minutes)
	$(RUN) PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python tests/matrix/run_matrix.py

techniques: setup ## every method with every feature under every DeepSpeed stage, but for the cells that techniques.jsonl has (an hour)
	$(RUN) PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python tests/matrix/techniques.py --results tests/matrix/techniques.jsonl

bench: setup ## measure training speed on this machine
	$(RUN) .venv/bin/python tests/bench/bench_train.py

bench-memory: setup ## measure the memory of each memory-saving technique (needs bitsandbytes for two rows)
	$(RUN) .venv/bin/python tests/bench/bench_memory.py

bench-ppo: setup ## measure engines against generation in the trainer, and the memory of one base against four models
	$(RUN) .venv/bin/python tests/bench/bench_ppo.py
	$(RUN) .venv/bin/python tests/bench/bench_ppo_memory.py

bench-preference: setup ## measure preference training against TRL's DPOTrainer (eight minutes)
	$(RUN) .venv/bin/python tests/bench/bench_preference.py

bench-train: setup ## measure supervised fine-tuning against LlamaFactory, which it installs in the user's cache (15 minutes)
	$(RUN) .venv/bin/python tests/bench/bench_llamafactory.py

bench-data: setup ## measure the data stream on this machine (makes a 3 GB file in the temporary folder)
	$(RUN) .venv/bin/python tests/bench/bench_data.py

lint: setup ## ruff check, ruff format --check, mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: setup ## rewrite the code as ruff formats it, with its safe fixes
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format

# The stamp goes first: a clean that is interrupted must not leave half a .venv that counts as whole.
clean: ## remove what was made here: .venv, caches, build leftovers, runs/
	rm -f .venv/.rayloom-stamp
	rm -rf .venv .venv.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist platform/*.egg-info runs
	find cluster jobs platform tests -name __pycache__ -type d -prune -exec rm -rf {} +
