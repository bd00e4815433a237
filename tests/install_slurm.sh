#!/usr/bin/env bash
# Installs what the tests on a real Slurm need (tests/slurm_cluster.py), on Debian or Ubuntu as root. Starts nothing.
set -euo pipefail
packages=(slurm-wlm munge libpmix-dev openssh-server iproute2 util-linux)

if dpkg --status "${packages[@]}" >/dev/null 2>&1; then
    exit
elif [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "tests/install_slurm.sh: not root on Debian or Ubuntu: the tests that need a Slurm will be skipped" >&2
    exit
fi

policy=/usr/sbin/policy-rc.d # Debian asks it before it starts the daemon of a package
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
apt-get update --quiet --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends "${packages[@]}"
