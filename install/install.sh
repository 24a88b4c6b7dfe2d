#!/bin/sh
# Installs ctflow with everything that its demo and its tests need into a virtual environment (docs/install.md).
#
#   usage: [PYTHON=python3.12] [TORCH=cpu|URL|FOLDER] sh install/install.sh VENV
#
# Finished work is not done again; what was interrupted is begun anew, because pip does not know a package that it has
# copied by half from a whole one.
set -eu
venv=$1 here=$(dirname "$0") PYTHON=${PYTHON:-} TORCH=${TORCH:-}
unset PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX || true # would lead pip out of the environment

fail() { echo "install: $*" >&2; exit 1; }
say() { echo "==> $*"; }

# The newest Python that ctflow runs on, or the one that PYTHON names; says why where there is none.
choose_python() {
  if [ -n "$PYTHON" ]; then
    command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such program"
    version=$("$PYTHON" "$here/check_python.py") || fail "PYTHON=$PYTHON: ${version:-it does not start}"
    python=$PYTHON
    return
  fi
  reason='no python3 here: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12'
  for python in python3.13 python3.12 python3.11 python3; do
    # A name may be there and not start, as pyenv's do.
    "$python" -c '' 2> /dev/null || continue
    if version=$("$python" "$here/check_python.py"); then return; fi
    reason="$python: $version"
  done
  fail "$reason"
}

version_in() { "$1/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true; }

# What an installation depends on; another key is another installation.
key() { cat pyproject.toml constraints.txt "$here/install.sh" | cksum; }

# An environment that can be built on: whole, of the Python and the torch that were asked for.
is_fit() {
  [ -x "$venv/bin/python" ] && [ ! -e "$venv/.incomplete" ] || return 1
  [ -z "$PYTHON" ] || [ "$(version_in "$venv")" = "$version" ] || return 1
  [ -z "$TORCH" ] || [ "$(cat "$venv/.torch" 2> /dev/null)" = "$TORCH" ] || return 1
}

# Sets `source`, what a person reads, and pip's `option` and `place` for it.
choose_torch() {
  option='' place=''
  case $TORCH in
    '') source="pip's index: on Linux its build for NVIDIA GPUs, unless pip is set up otherwise
    about 3.7 GB to download in all, 7 GB on disk; the build for CPUs: 1.2 GB and 4.3 GB (Ctrl-C, make demo TORCH=cpu)" ;;
    cpu) option=--index-url place=$(sed -n 's/^torch-cpu-index = "\(.*\)"$/\1/p' pyproject.toml)
      source="$place, the build for CPUs: about 1.2 GB to download in all, 4.3 GB on disk" ;;
    *://*) option=--index-url place=$TORCH source=$TORCH ;;
    *) [ -d "$TORCH" ] || fail "TORCH=$TORCH: neither cpu, nor the address of an index, nor a folder with wheels"
      option=--find-links place=$TORCH source="the folder $TORCH" ;;
  esac
}

# torch first and by itself, so that its source decides the build and the rest comes from pip's own index.
install_torch() {
  torch=$(grep '^torch==' constraints.txt)
  say "$torch from $source"
  set --
  [ -z "$option" ] || set -- "$option" "$place"
  [ "$option" != --find-links ] || set -- --no-index "$@"
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps "$@" "$torch"
}

install_packages() {
  say "ctflow and the packages of its demo and tests, at the versions of constraints.txt"
  "$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
}

give_up() {
  fail "not finished; pip's reason stands above. Where it did not reach its index: it takes a proxy from HTTPS_PROXY, a mirror
from PIP_INDEX_URL and a certificate from PIP_CERT. The same command begins anew; what was downloaded is kept."
}

choose_python
if [ "$(cat "$venv/.installed" 2> /dev/null)" = "$(key)" ] && is_fit; then exit 0; fi
if is_fit; then
  TORCH=${TORCH:-$(cat "$venv/.torch" 2> /dev/null || true)}
fi
choose_torch
if ! is_fit; then
  say "$("$python" -c 'import sys; print("Python %d.%d.%d, %s" % (sys.version_info[:3] + (sys.executable,)))'), in $venv"
  rm -rf "$venv"
  mkdir "$venv"
  touch "$venv/.incomplete"
  "$python" -m venv "$venv" || give_up
  printf '%s\n' "$TORCH" > "$venv/.torch"
fi
rm -f "$venv/.installed"
touch "$venv/.incomplete"
install_torch || give_up
install_packages || give_up
rm "$venv/.incomplete"
say "engines for this CPU: made and timed once, about a minute"
"$venv/bin/ctflow" export --device cpu > /dev/null || say "no engine was made ahead: the first run makes it"
key > "$venv/.installed"
