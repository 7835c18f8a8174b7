# penstock: what one does here. A machine needs Python 3.11-3.13 and this file's `just`; the recipes install the rest.

set shell := ["bash", "-euo", "pipefail", "-c"]

# hundreds of processes import the same modules: they are compiled once
export PYTHONDONTWRITEBYTECODE := ""

venv := ".venv"
bin := venv / "bin"

# list the recipes
default:
    @{{just_executable()}} --list --unsorted

# install penstock, and GROUP's tools, into .venv (done again only after pyproject.toml changed)
setup GROUP="check":
    @[ -x {{bin}}/python ] || python3 -m venv {{venv}}
    @stamp={{venv}}/.installed-{{GROUP}}; \
    if ! cmp -s pyproject.toml "$stamp"; then \
        echo "installing penstock with what '{{GROUP}}' needs into {{venv}} ..."; \
        {{bin}}/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'; \
        if [ {{GROUP}} = penstock ]; then {{bin}}/python -m pip install -q -e '.[all]'; \
        else {{bin}}/python -m pip install -q -e '.[all]' --group {{GROUP}}; fi; \
        cp pyproject.toml "$stamp"; \
    fi

# the main job: a real command's output over HTTP, cut twice, resumed, compared; then a cancel
demo *ARGS: (setup "penstock")
    @{{bin}}/penstock demo {{ARGS}}

# what tests need that is no Python package; the servers that Debian would start with it stay off
[private]
debian:
    @missing=(); \
    command -v chromium-headless-shell chromium google-chrome >/dev/null || missing+=(chromium-headless-shell); \
    [ -n "${PENSTOCK_TEST_REDIS:-}" ] || command -v redis-server >/dev/null || missing+=(redis-server); \
    [ -n "${PENSTOCK_TEST_NGINX:-}" ] || [ -x /usr/sbin/nginx ] || command -v nginx >/dev/null || missing+=(nginx-light); \
    if [ "${#missing[@]}" -gt 0 ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then \
        echo "installing Debian's ${missing[*]}, for the tests with it ..."; \
        (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}") \
            >/dev/null || echo "it could not be installed; tests of a browser and of nginx are skipped then, others fail"; \
        for each in nginx redis-server; do \
            case "${missing[*]}" in *$each*) systemctl disable --now $each >/dev/null 2>&1 || true;; esac; \
        done; \
    fi

# the whole suite; most tests wait for clocks and processes, so there are more workers than cores
test *ARGS: (setup "test") debian
    {{bin}}/python -m pytest -n 6 --dist loadgroup {{ARGS}}

# branch coverage of src/penstock by the suite, in the tests' own processes; a tracer and a Ctrl-C at any moment do not mix
coverage *ARGS: (setup "coverage") debian
    {{bin}}/python -m pytest -n 6 --dist loadgroup --tb native -k "not ctrl_c" --cov src/penstock --cov-branch --cov-report term:skip-covered {{ARGS}}

# fifteen small faults, drawn by a seed and applied to a copy; how many the tests of their packages find
mutations *ARGS: (setup "test") debian
    {{bin}}/python -m benchmarks.mutations {{ARGS}}

# tests of the tools: the benchmarks, the fault tools, and the servers and proxies that tests start
bench-test *ARGS: (setup "test") debian
    {{bin}}/python -m pytest -n 2 --dist loadgroup benchmarks/tests {{ARGS}}

# four servers on one Redis, one killed every few seconds for a minute; what 400 readers saw
chaos *ARGS: (setup "test")
    {{bin}}/python -m benchmarks.faults.chaos {{ARGS}}

# one server of four workers: restarted three times, then one worker killed every second; what 200 readers saw
rolling *ARGS: (setup "test")
    {{bin}}/python -m benchmarks.faults.rolling {{ARGS}}

# Redis servers that stall, die and hand slots over, under 100 runs; what 200 readers saw
failover *ARGS: (setup "test")
    {{bin}}/python -m benchmarks.faults.failover {{ARGS}}

[private]
peers: (setup "bench")
    @if command -v npm >/dev/null; then \
        npm ci --prefix benchmarks/servers/durable --ignore-scripts --no-audit --no-fund --loglevel error >/dev/null \
            || echo "the peer from npm could not be installed; it is left out"; \
    fi

# penstock beside its peers, or `--against COMMIT` beside another commit, as ratios; `--list` lists the questions
bench *ARGS: peers
    {{bin}}/python -m benchmarks {{ARGS}}

# linters and types
check: (setup "check")
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .
    {{bin}}/flake8 src tests examples benchmarks
    {{bin}}/flake8 --disable ASYNC109,ASYNC114,ASYNC124,ASYNC910,ASYNC911,ASYNC912,ASYNC913 src
    {{bin}}/lint-imports
    {{bin}}/mypy

# format the code and mend what a linter can mend
fmt: (setup "check")
    {{bin}}/ruff check --fix .
    {{bin}}/ruff format .

# a server that stays up, for curl and a browser
serve *ARGS: (setup "penstock")
    {{bin}}/penstock serve --producers examples/agent.py:producers {{ARGS}}

# write the pages of docs/ that are tables of the code
docs: (setup "check")
    {{bin}}/python docs/generate.py
