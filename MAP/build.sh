#!/usr/bin/env bash
# Builds the MONAI Application Package: an OCI image, its archive, its SBOM and its licence list (docs/map.md).
set -euo pipefail
CALLER=$PWD
REPOSITORY=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
cd "$REPOSITORY"

usage() {
  cat <<'USAGE'
usage: MAP/build.sh [options]

  --flavour cpu|cuda   cpu (default): OpenVINO; cuda: NVIDIA GPUs, and OpenVINO where there is none
  --base IMAGE         base image with Python 3.11 to 3.13, or with apt to install it (default: Debian 12, by mmdebstrap)
  --model PATH         model to put in: the folder of a MONAI bundle, or an nnU-Net model as a folder or zip (default: bundle, the
                       demonstration); --bundle is the same
  --config FILE        the bundle's configuration, as of ctflow run: the image's CTFLOW_CONFIG
  --allow-code         let the image execute the bundle's own code, as of ctflow run: its CTFLOW_ALLOW_CODE
  --engine NAME        engine of the image (default: openvino in cpu, auto in cuda); cpu makes its file now
  --extra NAME         one more extra of ctflow, such as tensorrt (cuda has openvino and tensorrt-rtx); may be repeated
  --python X.Y         Python of the base (default: 3.11)
  --tag NAME           image name (default: localhost/ctflow:VERSION-FLAVOUR)
  --output DIR         gets the archive, SBOM and licences (default: build/map)
  --tool NAME          buildah, podman or docker (default: the first that is there)
  --no-archive         image only
  --fresh              base and wheels anew, as for security updates; else they are kept in the output folder

PYTHON  interpreter with pip that collects the wheels (default: .venv/bin/python, else python3)
TORCH   where torch comes from: pip (pip's own index), cpu (PyTorch's index of builds for CPUs), the address of an index,
        or a folder with wheels (default: pip for cuda, which must then have the build for GPUs; for cpu: as PYTHON's torch,
        if that is a build for CPUs, else cpu); with make: MAP_TORCH
USAGE
}

fail() { echo "MAP/build.sh: $1" >&2; exit "${2:-1}"; }
say() { echo "MAP: $*" >&2; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }
digest() { cat "$@" | sha256sum | cut -c1-16; }
of_caller() { case $1 in /*) echo "$1" ;; *) echo "$CALLER/$1" ;; esac; }

flavour=cpu base='' bundle=bundle config='' allow_code='' engine='' extras=() python=3.11 tag='' output=build/map tool='' archive=yes fresh=no
while [ $# -gt 0 ]; do
  case $1 in
    -h|--help) usage; exit 0 ;;
    --no-archive) archive=no; shift; continue ;;
    --fresh) fresh=yes; shift; continue ;;
    --allow-code) allow_code=yes; shift; continue ;;
    --flavour|--base|--model|--bundle|--config|--engine|--extra|--python|--tag|--output|--tool)
      [ $# -ge 2 ] || fail "$1 wants a value; --help lists the options" 64 ;;
    *) fail "$1 is no option; --help lists them" 64 ;;
  esac
  case $1 in
    --flavour) flavour=$2 ;;
    --base) base=$2 ;;
    --model|--bundle) bundle=$(of_caller "$2") ;;
    --config) config=$2 ;;
    --engine) engine=$2 ;;
    --extra) extras+=("$2") ;;
    --python) python=$2 ;;
    --tag) tag=$2 ;;
    --output) output=$(of_caller "$2") ;;
    --tool) tool=$2 ;;
  esac
  shift 2
done

case $flavour in
  cpu) gpus=void extras+=(holoscan openvino); engine=${engine:-openvino} ;;
  cuda) gpus=all extras+=(holoscan openvino tensorrt-rtx); engine=${engine:-auto} ;;
  *) fail "--flavour: $flavour is neither cpu nor cuda" 64 ;;
esac
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
model=$("$PYTHON" MAP/model.py name "$bundle") || exit $?
for candidate in buildah podman docker; do
  [ -n "$tool" ] || ! command -v "$candidate" > /dev/null || tool=$candidate
done
[ -n "$tool" ] || fail "none of buildah, podman and docker is here: apt-get install buildah" 4
command -v "$tool" > /dev/null || fail "$tool is not here" 4
VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
tag=${tag:-localhost/ctflow:$VERSION-$flavour}
mkdir -p "$output"
output=$(cd "$output" && pwd)
[ "$fresh" = no ] || rm -rf "$output/base.tar" "$output/wheels-cpu" "$output/wheels-cuda"
context=$output/context-$flavour

# Runs a command again where buildah could not seal the copy of itself from which it starts: on a busy machine another
# process may still hold it, and once that cost a build whose image was finished. Any other failure is one at once.
again() { # COMMAND ...
  local attempt status log=$output/tool.log
  for attempt in 1 2 3 4 5; do
    status=0
    { "$@" 2>&1 >&3 3>&- | tee "$log" >&2 3>&-; } 3>&1 || status=$?
    [ "$status" -ne 0 ] && grep -q "sealing memfd copy: Device or resource busy" "$log" || return "$status"
    say "$tool was busy (attempt $attempt of 5)"
    sleep "${MAP_PAUSE:-3}"
  done
  return "$status"
}

# Image files of a name, in the words of the tool at hand. Chroot isolation needs neither a daemon nor namespaces.
build_image() { # TAG CONTEXT CONTAINERFILE [build arguments ...]
  local name=$1 folder=$2 file=$3
  shift 3
  case $tool in
    buildah|podman) again "$tool" build --isolation "${BUILDAH_ISOLATION:-chroot}" --layers --pull=false --format oci \
      -t "$name" -f "$file" "$@" "$folder" ;;
    docker) docker buildx build --load -t "$name" -f "$file" "$@" "$folder" ;;
  esac
}

make_base() {
  if [ ! -f "$output/base.tar" ]; then
    say "Debian base"
    command -v mmdebstrap > /dev/null || fail "mmdebstrap is not here: apt-get install mmdebstrap, or give --base" 4
    local mirror=${DEBIAN_MIRROR:-http://deb.debian.org}
    # shellcheck disable=SC2016  # mmdebstrap's shell expands $1, the new root
    # usr-is-merged stands for a package that would bring Perl. Licences stay; manuals and translations do not.
    mmdebstrap --quiet --format=tar --variant=essential --include=usr-is-merged,python3,libstdc++6 \
      --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
      --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
      --customize-hook='rm -rf "$1"/usr/lib/python3*/test "$1"/usr/lib/python3*/EXTERNALLY-MANAGED' \
      --customize-hook='find "$1" -xdev -type f -perm /6000 -exec chmod a-s {} +' \
      bookworm "$output/base.tar.part" "deb $mirror/debian bookworm main" \
      "deb $mirror/debian bookworm-updates main" "deb $mirror/debian-security bookworm-security main" 1>&2
    mv "$output/base.tar.part" "$output/base.tar"
  fi
  base=localhost/ctflow-base:$(digest "$output/base.tar")
  if ! image_exists "$base"; then
    mkdir -p "$output/context-base"
    ln -f "$output/base.tar" "$output/context-base/base.tar"
    build_image "$base" "$output/context-base" MAP/Containerfile.base
  fi
}

image_exists() {
  case $tool in
    buildah) buildah inspect --type image "$1" > /dev/null 2>&1 ;;
    podman) podman image exists "$1" ;;
    docker) docker image inspect "$1" > /dev/null 2>&1 ;;
  esac
}

# Sets `torch`, what was chosen, and `torch_from`, the same as pip's options.
choose_torch() {
  torch=${TORCH:-}
  if [ -z "$torch" ]; then
    torch=pip
    if [ "$flavour" = cpu ]; then
      # As `make install TORCH=...` got the one that is installed, if that is a build for CPUs.
      torch=$(cat "$(dirname "$PYTHON")/../.torch" 2> /dev/null || true)
      torch=${torch:-pip}
      is_cpu_build installed || torch=cpu
    fi
  fi
  case $torch in
    pip) torch_from=() ;;
    cpu) torch_from=(--index-url "$(sed -n 's/^torch-cpu-index = "\(.*\)"$/\1/p' pyproject.toml)") ;;
    *://*) torch_from=(--index-url "$torch") ;;
    *)
      torch=$(of_caller "$torch")
      [ -d "$torch" ] || fail "TORCH: $torch is neither pip nor cpu, nor the address of an index, nor a folder" 64
      torch_from=(--no-index --find-links "$torch") ;;
  esac
}

is_cpu_build() { "$PYTHON" MAP/torch_build.py "$1"; } # WHEEL, or "installed"

# Before the gigabytes that it needs are fetched. A build for CPUs gets into an image for GPUs only by name.
refuse_wrong_torch() { # WHEEL
  if [ "$flavour" = cpu ]; then
    is_cpu_build "$1" ||
      fail "this torch is the build for NVIDIA GPUs, gigabytes that a CPU image does not need: make map MAP_TORCH=cpu takes the other" 4
  elif [ -z "${TORCH:-}" ] && is_cpu_build "$1"; then
    fail "pip's index, or a folder it looks in, has torch as the build for CPUs only: make map-cuda MAP_TORCH=URL|FOLDER names another" 4
  fi
}

# Every wheel of the image, pinned, so that the build itself needs no network. torch first and by itself: else a
# requirement might bring the build of another index.
collect_wheels() {
  local wanted=$output/requirements-$flavour.txt wheels key networks platforms=() glibc torch torch_from=() pins=(--constraint constraints.txt --constraint MAP/constraints.txt)
  choose_torch
  "$PYTHON" MAP/requirements.py "${extras[@]}" > "$wanted"
  networks=dynamic-network-architectures==$(pinned dynamic_network_architectures)
  key=$(digest "$wanted" constraints.txt MAP/constraints.txt)-$python-$torch-$networks
  wheels=$output/wheels-$flavour
  if [ "$(cat "$wheels/key" 2> /dev/null)" != "$key" ]; then
    say "wheels; torch $(pinned torch) from ${torch_from[*]:-the index of pip}"
    rm -rf "$wheels"
    mkdir -p "$wheels/sbom"
    if [ "$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$python" ]; then
      for glibc in $(seq 36 -1 17); do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
      platforms+=(--platform manylinux2014_x86_64 --python-version "$python")
    fi
    # Has no wheel itself; only its parts have.
    [ "$flavour" = cpu ] || "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$wheels" \
      "tensorrt-rtx-cu13==$(pinned tensorrt_rtx_cu13)"
    local pip=("$PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary=:all: "${platforms[@]}")
    "${pip[@]}" --no-deps --dest "$wheels" "${torch_from[@]}" "torch==$(pinned torch)" ||
      fail "torch $(pinned torch) is not to be had from there; TORCH names another place (--help)" 4
    refuse_wrong_torch "$wheels"/torch-*.whl
    "${pip[@]}" --dest "$wheels" --find-links "$wheels" "${pins[@]}" "$wheels"/torch-*.whl -r "$wanted" pip
    # nnU-Net's networks, in every image. Without timm, which only its transformers use, and with it torchvision and a
    # client for downloads; what else they need ctflow needs itself.
    "${pip[@]}" --no-deps --dest "$wheels" "$networks"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --target "$wheels/sbom" \
      --constraint constraints.txt cyclonedx-python-lib
    echo "$key" > "$wheels/key"
  fi
}

# The Containerfile's context: large files are linked instead of copied.
fill_context() {
  local code=(app bundle operators src LICENSE README.md pyproject.toml) source=$context.source
  rm -rf "$context" "$source"
  mkdir -p "$context/recipe" "$context/ctflow" "$context/docs"
  cp -al "$output/wheels-$flavour" "$context/wheels"
  cp -p MAP/install.sh MAP/finish.sh MAP/prune-*.txt MAP/manifests.py MAP/sbom.py MAP/engine.py MAP/libraries.py "$context/recipe/"
  cp -p MAP/tools.py "$context/tools"
  cp -p README.md LICENSE CHANGELOG.md docs/map.md "$context/docs/"
  mkdir "$context/app"
  tree_files app | xargs -0 cp -p -t "$context/app"
  "$PYTHON" MAP/model.py copy "$bundle" "$context/model"
  chmod -R a-s,u+rwX,go+rX,go-w "$context/model" # as the image has it, so that no layer holds it twice
  # A wheel of the working tree, built from a copy, so that it contains nothing of an earlier build, nor today's date.
  mkdir "$source"
  tree_files "${code[@]}" | xargs -0 cp -p --parents -t "$source"
  SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800} \
    "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$context/ctflow" "$source" 2> \
    "$output/wheel.log" || { cat "$output/wheel.log" >&2; fail "ctflow's wheel cannot be built"; }
  rm -rf "$source"
  # Tools that build from a Containerfile do not all look at what a RUN mounts: these make them do so.
  library_key=$(digest "$output/wheels-$flavour/key" MAP/install.sh "MAP/prune-$flavour.txt")
  code_key=$(tree_files MAP "${code[@]}" | xargs -0 sha256sum | digest)
}

# Null-separated; a source archive has no git to ask, and no more in it than what was packed and what was made since.
tree_files() {
  if [ -e .git ]; then
    git ls-files -z --cached --others --exclude-standard "$@"
  else
    find "$@" -type f ! -path '*/__pycache__/*' ! -path '*.egg-info/*' -print0
  fi
}

# One file that every engine loads; beside it what is inside, for who must know before loading.
write_archive() {
  local file=$output/ctflow-$VERSION-$flavour.tar
  rm -f "$file"
  say "archive $file"
  case $tool in
    buildah) again buildah push --quiet --compression-format gzip --compression-level 1 "$tag" "oci-archive:$file:$tag" > /dev/null ;;
    podman) again podman save --quiet --format oci-archive --output "$file" "$tag" ;;
    docker) docker save --output "$file" "$tag" ;;
  esac
  (cd "$output" && sha256sum "$(basename "$file")" > "$(basename "$file").sha256")
}

# Not `buildah mount`, which a user other than root may not.
read_document() { # CONTAINER NAME FILE
  buildah run --isolation "${BUILDAH_ISOLATION:-chroot}" "$1" -- cat "/opt/holoscan/docs/$2" > "$3"
}

extract_documents() {
  local name=$output/ctflow-$VERSION-$flavour container file
  case $tool in
    buildah)
      container=$(again buildah from --pull=false "$tag")
      for file in sbom.cdx.json licences.txt; do
        again read_document "$container" "$file" "$name.$file"
      done
      again buildah rm "$container" > /dev/null ;;
    *)
      container=$(again "$tool" create "$tag")
      again "$tool" cp "$container:/opt/holoscan/docs/sbom.cdx.json" "$name.sbom.cdx.json"
      again "$tool" cp "$container:/opt/holoscan/docs/licences.txt" "$name.licences.txt"
      again "$tool" rm "$container" > /dev/null ;;
  esac
}

[ -n "$base" ] || make_base
collect_wheels
fill_context
say "image $tag on $base"
build_image "$tag" "$context" MAP/Containerfile \
  --build-arg "BASE=$base" --build-arg "FLAVOUR=$flavour" --build-arg "ENGINE=$engine" --build-arg "GPUS=$gpus" --build-arg "MODEL=$model" \
  --build-arg "CONFIG=$config" --build-arg "ALLOW_CODE=$allow_code" \
  --build-arg "TAG=$tag" --build-arg "VERSION=$VERSION" --build-arg "PYTHON=$python" \
  --build-arg "LIBRARY_KEY=$library_key" --build-arg "CODE_KEY=$code_key" \
  --build-arg "HOLOSCAN=$(pinned holoscan-cu13)" --build-arg "APP_SDK=$(pinned monai-deploy-app-sdk)"
extract_documents
[ "$archive" = no ] || write_archive
say "done: $tag"
