#!/bin/sh
# An environment with the oldest version of each package that pyproject.toml names, on the oldest Python with Holoscan.
set -eu
venv=$1 uv=${UV:-uv}
"$uv" venv --quiet --clear --python 3.11 "$venv"
# cuda-python before 13 lays its files over those of cuda-bindings, which torch requires.
echo 'cuda-python>=13' > "$venv/constraints.txt"
"$uv" pip compile --quiet --constraint "$venv/constraints.txt" --resolution lowest-direct --python-version 3.11 --python-platform x86_64-manylinux_2_35 \
  --extra dev --no-header --output-file "$venv/requirements.txt" pyproject.toml > /dev/null
VIRTUAL_ENV=$venv "$uv" pip install --requirement "$venv/requirements.txt"
VIRTUAL_ENV=$venv "$uv" pip install --no-deps --editable .
# Holoscan's wheel makes its links when Python starts for the first time, and wants pip for that.
"$venv/bin/python" -c ''
