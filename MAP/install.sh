#!/bin/sh
# In the image: the libraries, from wheels at /mnt/wheels, as /opt/ctflow. One layer: files removed here take no space.
set -eu
flavour=$1 python=python$2

if ! command -v "$python" > /dev/null; then
  command -v apt-get > /dev/null || { echo "the base has neither $python nor apt to install it" >&2; exit 4; }
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends "$python"
  rm -rf /var/lib/apt/lists/*
fi
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
sed -i '/^[^:]*:[^:]*:1000:/d' /etc/passwd /etc/group
echo 'holoscan:x:1000:1000::/tmp:/usr/sbin/nologin' >> /etc/passwd
echo 'holoscan:x:1000:' >> /etc/group

# All wheels except those that the flavour does not need. pip runs from its own wheel and does not stay in the image.
set --
for wheel in /mnt/wheels/*.whl; do
  name=$(basename "$wheel" | cut -d- -f1 | tr _ -)
  grep -q "^$name\( \|$\)" "/mnt/recipe/prune-$flavour.txt" || set -- "$@" "$wheel"
done
"$python" -m venv --without-pip /opt/ctflow
pip=$(echo /mnt/wheels/pip-*.whl)
"$python" "$pip/pip" --python /opt/ctflow/bin/python install --quiet --no-index --no-deps \
  --no-compile --no-cache-dir "$@"
# Holoscan's wheel creates its links when Python first starts after the installation, and needs pip for that.
PYTHONPATH=$pip PYTHONDONTWRITEBYTECODE=1 /opt/ctflow/bin/python -c ''
ls /opt/ctflow/lib/python*/site-packages/holoscan_cu13-*.dist-info/axle.done > /dev/null

cd /opt/ctflow/lib/python*/site-packages
# Tests, headers, static libraries and programs of others, and parts for hardware that the image is not for.
find . -type d \( -name tests -o -name test \) ! -path '*.dist-info/*' -prune -exec rm -rf {} +
find . -name '*.a' -delete
rm -rf torch/include torch/share openvino/include nvidia/*/include
rm -f openvino/libs/libopenvino_intel_gpu_plugin.so openvino/libs/libopenvino_intel_npu_plugin.so openvino/libs/cache.json
find torch/bin -type f ! -name torch_shm_manager -delete
# Files that the flavour does not need. Without CUDA's libraries (a torch for CPUs, by MAP_TORCH) there are none to remove.
sed -n 's|^\([^# ]*/[^# ]*\).*|\1|p' "/mnt/recipe/prune-$flavour.txt" | while read -r pattern; do
  # shellcheck disable=SC2086  # a pattern of the shell
  set -- $pattern
  [ ! -d nvidia/cudnn ] || [ -e "$1" ] || { echo "prune-$flavour.txt: no file is $pattern" >&2; exit 1; }
  rm -f "$@"
done
# Compiled here, because the image is read-only when it runs, and without dates, so that each build gives the same files.
# Some packages contain files for other Python versions.
/opt/ctflow/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . > /dev/null || true
find /usr/lib/python3* /opt/ctflow -name '*.pyc.*' -delete
