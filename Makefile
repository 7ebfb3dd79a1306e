# Thin: each target is a script. `make demo` and `make test` do all their set-up.
SHELL := bash
SECONDS_EACH ?= 60
export KMS ?= local

.PHONY: help setup build install demo test fmt lint test-unit test-tools test-regress test-e2e fuzz bench soak clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## install what building needs (Debian, Ubuntu)
	scripts/setup build

build: setup ## build the extension
	scripts/build

install: setup ## build the extension and install it into the PostgreSQL that pg_config finds
	scripts/install

demo: ## a table of tokens through the whole migration; KMS=aws for AWS KMS
	scripts/demo

test: ## everything that a change must pass
	scripts/test

fmt: ## format
	cargo fmt --all

lint: setup ## formatting and clippy
	scripts/test lint

test-unit: setup ## the crates' tests, without PostgreSQL
	scripts/test unit

test-tools: ## the decoder without PostgreSQL
	scripts/test tools

test-regress: ## pg_regress
	scripts/test install regress

test-e2e: ## against real servers and emulators
	scripts/test install e2e

fuzz: ## every fuzz target for SECONDS_EACH seconds (60)
	scripts/setup fuzz
	scripts/fuzz $(SECONDS_EACH)

bench: install ## figures of docs/BENCHMARKS.md; ENFORCE=1 fails when a target was missed
	scripts/bench $(if $(ENFORCE),--enforce)

soak: install ## jobs under kills and traffic for SOAK_SECONDS (60) each stretch
	scripts/soak

clean: ## remove what was built
	cargo clean
	rm -rf .venv fuzz/target
