# Each target makes its own environment in .venv and installs what it needs there; an activated one is never used.

VENV := .venv
PYTHON := $(VENV)/bin/python
ARGS ?=

EXTRAS_demo := torch,demo
EXTRAS_figures := figures
EXTRAS_test := test,figures
EXTRAS_docs := docs
EXTRAS_bench := bench
EXTRAS_release := release
EXTRAS_all := demo,figures,test,docs,bench,release

# What several threads take depends on what else runs. An operation is timed on one.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
ONE_THREAD += XLA_FLAGS=--xla_cpu_multi_thread_eigen=false

# Somebody else's packages would hide ours.
unexport PYTHONPATH PYTHONHOME

FIGURES := jax_transformer jax_autoencoder jax_variational_monte_carlo distributed_autoencoder
FIGURES += fisher_blocks improvement_against_gamma progress_against_batch training_curves digits_autoencoder
FIGURES += resnet_digits docstring_language_model influence laplace_digits pruning hessian_free

.PHONY: help demo race figures short $(FIGURES) test environments oldest newest jax interop gpu gpu-dry lint docs site links gallery dist
.PHONY: bench performance machine plots clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     K-FAC on a deep MNIST autoencoder         (ARGS=--quick for the short form)"
	@echo "make figures  the paper's figures, in build/figures     (ARGS=--quick for the short form)"
	@echo "make race     K-FAC beside others on six tasks, build/race  (ARGS='--tasks gru' for one, --quick for the short form)"
	@echo "make test     lint, then the tests                      (ARGS='-k name' goes to pytest)"
	@echo "make oldest   the algebra's tests on the oldest NumPy, SciPy and JAX  (TORCH=2.4.1 for the oldest torch)"
	@echo "make newest   the docstrings' examples on Python 3.13, where it is on the PATH"
	@echo "make interop  the curvature beside curvlinops, laplace-torch and kronfluence, with GPyTorch's solvers; Lightning's loop, Hugging Face's"
	@echo "make jax      what finds a network's layers on JAX 0.9, beside kfac-jax, and, where Python 3.12 is on the PATH, 0.12"
	@echo "make short    the demo, the race and the figures, all in short"
	@echo "make environments  what oldest, newest, jax and interop install"
	@echo "make lint     ruff and mypy"
	@echo "make gpu      the library on this machine's GPU, a report in build/gpu  (ARGS=speed for one part)"
	@echo "make gpu-dry  the same in small on a CPU: that it runs"
	@echo "make docs     the documentation, in build/docs"
	@echo "make site     the same, with asv's figures of each commit"
	@echo "make links    whether the addresses that the site names answer (needs the internet)"
	@echo "make gallery  what make figures has drawn in full, stored for the documentation"
	@echo "make dist     what a release uploads, in dist, built and checked"
	@echo "make bench    every benchmark once, on this checkout    (ARGS='-b name' goes to asv)"
	@echo "make performance  all benchmarks, stored, and their pictures  (pin it: taskset -c 1 make performance)"
	@echo "make plots    those pictures alone"
	@echo "make clean    remove .venv and all that was built"

demo: $(VENV)/.demo
	$(PYTHON) docs/examples/mnist_autoencoder.py $(ARGS)

gallery: $(VENV)/.figures
	$(PYTHON) docs/examples/store_gallery.py $(ARGS)

race: $(VENV)/.demo
	$(PYTHON) docs/examples/race.py $(ARGS)

# All of these in short, and what becomes of their pictures.
short:
	$(MAKE) race demo figures ARGS=--quick
	$(MAKE) gallery ARGS=--quick

figures: $(FIGURES)

$(FIGURES): $(VENV)/.figures
	$(PYTHON) docs/examples/$@.py $(ARGS)

# The snippets of a page share their names, and the tests of a file the processes that they start: a worker takes all.
# In their order, for the files of few and long tests come first.
test: lint
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# The algebra alone, and no compilation: the rest is the same wherever this passes. For Python 3.13 the only wheels of
# torch are those with CUDA.
TORCH ?= 2.13.0
ALGEBRA := $(addprefix tests/test_,algorithm.py blocks.py cholesky_inverse.py curvature.py damping.py factors.py)
ALGEBRA += $(addprefix tests/test_,kronecker.py kronecker_basis.py kronecker_pair.py low_rank.py quadratic.py spd.py)
ALGEBRA += tests/paper -k 'not jit and not strict'
PACKAGES := array-api-strict hypothesis mpmath pytest pytest-xdist sybil torch==$(TORCH)

oldest: $(VENV)-oldest/.torch-$(TORCH)
	$(VENV)-oldest/bin/python -m pytest -n auto -q $(ALGEBRA) $(ARGS)

newest: $(VENV)-newest/.made
	@if [ -x $(VENV)-newest/bin/python ]; then set -ex; \
	    $(VENV)-newest/bin/python -m pytest -q --doctest-modules kfaclinalg adapters/kfaclinalg_mlp $(ARGS); \
	else echo "no python3.13 on the PATH"; fi

# The layers of a network in JAX are found in its programs, whose form changes from one version to the next: how well
# XLA then compiles them is not of interest. On JAX 0.9.0, and no later one, kfac-jax runs too.
JAX_TESTS := $(addprefix tests/adapters/test_jax_,layers.py network.py peer.py)
jax: $(VENV)-jax/.made $(VENV)-jax312/.made
	@for python in $(VENV)-jax/bin/python $(VENV)-jax312/bin/python; do \
	    if [ -x $$python ]; then (set -x; JAX_DISABLE_MOST_OPTIMIZATIONS=1 $$python -m pytest -q --noconftest $(JAX_TESTS) $(ARGS)) || exit; fi; \
	done

# The environments beside .venv may be installed side by side.
environments: $(VENV)-oldest/.torch-$(TORCH) $(addsuffix /.made,$(addprefix $(VENV)-,interop jax jax312 newest))

$(VENV)-jax/.made: pyproject.toml | $(VENV)/.made
	$(PYTHON) -m venv --clear $(VENV)-jax
	$(VENV)-jax/bin/python -m pip install --quiet -e '.[optax]' jax==0.9.0 jaxlib==0.9.0 kfac-jax==0.0.8 pytest
	@touch $@

$(VENV)-jax312/.made: pyproject.toml
	@mkdir -p $(VENV)-jax312
	if python3.12 --version 2> /dev/null; then set -e; \
	    python3.12 -m venv --clear $(VENV)-jax312; \
	    $(VENV)-jax312/bin/python -m pip install --quiet -e '.[optax]' 'jax==0.12.*' pytest; \
	    touch $@; \
	fi

$(VENV)-oldest/.torch-$(TORCH): pyproject.toml constraints-oldest.txt | $(VENV)/.made
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[jax]' $(PACKAGES)
	@touch $@

$(VENV)-newest/.made: pyproject.toml constraints.txt
	@mkdir -p $(VENV)-newest
	if python3.13 --version 2> /dev/null; then set -e; \
	    python3.13 -m venv --clear $(VENV)-newest; \
	    $(VENV)-newest/bin/python -m pip install --quiet -c constraints.txt -e '.[jax]' pytest sybil; \
	    touch $@; \
	fi

interop: $(VENV)-interop/.made
	$(VENV)-interop/bin/python -m pytest -q --noconftest tests/adapters/test_interop.py $(ARGS)
	$(VENV)-interop/bin/python -m pytest -q docs/how_to/other_loops.md

# A registry's torchvision may be of another build of torch: torchmetrics, of laplace-torch, imports it where it is there.
$(VENV)-interop/.made: pyproject.toml constraints.txt | $(VENV)/.made
	$(PYTHON) -m venv --clear $(VENV)-interop
	$(VENV)-interop/bin/python -m pip install --quiet -c constraints.txt -e '.[interop,demo]'
	$(VENV)-interop/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

lint: $(VENV)/.test
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# On a bare machine, with whichever Python holds torch, if one does.
gpu:
	python3 gpu/run.py $(ARGS)

gpu-dry: $(VENV)/.test
	$(PYTHON) gpu/run.py --dry $(ARGS)

# The tutorials' networks are small: a second thread would wait for the first. With ARGS='-t asv' the pages link the
# figures of each commit, which `make site` puts beside them.
docs: $(VENV)/.docs
	MPLBACKEND=Agg $(ONE_THREAD) $(PYTHON) -m sphinx -E -W --keep-going -q -b html -d build/doctrees $(ARGS) docs build/docs
	@echo "build/docs/index.html"

# Finding the benchmarks writes among the results, so that it works on a copy of them.
site: machine
	$(MAKE) docs ARGS='-t asv'
	rm -rf build/asv-results && cp -r asv_benchmarks/results build/asv-results
	sed -e 's|"benchmark_dir": "|&../asv_benchmarks/|' -e 's|"results_dir": "results"|"results_dir": "asv-results"|' \
	    -e 's|"html_dir": "html"|"html_dir": "docs/asv"|' asv_benchmarks/asv.conf.json > build/asv.conf.json
	$(ASV) run --config build/asv.conf.json --python=same --launch-method forkserver --bench just-discover
	$(ASV) publish --config build/asv.conf.json

# Not in CI, which reaches package registries alone. No tutorial is run for it.
links: $(VENV)/.docs
	$(PYTHON) -m sphinx -E -q -b linkcheck -D plot_gallery=0 -d build/links/doctrees docs build/links

dist: $(VENV)/.release
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

# In an environment as it stands asv stores figures only under a commit that is named: with those of the quick run,
# which are of one call each, nothing can be done.
# A forked process has torch and JAX imported already, which a spawned one takes seconds for.
ASV := $(ONE_THREAD) $(PYTHON) -m asv
ASV_RUN := run --config asv_benchmarks/asv.conf.json --python=same --launch-method forkserver --show-stderr

bench: machine
	@$(ONE_THREAD) $(PYTHON) -m threadpoolctl -i numpy scipy.linalg torch | grep -E 'filepath|internal_api|num_threads'
	BENCHMARKS=quick $(ASV) $(ASV_RUN) --quick $(ARGS)

performance: machine
	$(ASV) $(ASV_RUN) --set-commit-hash $$(git rev-parse HEAD) $(ARGS)
	$(PYTHON) asv_benchmarks/plots.py

# Before it runs, asv must know the machine, in ~/.asv-machine.json.
machine: $(VENV)/.bench
	@$(PYTHON) -m asv machine --yes --config asv_benchmarks/asv.conf.json > /dev/null

plots: $(VENV)/.bench
	$(PYTHON) asv_benchmarks/plots.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist asv_benchmarks/env asv_benchmarks/html
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kfaclinalg adapters tests docs asv_benchmarks -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each set of extras, all in the one environment, and one for all of them.
STAMPS := $(addprefix $(VENV)/.,demo figures test docs bench release)
$(STAMPS) $(VENV)/.all: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.made
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS_$*)]'
	@touch $@ $(if $(filter all,$*),$(STAMPS))

$(VENV)/.made:
	@for python in python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then break; fi; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "kfaclinalg needs Python 3.11 or newer: neither python3.11 nor python3 on the PATH is one" >&2; exit 1; \
	fi; \
	$$python -m venv --clear $(VENV)
	@touch $@
