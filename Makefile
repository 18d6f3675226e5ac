# `make demo`, `make test`, `make lint` and `make bench` set up everything they need first; the next run skips that.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KAFKA_VERSION := 4.1.0
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/millrace
KAFKA := $(CACHE)/kafka-$(KAFKA_VERSION)

.PHONY: demo test lint bench setup kafka clean

demo: setup kafka
	$(BIN)/millrace demo

test: setup kafka lint
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup kafka
	$(BIN)/python -m tests.benchmarks

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml deploy/constraints/cpu.txt deploy/setup.sh
	deploy/setup.sh venv $(PYTHON) $(VENV)
	@touch $@

kafka: $(KAFKA)/.ready

$(KAFKA)/.ready: deploy/kafka/pom.xml
	deploy/setup.sh kafka $(KAFKA)
	@if [ -d $(KAFKA)/libs ]; then touch $@; fi

clean:
	rm -rf $(VENV) build dist *.egg-info
