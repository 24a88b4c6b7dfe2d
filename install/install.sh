#!/bin/sh
# Installs ctflow with everything that its demo and its tests need into a virtual environment (docs/install.md).
#
#   usage: [PYTHON=python3.12] [TORCH=cpu|pip|URL|FOLDER] sh install/install.sh VENV
#
# Finished steps are not repeated. An interrupted installation starts over, because pip cannot tell a half-copied package from a
# complete one.
set -eu
venv=$1 here=$(dirname "$0") PYTHON=${PYTHON:-} TORCH=${TORCH:-}
unset PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX || true # would lead pip out of the environment
export PIP_REQUIRE_VIRTUALENV=1

fail() { echo "install: $*" >&2; exit 1; }
say() { echo "==> $*"; }

# The Python that PYTHON names, or that the environment was made with, or else the newest that ctflow runs on.
choose_python() {
  if [ -n "$PYTHON" ]; then
    command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such program"
    version=$("$PYTHON" "$here/check_python.py") || fail "PYTHON=$PYTHON: ${version:-it does not start}"
    python=$PYTHON
    return
  fi
  reason=''
  before=$("$venv/bin/python" -c 'import sys; print(getattr(sys, "_base_executable", ""))' 2> /dev/null || true)
  for python in "$before" python3.13 python3.12 python3.11 python3; do
    # A name may be there and not start, as pyenv's do.
    if [ -z "$python" ] || ! "$python" -c '' 2> /dev/null; then continue; fi
    if version=$("$python" "$here/check_python.py"); then return; fi
    reason=${reason:-"$python: ${version:-it does not start}"} # the newest one's
  done
  fail "${reason:-no python3 here: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12}"
}

version_in() { "$1/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true; }

# Everything that an installation depends on; another key means another installation.
key() { cat pyproject.toml constraints.txt "$here/install.sh" | cksum; }

# An environment that can be built on: whole, of the Python and the torch that were asked for.
is_fit() {
  [ -x "$venv/bin/python" ] && [ -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/.incomplete" ] || return 1
  [ "$(cat "$venv/.place" 2> /dev/null)" = "$(pwd -P)" ] || return 1 # its programs name their folder
  [ -z "$PYTHON" ] || [ "$(version_in "$venv")" = "$version" ] || return 1
  [ -z "$TORCH" ] || [ "$(cat "$venv/.torch" 2> /dev/null)" = "$TORCH" ] || return 1
}

# Sets `source`, what a person reads, and pip's `option` and `place` for it.
choose_torch() {
  option='' place=''
  case $TORCH in
    '' | pip) source="pip's index: on Linux its build for NVIDIA GPUs, unless pip is set up otherwise
    about 3.7 GB to download in all, 7 GB on disk; the build for CPUs: 1.2 GB and 4.3 GB (Ctrl-C, make demo TORCH=cpu)" ;;
    cpu) option=--index-url place=$(sed -n 's/^torch-cpu-index = "\(.*\)"$/\1/p' pyproject.toml)
      source="$place, the build for CPUs: about 1.2 GB to download in all, 4.3 GB on disk" ;;
    *://*) option=--index-url place=$TORCH source=$TORCH ;;
    *) [ -d "$TORCH" ] || fail "TORCH=$TORCH: neither cpu nor pip, nor the address of an index, nor a folder with wheels"
      option=--find-links place=$TORCH source="the folder $TORCH" ;;
  esac
}

# torch first and by itself, so that its source decides the build and the rest comes from pip's own index.
install_torch() {
  torch=$(grep '^torch==' constraints.txt)
  say "$torch from $source"
  set --
  [ -z "$option" ] || set -- "$option" "$place"
  # A folder alone: not also the places that pip's configuration names.
  [ "$option" != --find-links ] || { set -- --no-index "$@"; export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=; }
  pip_install --no-deps "$@" "$torch"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@"; }

install_packages() {
  say "ctflow and the packages of its demo and tests, at the versions of constraints.txt"
  pip_install --constraint constraints.txt --editable '.[dev]' || return # `set -e` is off in what `||` follows
  # Where the checkout is called ctflow, Python takes it for a package without modules as long as such a folder is on the path: an
  # editable install that maps packages is asked later. A path with the real package is not.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
  printf '%s\n' "$(pwd -P)/src" > "$site/ctflow-source.pth"
}

give_up() {
  fail "not finished; pip's message is above. 'No matching distribution' and 'conflicting dependencies' often mean that pip did not
reach its index, or that a mirror lacks a version: check HTTPS_PROXY, PIP_INDEX_URL and PIP_CERT. Run the same command again: it
starts over, and reuses the downloads that pip has kept."
}

choose_python
if [ "$(cat "$venv/.installed" 2> /dev/null)" = "$(key)" ] && is_fit; then exit 0; fi
fit=no
if is_fit; then fit=yes; fi
TORCH=${TORCH:-$(cat "$venv/.torch" 2> /dev/null || true)}
choose_torch
if [ "$fit" = no ]; then
  say "$("$python" -c 'import sys; print("Python %d.%d.%d, %s" % (sys.version_info[:3] + (sys.executable,)))'), in $venv"
  # At no moment is there an interpreter without the mark beside it: a python whose pyvenv.cfg is gone is the system's own.
  mkdir -p "$venv"
  touch "$venv/.incomplete"
  find "$venv" -mindepth 1 -maxdepth 1 ! -name .incomplete ! -name .torch -exec rm -rf {} +
  printf '%s\n' "$TORCH" > "$venv/.torch"
  pwd -P > "$venv/.place"
  "$python" -m venv "$venv" || give_up
fi
rm -f "$venv/.installed"
touch "$venv/.incomplete"
(install_torch) || give_up
install_packages || give_up
rm "$venv/.incomplete"
say "engines for this CPU: made and timed once, about a minute"
"$venv/bin/ctflow" export --device cpu > /dev/null || say "no engine was made ahead: the first run makes it"
key > "$venv/.installed"
