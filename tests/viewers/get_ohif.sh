#!/bin/sh
# get_ohif.sh VERSION...: unpacks @ohif/app from npm into ohif/VERSION, if it is not there and its digest is the one below.
set -eu
cd "$(dirname "$0")"
for version in "$@"; do
  case $version in
    3.11.1) digest=d25251c8782e1ae211d3a3f1789debaa73d67f5380aac6971aea93da49791e436320ec410e74534ccbf21e7927dd9ca370796c22163c81fd21ec0855391aac49 ;;
    3.12.10) digest=d24b85eba32af5cf5d303fbe6d4b138ccac9a57270699873f41e2e4b6e380dac008d2913c0860553dde9c4fb915108b16918bb4001e517715ed6ab9d06566b98 ;;
    3.13.2) digest=5997719a9986eeba85816f5924b71b82bdd70ad2e2d4a0cd3e831a798e4f3deea3e06e1f8c48e393271933a0ba664d85f3b04ac457e9abe8dde715d907d13c10 ;;
    *) echo "no digest of @ohif/app $version is known" >&2; exit 64 ;;
  esac
  [ ! -e "ohif/$version" ] || continue
  mkdir -p ohif
  npm pack --silent --pack-destination ohif "@ohif/app@$version" > /dev/null
  archive=ohif/ohif-app-$version.tgz
  echo "$digest  $archive" | sha512sum --check --quiet
  rm -rf "ohif/$version.part"
  mkdir "ohif/$version.part"
  tar -xzf "$archive" -C "ohif/$version.part" --strip-components=2 package/dist
  rm "$archive"
  mv "ohif/$version.part" "ohif/$version"
done
