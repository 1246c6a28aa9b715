# A few verbs. Nothing but Python (3.10 to 3.13), make and git is expected on the machine; where it has a C compiler, our
# own kernels are built too.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
BIN = $(VENV)/bin
PIP = install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test oldest lint bench bench-check peers wheel demo-model clean

# The main job on real input; installs no torch.
demo: $(DEMO_VENV)/.ready
	$(DEMO_VENV)/bin/python demo/demo.py

test: $(VENV)/.ready lint wheel oldest
	$(BIN)/python -m pytest -n auto tests

# JetPack 6 has Python 3.10: where that interpreter is found, the tests that need no oracle run on it too, and a demo.
OLDEST = $(firstword $(shell for p in python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python); do \
	$$p -c 'import venv' 2>/dev/null && echo $$p; done))
OLDEST_TESTS = formats grounding image_loading serve_request tasks tensor_file
oldest:
ifeq ($(OLDEST),)
	@echo "python3.10 is not here: its tests are left out"
else
	test -d .venv-oldest || $(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/pip $(PIP) pytest hypothesis qwen_vl_utils -e ".[ort,export]"
	.venv-oldest/bin/python -m pytest --noconftest $(OLDEST_TESTS:%=tests/test_%.py)
	.venv-oldest/bin/python demo/demo.py out/oldest > /dev/null
endif

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Built and imported in an environment of its own, without torch.
wheel: $(VENV)/.ready
	rm -rf dist build
	$(BIN)/python -m build --quiet --wheel --outdir dist .
	rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip $(PIP) "$$(ls dist/*.whl)[ort]"
	cd dist && ../.venv-wheel/bin/python ../tests/wheel_check.py

# Our bundles of random weights of the 2B shape beside transformers: CHECKPOINT and BUNDLES name others.
CHECKPOINT ?= out/bench/2b
BUNDLES ?= out/bench/hybrid out/bench/int4
PEERS ?= transformers
ENGINES ?= ort-cpu
bench: $(VENV)/.ready
	test -e $(CHECKPOINT) || $(BIN)/python -m edgevl.benchmarks.random_checkpoint $(CHECKPOINT) --shape 2b
	for b in $(BUNDLES); do test -e $$b || $(BIN)/edgevl export $(CHECKPOINT) -o $$b \
		--precision $$(basename $$b) --no-verify || exit 1; done
	$(BIN)/python -m edgevl.benchmarks.peers $(CHECKPOINT) $(BUNDLES) --peers $(PEERS) --engines $(ENGINES)

# An environment for every other program (llama.cpp is compiled: minutes); then `make bench PEERS=all`.
PEER_NAMES = openvino_genai llama_cpp mnn onnxruntime_genai
# GCC 12 drops what llama.cpp writes for the configuration of tiles (AMX), and its first product crashes.
ifneq ($(shell grep -s -m 1 amx_tile /proc/cpuinfo),)
.venv-peers/llama_cpp/.ready: export CMAKE_ARGS = -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse -fno-tree-sra'
endif
peers: $(VENV)/.ready $(PEER_NAMES:%=.venv-peers/%/.ready)
.venv-peers/%/.ready: benchmarks/peers/%.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip $(PIP) "pip>=25.1"
	$(BIN)/python -m edgevl.benchmarks.peers.requirements $* > $(@D)/requirements.txt
	$(@D)/bin/pip $(PIP) numpy pillow -r $(@D)/requirements.txt
	$(@D)/bin/pip $(PIP) --no-deps -e .
	touch $@

# Instructions of every stage of the demo, counted by valgrind, against the stored baseline: flags changes over 10 %.
bench-check: $(VENV)/.ready
	$(BIN)/python -m edgevl.benchmarks.check $(if $(UPDATE),--update)

# Trains demo/model again, from the first weights of the repository's history: hours (demo/training/README.md).
# The whole chain in minutes, to see that it works: make demo-model SHARE=0.01 CASES=5
FIRST_WEIGHTS = 3f22e1e3d178c0135bcc129cd8543b73fbf77365
SHARE ?= 1
CASES ?= 500
TRAIN = $(BIN)/python -m demo.training.train --share $(SHARE)
demo-model: $(VENV)/.ready
	mkdir -p out/demo-model/start
	git cat-file blob $(FIRST_WEIGHTS) > out/demo-model/start/model.safetensors
	$(TRAIN) out/demo-model --from out/demo-model/start
	$(BIN)/python -m demo.training.export out/demo-model out/demo-model/model
	$(TRAIN) out/demo-model-2 --from out/demo-model/model --plan demo/training/plan-2.json
	$(TRAIN) out/demo-model-3 --from out/demo-model-2 --plan demo/training/plan-3.json
	$(TRAIN) out/demo-model-4 --from out/demo-model-3 --plan demo/training/plan-4.json
	$(BIN)/python -m demo.training.export out/demo-model-4 out/demo-model-4/model
	$(BIN)/python -m demo.training.evaluate out/demo-model-4/model --out out/demo-model-4/eval.json \
		--cases $(CASES) --verify 72

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(PIP) "pip>=25.1"
	$(BIN)/pip $(PIP) torch==2.13.0
	$(BIN)/pip $(PIP) -e ".[ort,host,bench,report]" --group test --group lint
	touch $@

$(DEMO_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip $(PIP) -e ".[ort,export]"
	touch $@

clean:
	rm -rf .venv .venv-demo .venv-wheel .venv-oldest .venv-peers dist build out
