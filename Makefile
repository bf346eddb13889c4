# What one can do here. A target is a line or two; what needs more is a program in deploy/.
PYTHON ?= python3.11
GPU_PYTHON ?= python3
TINY := .venv/bin/python -m deploy.tiny.recipe
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-steer seeds attack alarms bench-reward bench-method faults plan-errors recipes gpu-wheels gpu-check up down fmt keys manifests check test conflicting ci reference tiny clean

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/.complete  ## create .venv with pinned versions (the first time: about 5 minutes, 7 GB)
.venv/.complete: pyproject.toml deploy/constraints.txt
	@test -x .venv/bin/python || { echo "creating .venv (about 5 minutes)"; $(PYTHON) -m venv .venv; }
	$(PIP) install --constraint deploy/constraints.txt --editable '.[dev,tiny]'
	$(PIP) install --no-deps hpsv2x==1.2.0  # its own pins contradict everyone else's (pyproject.toml)
	@touch $@

demo: setup  ## align the embedded model, show before and after (under 8 minutes on 2 cores)
	.venv/bin/python -m deploy.demo

demo-steer: setup  ## turn a training from 3D to Flat half way, and draw the curve (under 8 minutes on 2 cores)
	.venv/bin/python -m deploy.demo_steer

recipes: setup  ## renew the plans in deploy/runs/README.md (after a change of the planner or of a recipe)
	.venv/bin/python -m deploy.recipes

plan-errors: setup  ## the planner's memory and FLOPs beside torch's own, at four tiny sizes (under a minute)
	OMP_NUM_THREADS=1 .venv/bin/python -m deploy.plan_errors

bench-reward: setup  ## how fast the reward service is, on a quiet machine (about 17 minutes)
	.venv/bin/python -m deploy.bench_reward

bench-method: setup  ## SRPO beside ReFL, DRaFT-LV, GRPO and Direct-Align at equal CPU-seconds (about an hour, resumable)
	.venv/bin/python -m deploy.bench_method

up: setup  ## start Ray, the reward service and MLflow on this machine, and keep them up
	.venv/bin/python -m deploy.local up

down: setup  ## stop what `make up` started, and nothing else
	.venv/bin/python -m deploy.local down

fmt: setup  ## format and fix what can be fixed by machine
	.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format .

keys: setup  ## renew services/config/KEYS.md and EVALUATION_KEYS.md (after a change of a run file's keys)
	.venv/bin/python -m services.config.reference

manifests: setup  ## renew deploy/rayservice.yaml and deploy/rayjob.yaml (after a change of serve.yaml or pod.yaml)
	.venv/bin/python -m deploy.kube service > deploy/rayservice.yaml
	.venv/bin/python -m deploy.kube job > deploy/rayjob.yaml

check: setup  ## format, lint, types, import rules
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint deploy/Dockerfile

test: setup  ## all tests, with real components (about 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

conflicting: setup  ## test ImageReward and HPS v3 in environments of their own, made the first time
	.venv/bin/python -m deploy.conflicting

ci: check test  ## what CI runs

reference: setup  ## FILES="…": our numbers beside the published algorithm's (files as in ../shared/reference)
	OMP_NUM_THREADS=1 .venv/bin/python -m deploy.reference $(FILES)

attack: setup  ## climb the reward on purpose: how much of the gain do others confirm? (about 18 minutes on one core)
	.venv/bin/python -m deploy.attack

alarms: setup  ## find the guard's thresholds of damage, and test them on unseen kinds of it (about 5 minutes)
	.venv/bin/python -m deploy.alarms

seeds: setup  ## the demo's two runs with three seeds, compared with base and oracle (about 30 minutes, resumable)
	.venv/bin/python -m deploy.seeds

faults: setup  ## break a training in every way that clusters do, and compare the results (about 40 minutes; root for one row)
	.venv/bin/python -m deploy.faults

gpu-wheels: setup  ## collect in .gpu/ what gpu-check needs; WITHOUT="numpy …": what that machine has already
	.venv/bin/python -m deploy.gpu_check.wheels $(if $(WITHOUT),--without $(WITHOUT))

gpu-check:  ## on a machine with a GPU, Python 3.12, torch 2.11 and the folder .gpu: what CPUs cannot show (8 minutes)
	$(GPU_PYTHON) -m deploy.gpu_check --packages .gpu

tiny: setup  ## train the embedded default from scratch (hours on a CPU, resumable; needs npm)
	$(TINY) data vae views prompts truth
	@$(TINY) flux & flux=$$!; $(TINY) reward style subject reference & others=$$!; \
	trap 'kill $$flux $$others' INT TERM HUP; wait $$others; code=$$?; wait $$flux && exit $$code  # one thread each
	$(TINY) measure

clean: down  ## stop services, remove what runs and tools wrote (outputs/ and .venv stay)
	rm -rf .run .gpu .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
