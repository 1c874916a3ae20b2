#!/usr/bin/env bash
# base_image.sh OUT.tar: a minimal Debian with python3, venv and a compiler, from this machine's own package sources.
# For machines that reach Debian's packages but no image registry. Needs root and mmdebstrap.
set -euo pipefail

main() {
  local -r out=${1:?usage: base_image.sh OUT.tar}
  local suite sources
  # shellcheck source=/dev/null
  suite=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
  mapfile -t sources < <(find /etc/apt -type f \( -name '*.sources' -o -name '*.list' \))
  mmdebstrap --quiet --variant=minbase --mode=root --include=python3-minimal,python3-venv,python3-dev,g++,ca-certificates \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$suite" "$out" "${sources[@]}"
}
main "$@"
