PYTHON ?= python3
BIN    := .venv/bin
OUT    ?= runs/zoo
ARGS   ?=

.PHONY: help setup run test bench bench-train kills lint format reproduce ablations zoo clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

.venv/run: requirements.txt  # a stamp: the runtime packages are in
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt  # a stamp: so are the test tools
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.venv/bench: .venv/dev requirements-bench.txt  # a stamp: so are the trainers that ours is measured against
	$(BIN)/pip install -q -r requirements-bench.txt
	touch $@

setup: .venv/run  ## make .venv with the five runtime packages

run: .venv/run  ## M0 -> M1 -> M2 -> M3 on the zoo, then the report (OUT=runs/one ARGS="--seed 1" to change it)
	$(BIN)/torchrun train.py --iters 3 --out $(OUT) $(ARGS)
	$(BIN)/python judge.py $(OUT)

test: .venv/dev  ## all tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --reruns 1 --only-rerun "was aborted from within" tests $(ARGS)

bench: .venv/dev  ## sampling beside transformers' generate; an hour, or less with ARGS="--only tiny"
	$(BIN)/python tests/bench_sample.py $(ARGS)

bench-train: .venv/bench  ## training steps and their memory beside transformers and TRL; half an hour
	$(BIN)/python tests/bench_train.py $(ARGS)

kills: .venv/dev  ## kill -9 the toy run at 20 random moments, on one and on two processes (ARGS="--seed 1"); minutes
	$(BIN)/python tests/proof_kill.py $(ARGS)

lint: .venv/dev  ## ruff: format and rules
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

format: .venv/dev  ## let ruff format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

reproduce: .venv/run  ## seeds 0, 1, 2 and the control with shuffled scores (RESULTS.md has our figures)
	for seed in 0 1 2; do $(BIN)/torchrun train.py --seed $$seed --out runs/seed-$$seed && $(BIN)/python judge.py runs/seed-$$seed || exit 1; done
	$(BIN)/torchrun train.py --iters 2 --control shuffle --out runs/shuffled && $(BIN)/python judge.py runs/shuffled

ablations: .venv/run  ## the method without each of its parts, three seeds, one table: two hours on 2 slow cores (ARGS="--workers 8")
	$(BIN)/python data/zoo/ablate.py $(ARGS)

zoo: .venv/run  ## rebuild the zoo's rows and its pretrained base from a seed
	$(BIN)/python data/zoo/prepare.py

clean:  ## remove runs and .venv
	rm -rf runs .venv
