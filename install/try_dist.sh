#!/bin/bash
# Installs the wheel, and what the source archive makes, in a new environment with no checkout beside it, and runs them.
set -euo pipefail
PYTHON=${PYTHON:-python3} TORCH=${TORCH:-}
python=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
project=$(pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
torch=$(grep '^torch==' constraints.txt)
TORCH=${TORCH:-$(cat "$(dirname "$python")/../.torch" 2> /dev/null || true)} # as the environment of PYTHON has it
case $TORCH in
  '' | pip) from=() ;;
  cpu) from=(--index-url "$(sed -n 's/^torch-cpu-index = "\(.*\)"$/\1/p' pyproject.toml)") ;;
  *://*) from=(--index-url "$TORCH") ;;
  *) from=(--no-index --find-links "$(cd "$TORCH" && pwd)") ;;
esac
echo "==> environment"
"$python" -m venv "$place/venv"
cp constraints.txt dist/*.whl dist/*.tar.gz "$place"
cd "$place"
pip() { venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip install --quiet --no-deps "${from[@]}" "$torch"
echo "==> the source archive makes the same wheel"
pip wheel --quiet --no-deps --wheel-dir made ./*.tar.gz
names() { venv/bin/python -m zipfile -l "$1" | awk 'NR > 1 {print $1, $NF}' | sort; }
names ./*.whl > wheel.txt
names made/*.whl > made.txt
[ "$(wc -l < wheel.txt)" -gt 100 ] || { echo "the wheel holds next to nothing" >&2; exit 1; }
diff wheel.txt made.txt
echo "==> the wheel"
pip install --quiet --constraint constraints.txt ./*.whl
pip check
found=$(venv/bin/python -c 'import ctflow; print(ctflow.__file__)')
case $found in "$place"/venv/*) ;; *) echo "$found is not the wheel's" >&2; exit 1 ;; esac
unset PYTHONPATH
export CTFLOW_CACHE=$place/cache
run() { echo "\$ ctflow $*"; venv/bin/ctflow "$@"; }
run phantom case --seed 3 --tumours 1 --shape 48,128,128
run run -i case/ct -o out --engine eager
run evaluate case --results out > evaluation.txt
head -n 12 evaluation.txt
test -s "$(ls out/*/segmentation.dcm)"
test -s "$(ls out/*/report.html)"
echo "==> the application says what it lacks"
code=0
venv/bin/python -m ctflow.app -i case/ct -o out 2> said.txt || code=$?
cat said.txt
[ "$code" -eq 4 ]
grep -q 'holoscan-cu13' said.txt
[ ! -e "$project/case" ]
echo "wheel and source archive: installed, run and evaluated without the checkout"
