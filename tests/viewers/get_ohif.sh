#!/bin/sh
# get_ohif.sh VERSION...: unpacks @ohif/app from npm into ohif/VERSION, if it is not there and its digest is the one below.
set -eu
cd "$(dirname "$0")"
for version in "$@"; do
  case $version in
    3.11.1) digest=0lJRyHguGuIR06PxeJ3rqnPWf1OAqsaXGuqT2kl5HkNjIOxBDnRTTMvyHnkn3ZyjcHlsIhY8gf0h7AhVORqsSQ== ;;
    3.12.10) digest=0kuF66Mq9c9dMD++bUsTjMrJpXJwaZhz9B4uS244DawAjSkTwIYFU93pxPuRUQixaRi7QAHlF3Fe1qudBlZrmA== ;;
    3.13.2) digest=WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA== ;;
    *) echo "no digest of @ohif/app $version is known" >&2; exit 64 ;;
  esac
  [ ! -e "ohif/$version" ] || continue
  mkdir -p ohif
  npm pack --silent --pack-destination ohif "@ohif/app@$version" > /dev/null
  archive=ohif/ohif-app-$version.tgz
  found=$(openssl dgst -sha512 -binary "$archive" | base64 -w0)
  [ "$found" = "$digest" ] || { echo "@ohif/app $version has another digest: $found" >&2; exit 1; }
  rm -rf "ohif/$version.part"
  mkdir "ohif/$version.part"
  tar -xzf "$archive" -C "ohif/$version.part" --strip-components=2 package/dist
  rm "$archive"
  mv "ohif/$version.part" "ohif/$version"
done
