#!/bin/sh
# usage: packaging/wheels.sh FOLDER [EXTRAS]
# Gathers the wheel of this source and of everything it needs, for the Python in $PYTHON (python3), with what
# constraints.txt pins. `tidegate install --wheels FOLDER` then needs no network.
set -eu
folder=$1 extras=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$folder" .build
tools=.build/wheel-tools-$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -x "$tools/bin/hatchling" ] || {
    "${PYTHON:-python3}" -m venv --clear "$tools"
    "$tools/bin/python" -m pip -q --disable-pip-version-check install --only-binary=:all: --constraint constraints.txt hatchling
}
rm -f "$folder"/tidegate-*.whl
pip="$tools/bin/python -m pip -q --disable-pip-version-check"
$pip wheel --no-build-isolation --no-deps --wheel-dir "$folder" .
# already there: the index is not contacted
wheel=$(echo "$folder"/tidegate-*.whl)
$pip download --only-binary=:all: --no-index --find-links "$folder" --constraint constraints.txt --dest "$folder" "$wheel$extras" 2>/dev/null ||
    $pip download --only-binary=:all: --find-links "$folder" --constraint constraints.txt --dest "$folder" "$wheel$extras"
