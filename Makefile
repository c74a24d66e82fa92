# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check api chaos soak bench-core bench-heads bench-data bench-ingest bench-scale bench-rlds bench-plan bench-post-train fuzz system clean cluster-test manifests

demo: $(INSTALLED) system
	$(BIN)/jepa demo dir=runs/demo

# Three random kills of ingestion (`pytest -m ingest` alone makes fifty), and a sample of what `make chaos` does. Two files at a time:
# most tests wait for clusters to start.
test: $(INSTALLED) system
	JEPA_TEST_KILLS=$${JEPA_TEST_KILLS:-3} $(BIN)/python -m pytest --ignore tests/test_bench_data.py -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@$(BIN)/python infra/audit.py

# Pages of every module, class and function from their docstrings: runs/api/index.html
api: $(INSTALLED)
	@rm -rf runs/api
	@PDOC_ALLOW_EXEC=1 $(BIN)/python -m pdoc --docformat markdown --no-include-undocumented --output-directory runs/api jepa_core pipelines cluster
	@echo runs/api/index.html

# One pretraining step against transformers' layers, and against a reference checkout: make bench-core ARGS="--reference PATH"
bench-core: $(INSTALLED)
	$(BIN)/python tests/bench/bench_core.py $(ARGS)

# What 20 heads of an attentive probe cost beside one, by size of the tokens and depth: make bench-heads ARGS="vit_small 4"
bench-heads: $(INSTALLED)
	$(BIN)/python tests/bench/bench_heads.py $(or $(ARGS),tiny 1)

# CPU time of a training clip against decord and torchcodec, requests, and what feeding a trainer costs. Takes half an hour;
# make bench-data ARGS="--clips FOLDER --minutes 30". torchcodec and the floor need FFmpeg: apt-get install ffmpeg
bench-data: $(INSTALLED)
	@$(BIN)/python -c "import decord, torchcodec" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[bench]' || echo "decord and torchcodec are measured where they can be installed"
	$(BIN)/python tests/bench/bench_data.py $(ARGS)

# Memory and open files of a pretraining run over ten minutes, plotted to runs/soak: make soak ARGS="--minutes 30"
soak: $(INSTALLED)
	$(BIN)/python tests/bench/soak.py $(ARGS)

# All faults that training must survive; `make test` has a sample.
chaos: $(INSTALLED)
	JEPA_CHAOS=all $(BIN)/python -m pytest -m "chaos or guard" tests

# Jobs, schedules and nodes that vanish, on Ray clusters of their own; `make test` has a sample.
cluster-test: $(INSTALLED)
	JEPA_CHAOS=all $(BIN)/python -m pytest -m cluster tests

# Requests, bytes and files per second of ingestion by container, and how it scales: make bench-ingest ARGS="--endpoint URL"
bench-ingest: $(INSTALLED)
	$(BIN)/python tests/bench/bench_ingest.py $(ARGS)

# Catalogs of 0.1, 1 and 10 million videos: re-scan, epoch plan, diff, sample. Takes half an hour.
bench-scale: $(INSTALLED)
	$(BIN)/python tests/bench/bench_scale.py $(ARGS)

# Seconds and operations of a planned action beside the same search as the reference does it: make bench-plan ARGS="--size medium"
bench-plan: $(INSTALLED)
	$(BIN)/python tests/bench/bench_plan.py $(ARGS)

# Post-training on cached tokens beside online encoding, in turn: make bench-post-train ARGS="--steps 100 --rounds 3"
bench-post-train: $(INSTALLED)
	$(BIN)/python tests/bench/bench_post_train.py $(ARGS)

# MB/s of reading RLDS on one core, checksums included: make bench-rlds ARGS="--mb 512", or ARGS="--shard FILE"
bench-rlds: $(INSTALLED)
	$(BIN)/python tests/bench/bench_rlds.py $(ARGS)

# 10,000 hostile files; `make test` reads 500 of them.
fuzz: $(INSTALLED)
	$(BIN)/python tests/bench/fuzz.py --count 10000 --seed 0 $(ARGS)

# Render every overlay of infra/kubernetes to runs/manifests and check it, a line each. ARGS="--crds FOLDER" checks with KubeRay's own CRDs.
manifests: $(INSTALLED)
	$(BIN)/python -m cluster.overlays $(ARGS)

# Headless OpenGL for the simulated robot; says what to install where it cannot do so itself.
system: $(INSTALLED)
	@infra/system-packages $(BIN)/python

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: apt-get install python3.11 python3.11-venv, or set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .import_linter_cache
