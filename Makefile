# make demo  build the bundled model, draw a picture, check it       make test  everything that CI runs
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := examples/shapes/model
BUNDLE := demo/shapes

.PHONY: demo test setup
setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("diffbuild needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[build,cpu,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/diffbuild build recipes/shapes-fp32.toml --model $(MODEL) --output $(BUNDLE)
	$(BIN)/diffbuild generate $(BUNDLE) "a red circle left of a blue square on a white background" --seed 0 --output demo/shapes.png
	$(BIN)/diffbuild check $(BUNDLE) --model $(MODEL) --report demo/check.json --html demo/check.html
	@echo "the picture: demo/shapes.png   the report: demo/check.html"

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder
