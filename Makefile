# Every target first makes .venv with the exact versions of constraints.txt; the first time takes some minutes.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready
LENS3 := .venv-lens3

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-lens3 check notebooks interop interop-splice bench bench-speed bench-peers bench-allocation bench-adaptive clean

help:
	@echo 'make demo         bundled model -> SAE -> evaluation -> a page of features'
	@echo 'make test         every test and notebook'
	@echo 'make test-lens3   what concerns TransformerLens, with version 3 of it'
	@echo 'make check        format, lint and types'
	@echo 'make notebooks    executes the notebooks again and gives their figures pictures; needs chromium'
	@echo 'make interop      SAELens, sparsify and dictionary_learning: their SAEs read here, ours read there'
	@echo 'make interop-splice   SAEs in a forward pass: the same logits and caches as SAELens'
	@echo 'make bench        the bundled model beside a trigram and lzma'
	@echo 'make bench-speed  a training step in encoder products, by rule; QUICK=1 for a look; THREADS, OUT as you like'
	@echo 'make bench-peers  the same beside SAELens, sparsify and dictionary_learning'
	@echo 'make bench-allocation   which rule spends its budget best: hours, resumable; QUICK=1 for ten minutes'
	@echo 'make bench-adaptive     every adaptive model from three seeds, with its controls: hours, resumable'
	@echo 'make .venv        only set up; PYTHON=python3.12 chooses the interpreter'
	@echo 'make clean        remove the environments and everything that was built'

.venv: $(READY)

# torch first, by itself: constraints.txt pins it, and everything else asks for an open range
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'saekit needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install torch -c constraints.txt
	$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(READY)
	$(BIN)/saekit demo

# a worker per core; a file stays with one worker, for what its tests share
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# everything but TransformerLens itself (and the little that only version 3 needs) comes from .venv
$(LENS3)/.ready: $(READY)
	$(BIN)/python -m venv --clear $(LENS3)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(LENS3)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_venv.pth
	$(LENS3)/bin/python -m pip --disable-pip-version-check install -q 'transformer-lens==3.9.*'
	@touch $@

test-lens3: $(LENS3)/.ready
	$(LENS3)/bin/python -m pytest tests/test_targets_lens.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

notebooks: $(READY)
	PYTHONWARNINGS=ignore:IProgress $(BIN)/jupyter execute --inplace notebooks/*.ipynb
	$(BIN)/python notebooks/pictures.py notebooks/*.ipynb

# an environment of their own: they bring much that saekit does without
INTEROP := .venv-interop
PEERS := sae-lens==6.54.12 transformer-lens==3.9.0 eai-sparsify==1.3.3 dictionary-learning==0.1.0

$(INTEROP)/.ready: constraints.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install $$(grep '^torch==' constraints.txt) $(PEERS)
	@# comes along for one of them, and built for another torch than the CPU's it stops every import of transformers
	$(INTEROP)/bin/python -m pip uninstall --yes torchvision
	@touch $@

interop: $(READY) $(INTEROP)/.ready interop-splice
	rm -rf $(INTEROP)/written
	for library in saelens sparsify dictionary_learning; do \
	  $(INTEROP)/bin/python -W ignore tests/golden/write_$$library.py $(INTEROP)/written/$$library || exit 1; done
	rm -rf tests/golden/formats && mv $(INTEROP)/written tests/golden/formats
	$(BIN)/python -m pytest -m "interop or not interop" tests/test_formats_parity.py tests/test_formats_interop.py

# jaxtyping and the rest of what saekit imports come with the peers
interop-splice: $(INTEROP)/.ready
	$(INTEROP)/bin/python -W ignore tests/golden/compare_splice.py

bench: $(READY)
	$(BIN)/python -m benchmarks.pystd.baselines

SPEED = $(BIN)/python -m benchmarks.speed.run $(if $(QUICK),--quick) $(if $(THREADS),--threads $(THREADS)) $(if $(OUT),--out $(OUT))

bench-speed: $(READY)
	$(SPEED)

bench-peers: $(READY) $(INTEROP)/.ready
	$(SPEED) --peers $(INTEROP)/bin/python

bench-allocation: $(READY)
	$(BIN)/python -m benchmarks.allocation.study $(if $(QUICK),--quick)

bench-adaptive: $(READY)
	$(BIN)/python -m benchmarks.adaptive.study

clean:
	rm -rf .venv $(LENS3) .venv-interop build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
