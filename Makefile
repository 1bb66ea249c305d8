# Needs python3 (3.10 or later, with its venv module) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The part of it that the demo needs. Modules are compiled when they are imported: most never are.
DEMO := $(VENV)/.demo
# The kernels in C; without a compiler they are left out, and so is this.
NATIVE := $(VENV)/.native
# What builds the site, and what builds and checks wheels. The demo does without them.
SITE := $(VENV)/.site
SHIP := $(VENV)/.ship

# No hub is asked for anything, and two test workers do not fight over the cores.
export HF_HUB_OFFLINE := 1
QUIET_CORES := OMP_NUM_THREADS=1
RANKS := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2
# The torch versions of `make matrix`; tests/matrix.py has the same.
MATRIX := 2.13.0 2.14.1 2.15.0
# What the native kernels have a part in.
OF_KERNELS := tests/rng tests/replay $(addprefix tests/laws/test_,parity.py order.py sharding.py)

.DELETE_ON_ERROR:
.PHONY: help demo test quick matrix lint format docs dist dist-check zoo shards recipes gallery sweep bench clean

help:
	@echo "make demo    GPT-2's architecture checked bit for bit; a GPT trained on two ranks, drawn"
	@echo "make test    everything that CI runs"
	@echo "make quick   every law over a dozen models, within a minute"
	@echo "make matrix  the same under three torch versions and six CPU settings (long)"
	@echo "make lint    ruff, mypy and the walls between rooms"
	@echo "make format  let ruff rewrite the files"
	@echo "make docs    the site, into build/site"
	@echo "make dist    wheel and sdist, into dist; dist-check installs and tests them (long)"
	@echo "make zoo     every transformers model type against its eager twin (long)"
	@echo "make shards  every model sharded in every way, by real processes (long)"
	@echo "make recipes every recipe of docs/recipes.md whose library is installed"
	@echo "make gallery the plots of docs/gallery.md, drawn again"
	@echo "make sweep   every operator on every kind of deferred tensor, every model in every way (long)"
	@echo "make bench   construction time and memory against the alternatives"

# An environment for each torch of the matrix, with everything else as it is pinned.
.venv-torch-%/.installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -v '^torch==' constraints-dev.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q -c $(@D)/constraints.txt torch==$* -e '.[dev]'
	@touch $@

# A half-made environment leaves no stamp, so the next call makes it again.
$(DEMO): pyproject.toml constraints-dev.txt src/lateinit/_version.py
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints-dev.txt -e '.[demo]'
	@touch $@ $(NATIVE)

$(STAMP): $(DEMO)
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e '.[dev]'
	@touch $@ $(NATIVE)

$(NATIVE): $(STAMP) src/lateinit/_native/kernels.c
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

demo: $(DEMO)
	$(BIN)/lateinit inspect transformers:gpt2
	$(BIN)/lateinit check transformers:gpt2 --seed 0
	@mkdir -p build
	$(QUIET_CORES) $(RANKS) examples/fsdp_gpt.py --plot build/demo.svg
	$(BIN)/lateinit report transformers:gpt2 --force -o build/demo.html
	@echo "Look at, in a browser:"
	@echo "$(CURDIR)/build/demo.html  GPT-2's memory, and the values that seed 0 gives"
	@echo "$(CURDIR)/build/demo.svg   the loss of a small GPT on two ranks, and on one device"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

$(SITE): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e '.[docs]'
	@touch $@

# Without the notice that mkdocs-material is maintained until May 2027 and has a successor.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(SHIP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e '.[dist]'
	@touch $@

# The wheel is built from the sdist, and gets the oldest platform tag that its symbols allow. Without
# a compiler it would be one for any platform, without the kernels: auditwheel refuses that.
dist: $(SHIP)
	rm -rf dist build/dist
	PIP_CONSTRAINT=$(CURDIR)/constraints-dev.txt $(BIN)/python -m build --outdir build/dist
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist

dist-check: dist
	$(BIN)/python -m tests.dist

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The second run uses the kernels of a CPU without vector extensions: tests must pass on any CPU. The
# last one does without the native kernels, which must have been built for the first ones.
test: lint docs $(NATIVE)
	! command -v cc > /dev/null || $(BIN)/python -c 'import lateinit._native._kernels'
	$(QUIET_CORES) $(BIN)/python -m pytest -n 2
	$(QUIET_CORES) ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n 2 -q --quick
	$(QUIET_CORES) LATEINIT_NATIVE=0 $(BIN)/python -m pytest -n 2 -q $(OF_KERNELS)

quick: $(STAMP)
	$(QUIET_CORES) $(BIN)/python -m pytest -n 2 -q --quick

matrix: $(STAMP) $(MATRIX:%=.venv-torch-%/.installed)
	$(QUIET_CORES) $(BIN)/python -m tests.matrix

zoo: $(STAMP)
	$(QUIET_CORES) $(BIN)/python -m tests.zoo --table docs/zoo.md

# `make test` tries a part (tests/support/sweep.py). In one process, which sees what all calls came to.
sweep: $(STAMP)
	LATEINIT_SWEEP=all $(QUIET_CORES) $(BIN)/python -m pytest tests/laws tests/recording tests/checkpoint tests/test_imports.py

shards: $(STAMP)
	$(QUIET_CORES) $(BIN)/python -m tests.sharding

# The plots of docs/gallery.md, without the date, so that the same values give the same bytes.
gallery: export MATPLOTLIBRC := docs/gallery/matplotlibrc
gallery: export SOURCE_DATE_EPOCH := 0
gallery: $(STAMP)
	$(QUIET_CORES) $(RANKS) examples/fsdp_gpt.py --plot docs/gallery/fsdp_gpt.svg
	$(QUIET_CORES) $(BIN)/python examples/mup_sweep.py --plot docs/gallery/mup_sweep.svg

recipes: $(STAMP)
	$(QUIET_CORES) $(BIN)/python -m pytest -rs tests/test_recipes.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .venv-torch-* build dist src/lateinit/_native/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
