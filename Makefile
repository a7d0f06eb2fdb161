# Outrigger: the verbs. Each is a line or two; what is longer is a script with a name.
# Everything that is installed goes into .cache/; nothing needs root.

SHELL   := /bin/bash
CACHE   := $(CURDIR)/.cache
BIN     := $(CURDIR)/bin
TOOLS   := $(CACHE)/tools
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/outrigger-mesh/outrigger/program.version=$(VERSION)
PROGRAMS := ./control-plane ./sidecar ./sidecar/netinit ./sidecar/cni ./collector ./injector ./outrigger
FUZZ_SECONDS ?= 20
DEMO_SECONDS ?= 0
SOAK_SECONDS ?= 600

.DEFAULT_GOAL := help
.PHONY: help build demo test check fuzz golden peers h2spec e2e cluster soak torture bench-sidecar bench-control-plane bench-collector images manifests clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

build: ## build the programs and the demo into bin/
	@mkdir -p $(BIN)
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $(BIN)/ $(PROGRAMS) ./deploy/demo ./deploy/demo/shop

demo: build ## run the whole thing on this machine; DEMO_SECONDS=60 ends by itself with a summary
	@$(BIN)/demo --bin $(BIN) --seconds $(DEMO_SECONDS)

test: $(TOOLS)/gotestsum ## run every test with the race detector, a real Envoy among them
	@deploy/apptest/envoy.sh >/dev/null || echo "Envoy could not be installed: its tests will be skipped, loudly"
	$(TOOLS)/gotestsum --format pkgname-and-test-fails --format-hide-empty-pkg -- -race -timeout 15m ./...
	go test -count=1 -run 'Allocat|HoldLittle|HoldsNothing' ./sidecar/internal/{accesslog,http2,proxy,telemetry,wire}
	@printf 'golden files: %s\n' "$$(git ls-files '*/testdata/*' | grep -c -e '\.txtar$$' -e '\.txt$$')"

check: $(TOOLS)/golangci-lint ## vet, lint, layers, formatting and go.mod, without running tests
	go vet ./...
	$(TOOLS)/golangci-lint config verify
	$(TOOLS)/golangci-lint run ./...
	$(TOOLS)/golangci-lint fmt --diff
	go mod tidy -diff
	cd tools && go mod verify >/dev/null
	cd deploy/e2e && go vet ./...

fuzz: ## run every fuzz target for FUZZ_SECONDS (20)
	@tools/fuzz.sh $(FUZZ_SECONDS)

golden: ## rewrite the expectations of golden tests; review the diff
	go test $$(git ls-files '*_test.go' | xargs grep -l '"github.com/outrigger-mesh/outrigger/golden"' | xargs -n1 dirname | sort -u | sed 's|^|./|') -update

peers: ## test the outputs against real servers (Elasticsearch, VictoriaMetrics, fluentd's own library)
	@tools/peers.sh

h2spec: ## run the h2spec suite against the ports of real sidecars
	@tools/h2spec.sh

e2e: ## tell the stories on a real Kubernetes of two nodes, made here (root); E2E_RUN=<regexp> tells some of them
	@deploy/testbed/build.sh cluster >/dev/null
	@deploy/apptest/envoy.sh >/dev/null
	@mkdir -p $(CACHE)/e2e && cd deploy/e2e && go build -o $(CACHE)/e2e/e2e .
	@$(CACHE)/e2e/e2e --run '$(E2E_RUN)'

cluster: ## open a shell in such a Kubernetes, with the product installed (root)
	@deploy/testbed/build.sh cluster >/dev/null
	@deploy/apptest/envoy.sh >/dev/null
	@mkdir -p $(CACHE)/e2e && cd deploy/e2e && go build -o $(CACHE)/e2e/e2e .
	@$(CACHE)/e2e/e2e --shell

soak: build ## two sidecars under mixed load and churn for SOAK_SECONDS (600); fails when they grow
	@go run ./deploy/soak --bin $(BIN) --for $(SOAK_SECONDS)s

torture: ## kill, starve and mislead the collector in 31 ways and count its lines; TORTURE='--full --seed 7' for other flags
	@mkdir -p $(CACHE)/torture/bin
	@go build -o $(CACHE)/torture/bin/ ./collector ./outrigger
	@$(CACHE)/torture/bin/outrigger torture --collector-command '$(CACHE)/torture/bin/collector --config {{.Config}}' $(TORTURE)

bench-sidecar: ## measure the sidecar beside nginx, HAProxy, Envoy and others; BENCH_QUICK=1 takes 2 minutes, not 15
	@mkdir -p $(CACHE)/bench/bin
	@go build -o $(CACHE)/bench/bin/bench ./deploy/bench
	@$(CACHE)/bench/bin/bench

bench-control-plane: ## measure the control plane with 10,000 Services and 2,000 sidecars; BENCH_QUICK=1 takes 3 minutes, not 10
	@deploy/testbed/build.sh api >/dev/null
	@mkdir -p $(CACHE)/bench/bin
	@go build -o $(CACHE)/bench/bin/bench-control-plane ./deploy/bench-control-plane
	@$(CACHE)/bench/bin/bench-control-plane

bench-collector: ## measure the collector beside the OpenTelemetry Collector on 1 GB of lines; BENCH_QUICK=1 takes 2 minutes, not 20
	@mkdir -p $(CACHE)/bench/bin
	@deploy/peers/otelcol.sh >/dev/null || echo "the OpenTelemetry Collector could not be built: it is left out, loudly"
	@CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $(CACHE)/bench/bin/ ./collector ./deploy/bench-collector
	@taskset -c 0 $(CACHE)/bench/bin/bench-collector --collector $(CACHE)/bench/bin/collector

images: ## build container images without Docker into .cache/images, for linux/amd64 and linux/arm64
	@go run ./deploy/images --version $(VERSION) --out $(CACHE)/images

manifests: ## render deploy/manifests from the chart and the profiles; review the diff
	cp deploy/crds/*.yaml deploy/chart/crds/
	go test ./deploy/chart -run TestManifests -update

clean: ## remove what was built and installed
	rm -rf $(BIN) $(CACHE)

$(TOOLS)/%: tools/go.mod tools/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $* (once)"
	@cd tools && go build -o $@ $$(go list -f '{{.ImportPath}}' tool | grep '/$*$$')
	@touch $@
