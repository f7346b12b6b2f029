#!/usr/bin/env bash
# Creates a complete overlay on this machine, checks that it works, and removes it again:
# three hosts with two containers each and a private etcd; every container calls every other container and an outside host.
#
#   sudo ./deploy/quickstart.sh          run it; only installed packages and target/ stay
#   sudo ./deploy/quickstart.sh --keep   leave the lab up for experiments
#   sudo ./deploy/quickstart.sh --bin target/debug   use existing programs instead of building
#
# Everything runs in network namespaces: the machine's own interfaces, routes and firewall are not touched.
set -euo pipefail

readonly LAB=quickstart
readonly HOSTS=3
readonly CONTAINERS=2
# The build script of the crate etcd-client compiles protocol files (protoc, and the files of libprotobuf-dev); iputils-ping is for experiments.
readonly PACKAGES=(gcc libc6-dev protobuf-compiler libprotobuf-dev etcd-server nftables iproute2 iputils-ping)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
work=$(mktemp -d "${TMPDIR:-/tmp}/overlay-quickstart.XXXXXX")
readonly work

keep=no
bin=
step="start"
lab_up=no
policy=""
overlayctl=""

if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
    bold="" dim="" green="" red="" plain=""
fi

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# say STEP: begins a step; later failures are reported under this name.
say() {
    step=$1
    printf '\n%s==> %s%s\n' "$bold" "$step" "$plain"
}

note() {
    printf '    %s%s%s\n' "$dim" "$*" "$plain"
}

# die REASON: exits with a reason; the trap cleans up.
die() {
    printf '\n%sFAILED%s while: %s\n    %s\n' "$red$bold" "$plain" "$step" "$*" >&2
    exit 1
}

cleanup() {
    local code=$?
    trap - EXIT INT TERM
    if [[ -n $policy ]]; then
        rm -f "$policy"
    fi
    if [[ $lab_up == yes && ( $keep == no || $code -ne 0 ) ]]; then
        printf '\n%s==> Taking the lab down%s\n' "$bold" "$plain"
        if ! "$overlayctl" lab down --name "$LAB"; then
            printf '    the lab is not completely removed; try again: %s lab down --name %s\n' "$overlayctl" "$LAB" >&2
            code=1
        fi
    fi
    if [[ $code -eq 0 ]]; then
        rm -rf "$work"
        printf '\n%sSuccess%s: the quickstart took %s s.\n' "$green$bold" "$plain" "$SECONDS"
    elif [[ $code -eq 130 || $code -eq 143 ]]; then
        rm -rf "$work"
        printf '%sInterrupted%s while: %s\n' "$red$bold" "$plain" "$step" >&2
    else
        # An empty directory contains no log.
        rmdir "$work" 2>/dev/null || printf '    logs are in %s\n' "$work" >&2
        printf '%sThe quickstart failed%s (exit code %s) while: %s\n' "$red$bold" "$plain" "$code" "$step" >&2
    fi
    exit "$code"
}

# logged LOG COMMAND...: runs a command quietly; after a failure it shows the end of the output.
logged() {
    local log=$work/$1
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 20 "$log" | sed 's/^/    /' >&2
        die "\`$*\` failed; its complete output is in $log"
    fi
}

missing_packages() {
    local package
    for package in "${PACKAGES[@]}"; do
        if ! dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed; then
            echo "$package"
        fi
    done
}

install_packages() {
    say "Packages"
    if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
        local program
        for program in cc protoc etcd nft ip; do
            command -v "$program" >/dev/null || die "$program is missing, and this system is not Debian: install the package that provides it"
        done
        note "this system is not Debian, but all needed programs exist"
        return
    fi
    local missing
    mapfile -t missing < <(missing_packages)
    if [[ ${#missing[@]} -eq 0 ]]; then
        note "all installed: ${PACKAGES[*]}"
        return
    fi
    if [[ $EUID -ne 0 ]]; then
        die "missing: ${missing[*]}. Install them, or run this with sudo: sudo $0"
    fi
    note "installing ${missing[*]}"
    # The package etcd-server has a service. The lab runs its own etcd, so that service must not start, neither now nor at the next boot.
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
        printf '#!/bin/sh\n# From overlay quickstart.sh: no service starts while it installs packages.\nexit 101\n' >/usr/sbin/policy-rc.d
        policy=/usr/sbin/policy-rc.d
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    logged apt-update.log apt-get update
    logged apt-install.log apt-get install --yes --no-install-recommends "${missing[@]}"
    if [[ " ${missing[*]} " == *" etcd-server "* ]] && command -v systemctl >/dev/null; then
        systemctl disable --quiet etcd.service 2>/dev/null || true
    fi
    if [[ -n $policy ]]; then
        rm -f "$policy"
        policy=""
    fi
    note "done"
}

# The owner of the sources if it is the sudo user, so that target/ keeps that owner.
build_user() {
    local owner
    owner=$(stat -c %U "$root")
    if [[ $EUID -eq 0 && -n ${SUDO_USER:-} && $owner == "$SUDO_USER" && $owner != root ]]; then
        echo "$SUDO_USER"
    fi
}

build() {
    if [[ -n $bin ]]; then
        say "Programs in $bin"
        overlayctl=$bin/overlayctl
        [[ -x $overlayctl && -x $bin/overlayd ]] || die "overlayctl or overlayd is not in $bin"
        note "$("$overlayctl" --version)"
        return
    fi
    say "Build (profile quickstart: fast to build, not to run; the first time takes two minutes)"
    local user home cargo
    user=$(build_user)
    local homes=("$HOME")
    if [[ -n ${SUDO_USER:-} ]]; then
        homes=("$(getent passwd "$SUDO_USER" | cut -d: -f6)" "${homes[@]}")
    fi
    cargo=$(command -v cargo || true)
    for home in "${homes[@]}"; do
        if [[ -z $cargo && -x $home/.cargo/bin/cargo ]]; then
            cargo=$home/.cargo/bin/cargo
        fi
    done
    [[ -n $cargo ]] || die "cargo is neither in PATH nor in ~/.cargo/bin: install Rust, see https://rustup.rs"
    local command=("$cargo" build --profile quickstart --locked --manifest-path "$root/Cargo.toml" --package overlay-agent --package overlayctl)
    if [[ -n $user ]]; then
        home=$(getent passwd "$user" | cut -d: -f6)
        command=(runuser -u "$user" -- env "HOME=$home" "PATH=$(dirname "$cargo"):$PATH" "${command[@]}")
    elif [[ $cargo == */.cargo/bin/cargo ]]; then
        # Root with another user's toolchain: cargo's proxy looks in that user's home directory.
        home=${cargo%/.cargo/bin/cargo}
        command=(env "CARGO_HOME=${CARGO_HOME:-$home/.cargo}" "RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}" "PATH=$(dirname "$cargo"):$PATH" "${command[@]}")
    fi
    "${command[@]}" || die "cargo build failed; its messages are above"
    overlayctl=${CARGO_TARGET_DIR:-$root/target}/quickstart/overlayctl
    [[ -x $overlayctl ]] || die "cargo build succeeded, but $overlayctl does not exist"
    note "$("$overlayctl" --version) in ${overlayctl%/*}"
}

bring_up() {
    say "Lab: $HOSTS hosts with $CONTAINERS containers each, IPv4 and IPv6"
    # Remove a lab of an earlier run with --keep.
    "$overlayctl" lab down --name "$LAB" >"$work/lab-down.log" 2>&1 || die "an earlier lab cannot be removed: $(cat "$work/lab-down.log")"
    lab_up=yes
    "$overlayctl" lab up --name "$LAB" --hosts "$HOSTS" --containers "$CONTAINERS" --family dual ||
        die "the lab did not come up; the reason is above"
}

show() {
    say "Subnets, on host h1"
    "$overlayctl" lab exec --name "$LAB" h1 -- overlayctl subnets || die "cannot read the subnets from h1's agent"
    say "Check: every container calls every other container and an outside host"
    "$overlayctl" lab check --name "$LAB" || die "at least one call failed; the calls are above"
}

# tip COMMAND MEANING
tip() {
    printf '    %-62s %s# %s%s\n' "$1" "$dim" "$2" "$plain"
}

next_steps() {
    local address
    address=$("$overlayctl" lab exec --name "$LAB" h2 -- overlayctl endpoints -o json | sed -n 's/.*"v4": "\([0-9.]*\)".*/\1/p' | head -n 1)
    say "What to try next"
    if [[ $keep == no ]]; then
        note "keep the lab up: ${BASH_SOURCE[0]} --keep. Then, as the same user:"
    fi
    printf '    export PATH=%s:%s OVERLAY_LAB=%s\n' "${overlayctl%/*}" "\$PATH" "$LAB"
    tip "overlayctl lab status" "hosts, agents, containers"
    tip "overlayctl lab exec h1 -- overlayctl status" "the agent's health"
    tip "overlayctl lab exec h1 -- overlayctl peers" "how h1 reaches the other hosts"
    tip "overlayctl lab exec h1-c1 -- ping -c 3 ${address:-ADDRESS}" "from a container of h1 to one of h2"
    tip "overlayctl lab exec h1 -- ip route" "the agent's routes"
    tip "overlayctl lab exec h1 -- ip route flush proto 86" "delete the routes; the agent repairs them"
    tip "overlayctl lab exec h1 -- overlayctl attach web" "one more container"
    if [[ $keep == yes ]]; then
        tip "overlayctl lab down" "when you are done"
    fi
    note "a first real deployment: README.md"
}

while [[ $# -gt 0 ]]; do
    argument=$1
    shift
    case $argument in
    --keep) keep=yes ;;
    --bin)
        bin=${1:-}
        shift || true
        [[ $bin == /* ]] || bin=$PWD/$bin
        ;;
    -h | --help)
        usage
        rmdir "$work"
        exit 0
        ;;
    *)
        printf 'unknown argument %s\n\n' "$argument" >&2
        usage >&2
        rmdir "$work"
        exit 2
        ;;
    esac
done

trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

install_packages
build
bring_up
show
next_steps
if [[ $keep == yes ]]; then
    printf '\n%sThe lab stays up.%s Take it down with: %s lab down --name %s\n' "$bold" "$plain" "$overlayctl" "$LAB"
fi
