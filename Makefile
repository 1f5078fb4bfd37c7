# make demo and make test each work from a bare clone; all they need is Python 3.11 or later.
# make demo DICOM=folder sends your own series; make test ARGS="-k routing" runs some tests.

RUN := .venv/bin/python -m

.PHONY: help demo models test lint serve docs-images setup packages

help:
	@echo "make demo         a CT series goes in and comes back translated; see demo-out/"
	@echo "make demo DICOM=folder   the same with a series of yours"
	@echo "make demo MODEL=name     the same with another package of models/ (see make models)"
	@echo "make models              the bundled packages, and the command that makes each"
	@echo "make test         every check: format, types, layers, tests"
	@echo "make serve        run the node with config.yaml"
	@echo "make lint         format, types, layers"
	@echo "make docs-images  make the pictures of docs/images again, from generated data"

setup:
	@.ci/setup

packages:
	@.ci/packages

demo: setup
	@$(RUN) dicomnode demo --config config.yaml --out demo-out $(if $(DICOM),--dicom "$(DICOM)") $(if $(MODEL),--model "$(MODEL)")

serve: setup
	@exec $(RUN) dicomnode serve --config config.yaml

test: setup packages lint
	$(RUN) pytest -n 3 --dist worksteal $(ARGS)

lint: setup
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	.venv/bin/lint-imports

models: setup
	@$(RUN) dicomnode models list --config config.yaml
	@echo "made by:"
	@grep -l "^package: models/" training/configs/*.yaml | sed 's|^|  python training/train.py |'
	@echo "  (first, for cect:        python training/simulate_contrast.py ../shared/data runs/contrast-pairs)"
	@echo "  (first, for mr-to-ct and ct-to-mr: python training/prepare_limbs.py ../shared/data runs/limb-pairs)"
	@echo "  (first, for delayed-pet: python training/simulate_delayed_pet.py ../shared/data runs/pet-pairs)"

docs-images: setup
	.venv/bin/python docs/images/make.py
