#!/bin/sh
# In the image: ctflow itself, the manifests, the SBOM and, where the engine of the image has a file, that file.
set -eu
flavour=$1 engine=$2 model=$3
install_wheel() {
  python "$(echo /mnt/wheels/pip-*.whl)/pip" --python /opt/ctflow/bin/python install --quiet --no-index --no-deps --no-compile \
    --no-cache-dir "$@"
}
install_wheel /mnt/ctflow/ctflow-*.whl
folder=$(echo /opt/ctflow/lib/python3*/site-packages/ctflow)
python -m compileall -q --invalidation-mode unchecked-hash "$folder"
# What the image leaves out must not be missed.
python -c 'import ctflow.app.application'
python /mnt/recipe/libraries.py
mkdir -p /etc/holoscan /var/holoscan/input /var/holoscan/output /var/holoscan/logs /var/holoscan/cache
cp /opt/holoscan/app/app.yaml /var/holoscan/app.yaml
python /mnt/recipe/manifests.py /opt/holoscan/app/app.yaml "$flavour" "$model" /etc/holoscan
PYTHONPATH=/mnt/wheels/sbom python /mnt/recipe/sbom.py /opt/holoscan/docs
# Triton compiles kernels here and does not stay. It comes with torch's build for GPUs.
for triton in /mnt/wheels/triton-*.whl; do
  [ ! -e "$triton" ] || install_wheel --target /tmp/triton "$triton"
done
PYTHONPATH=/tmp/triton python /mnt/recipe/engine.py "$flavour" "$engine" /mnt/engines /var/holoscan/cache
chmod -R a+rX,go-w "$folder" /opt/holoscan /etc/holoscan /var/holoscan
# Any user may write here, whichever the site runs the container as, unless the container is read-only.
chmod 1777 /var/holoscan/output /var/holoscan/logs /var/holoscan/cache
find /tmp -mindepth 1 -delete
