# The front door. `make help` lists what there is; each target is one or two commands that can be typed by hand.
SWIFT ?= swift
SEEDS ?= 10000
GODWIT = .build/release/godwit
SOURCES = Sources Tests Package.swift

.DEFAULT_GOAL = help
.PHONY: help build demo test check bench bench-house tracking-figures big-guests-figures fmt lint simulate guests completion man clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

build: ## build the release binary, .build/release/godwit
	$(SWIFT) build -c release --product godwit

demo: ## two VMs, one live migration, every page checked
	$(SWIFT) run -c release godwit demo

test: ## all tests
	$(SWIFT) test

check: lint ## what a change must pass: lint, built-in guests, tests, demonstration
	Guests/check
	$(SWIFT) test
	$(SWIFT) run -c release godwit demo

lint: ## the formatter's complaints
	$(SWIFT) format lint --strict --recursive $(SOURCES)

fmt: ## format everything in place
	$(SWIFT) format --in-place --recursive $(SOURCES)

simulate: ## the protocol under SEEDS=N simulated failures (default 10000)
	GODWIT_SIMULATION_SEEDS=$(SEEDS) $(SWIFT) test --filter Simulation

guests: ## assemble the built-in guests and embed their bytes (needs GNU as and ld)
	$(MAKE) -C Guests

completion: build ## completion scripts for bash, zsh and fish in .build/completion
	mkdir -p .build/completion
	for shell in bash zsh fish; do $(GODWIT) --generate-completion-script $$shell > .build/completion/godwit.$$shell || exit 1; done
	@echo "written to .build/completion"

man: ## the manual page in .build/man
	mkdir -p .build/man
	$(SWIFT) package --allow-writing-to-directory .build/man generate-manual --output-directory .build/man

clean: ## remove what was built
	$(SWIFT) package clean
	$(MAKE) -C Guests clean

# The side-by-side benchmark is a VMM-neutral harness that lives outside this repository; SPECIFICATION.md says what is measured.
BENCH ?= ../shared/bench/bench
BENCH_RUNS ?= 5
BENCH_SCENARIOS ?= s1,s2
BENCH_OUT ?= .build/bench

export BENCH_GODWIT ?= $(abspath $(GODWIT)) run --memory {mem_mb}M --cpus {vcpus} --boot-sector {image} \
    --qmp unix:{qmp} --serial unix:{serial} {ring} {incoming}
export BENCH_GODWIT_INCOMING ?= --incoming defer
export BENCH_GODWIT_RING ?= --accel kvm,dirty-ring-size={entries}
export BENCH_GODWIT_LOWEND_MB ?= 3072
export BENCH_GODWIT_VERSION ?= $(abspath $(GODWIT)) --version

bench-house: build ## the project's own benchmarks, each under a minute; fails if a promise does not hold
	$(GODWIT) bench --quick

tracking-figures: build ## measure the dirty tracking and put table and picture into its page; RESULT=file takes an earlier result
	$(if $(RESULT),cp $(RESULT) .build/tracking.json,$(GODWIT) bench tracking --json > .build/tracking.json || [ -s .build/tracking.json ])
	$(GODWIT) bench --from .build/tracking.json --markdown --plot Documentation/dirty-tracking.svg > .build/tracking.md || [ -s .build/tracking.md ]
	sed -i -e '/^<!-- figures/,/^<!-- end of figures/{//!d}' -e '/^<!-- figures/r .build/tracking.md' Documentation/dirty-tracking.md

big-guests-figures: build ## measure big guests and put table and picture into their page; RESULT=file takes an earlier result
	$(if $(RESULT),cp $(RESULT) .build/big-guests.json,$(GODWIT) bench big-guests --json > .build/big-guests.json || [ -s .build/big-guests.json ])
	$(GODWIT) bench --from .build/big-guests.json --markdown --plot Documentation/big-guests.svg > .build/big-guests.md || [ -s .build/big-guests.md ]
	sed -i '1i ![Total time, setup and downtime of big guests: Godwit, QEMU on the same machine, and what was published](big-guests.svg)\n' .build/big-guests.md
	sed -i -e '/^<!-- figures/,/^<!-- end of figures/{//!d}' -e '/^<!-- figures/r .build/big-guests.md' Documentation/big-guests.md

bench: build ## side by side with QEMU: BENCH=harness BENCH_SCENARIOS=s1,s2 BENCH_RUNS=5
	@if [ ! -x "$(BENCH)" ]; then \
	    echo "make bench: no harness at $(BENCH); set BENCH to the migration benchmark (see SPECIFICATION.md)" >&2; exit 1; fi
	mkdir -p $(BENCH_OUT)
	$(BENCH) --vmm qemu --scenario $(BENCH_SCENARIOS) --runs $(BENCH_RUNS) --json $(BENCH_OUT)/qemu.json
	$(BENCH) --vmm godwit --scenario $(BENCH_SCENARIOS) --runs $(BENCH_RUNS) --json $(BENCH_OUT)/godwit.json
	$(BENCH) --compare $(BENCH_OUT)/qemu.json $(BENCH_OUT)/godwit.json
