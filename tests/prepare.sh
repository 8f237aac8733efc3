#!/bin/sh
# Installs the servers that tests talk to, where this user may; says what it installs and what is missing.
set -u
cd "$(dirname "$0")/.."

missing=""
for pair in mosquitto:mosquitto mosquitto_pub:mosquitto-clients influxd:influxdb victoria-metrics:victoria-metrics openssl:openssl systemd-nspawn:systemd-container prometheus:prometheus chromium:chromium; do
    tool=${pair%%:*} package=${pair#*:}
    command -v "$tool" >/dev/null 2>&1 || [ -x "/usr/sbin/$tool" ] || missing="$missing $package"
done
# builds the clock that the soak steps
command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
# what the booted machine of tests/service runs on
/usr/bin/python3 -c 'import ensurepip' >/dev/null 2>&1 || missing="$missing python3-venv"
if ! command -v node >/dev/null 2>&1 || ! command -v npm >/dev/null 2>&1; then
    missing="$missing nodejs npm"
fi

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "tests: installing the Debian packages:$missing"
        # policy-rc.d keeps freshly installed servers from being started: the tests start their own
        policy=/usr/sbin/policy-rc.d
        [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=1; }
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
            echo "tests: could not install:$missing; tests that need them are skipped"
        [ -z "${made:-}" ] || rm -f "$policy"
    else
        echo "tests: not installed and no right to install:$missing; tests that need them are skipped"
    fi
fi

if command -v npm >/dev/null 2>&1; then
    # Node has certificates of its own; this machine's also know its mirrors and proxies
    system=/etc/ssl/certs/ca-certificates.crt
    [ -n "${NODE_EXTRA_CA_CERTS:-}" ] || [ ! -e "$system" ] || export NODE_EXTRA_CA_CERTS="$system"
    for pair in "pglite:PGlite (PostgreSQL with TimescaleDB for Node)" "axe:axe-core (rules of accessibility)"; do
        folder=tests/${pair%%:*} what=${pair#*:}
        if [ ! -e "$folder/node_modules/.package-lock.json" ] ||
            [ "$folder/package-lock.json" -nt "$folder/node_modules/.package-lock.json" ]; then
            echo "tests: installing $what into $folder/node_modules"
            npm ci --prefix "$folder" --no-audit --no-fund --loglevel error || echo "tests: $what could not be installed"
        fi
    done
fi
