PYTHON ?= python3
BIN    := .venv/bin
OUT    ?= runs/zoo
PROCESSES ?= 2
ARGS   ?=
NEED   := "Python 3.11 or newer is needed; name one: make PYTHON=python3.11"

.PHONY: help setup run test lint format bench bench-train gpu kills reproduce ablations scaling zoo clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

.venv/report: requirements.txt requirements-report.txt  # a stamp: what a run and its report import
	$(PYTHON) -c 'import sys; sys.exit($(NEED) if sys.version_info < (3, 11) else 0)' && $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-report.txt
	touch $@

.venv/dev: .venv/report requirements-dev.txt  # a stamp: so are the test tools
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.venv/bench: .venv/dev requirements-bench.txt  # a stamp: so is the trainer that ours is measured beside
	$(BIN)/pip install -q -r requirements-bench.txt
	touch $@

setup: .venv/report  ## make .venv: the five packages, and matplotlib for figures

run: .venv/report  ## M0 -> M1 -> M2 -> M3 on the zoo, then the report (OUT="runs/one" ARGS="--seed 1" PROCESSES=4)
	$(if $(filter 1,$(PROCESSES)),,OMP_NUM_THREADS=1) $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) train.py --out "$(OUT)" $(ARGS)
	$(BIN)/python -m scripts.report "$(OUT)"

test: .venv/dev  ## all tests, on two cores (ARGS="-k judge" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --reruns 1 --only-rerun "was aborted from within" tests $(ARGS)

lint: .venv/dev  ## ruff: format and rules
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

format: .venv/dev  ## let ruff format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: .venv/dev  ## sampling beside transformers' generate; an hour, or less with ARGS="--only tiny"
	$(BIN)/python tests/bench_sample.py $(ARGS)

bench-train: .venv/bench  ## training steps and their memory beside transformers and TRL; half an hour
	$(BIN)/python tests/bench_train.py $(ARGS)

gpu: .venv/dev  ## what works on this GPU, and how fast, in ten minutes: a table and runs/gpu.json
	$(BIN)/python -m scripts.gpu $(ARGS)

kills: .venv/dev  ## kill -9 a tiny run at 20 random moments, on one and on two processes (ARGS="--seed 1"); minutes
	$(BIN)/python tests/proof_kill.py $(ARGS)

reproduce: .venv/report  ## seeds 0 to 4 of the default run, each with its report (RESULTS.md has our figures)
	for s in 0 1 2 3 4; do OMP_NUM_THREADS=1 $(BIN)/python train.py --seed $$s --out runs/seed-$$s && $(BIN)/python -m scripts.report runs/seed-$$s || exit 1; done

ablations: .venv/report  ## the method without each of its parts, three seeds, one table: two hours (ARGS="--workers 8")
	$(BIN)/python -m scripts.ablate $(ARGS)

scaling: .venv/report  ## bases of three sizes, five iterations, three seeds, one table and figure: two hours (ARGS="--workers 8")
	$(BIN)/python -m scripts.scaling $(ARGS)

zoo: .venv/report  ## make the zoo's rows and its pretrained base again, from a seed; half an hour
	$(BIN)/python -m data.zoo.prepare $(ARGS)

clean:  ## remove runs and .venv
	rm -rf runs .venv
