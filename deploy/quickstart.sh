#!/usr/bin/env bash
# Brings up the whole overlay on this one machine, proves that it works, and takes it down again:
# three hosts with two containers each, a private etcd, every container calling every other one and the world outside.
#
#   sudo ./deploy/quickstart.sh          try it; nothing stays behind but installed packages and target/
#   sudo ./deploy/quickstart.sh --keep   leave the lab up to play with
#   sudo ./deploy/quickstart.sh --bin target/debug   with programs that are built already
#
# Everything runs in network namespaces: the machine's own interfaces, routes and firewall are not touched.
set -euo pipefail

readonly LAB=quickstart
readonly HOSTS=3
readonly CONTAINERS=2
# etcd-client's build script compiles protocol files (protoc, and the ones that libprotobuf-dev has); iputils-ping is for playing.
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

# say STEP: begins a step; what fails from here on is told under this name.
say() {
    step=$1
    printf '\n%s==> %s%s\n' "$bold" "$step" "$plain"
}

note() {
    printf '    %s%s%s\n' "$dim" "$*" "$plain"
}

# die REASON: ends with a reason; the trap cleans up.
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
            printf '    the lab is not wholly removed; try again: %s lab down --name %s\n' "$overlayctl" "$LAB" >&2
            code=1
        fi
    fi
    if [[ $code -eq 0 ]]; then
        rm -rf "$work"
        printf '\n%sAll is well%s: the quickstart took %s s.\n' "$green$bold" "$plain" "$SECONDS"
    elif [[ $code -eq 130 || $code -eq 143 ]]; then
        rm -rf "$work"
        printf '%sInterrupted%s while: %s\n' "$red$bold" "$plain" "$step" >&2
    else
        # An empty directory is no log.
        rmdir "$work" 2>/dev/null || printf '    logs are in %s\n' "$work" >&2
        printf '%sThe quickstart failed%s (exit code %s) while: %s\n' "$red$bold" "$plain" "$code" "$step" >&2
    fi
    exit "$code"
}

# logged LOG COMMAND...: runs a command quietly; where it fails, the end of its output is shown.
logged() {
    local log=$work/$1
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 20 "$log" | sed 's/^/    /' >&2
        die "\`$*\` failed; its whole output is in $log"
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
            command -v "$program" >/dev/null || die "$program is missing, and this is no Debian: install what provides it"
        done
        note "no Debian, but everything needed is there"
        return
    fi
    local missing
    mapfile -t missing < <(missing_packages)
    if [[ ${#missing[@]} -eq 0 ]]; then
        note "all there: ${PACKAGES[*]}"
        return
    fi
    if [[ $EUID -ne 0 ]]; then
        die "missing: ${missing[*]}. Install them, or run this with sudo: sudo $0"
    fi
    note "installing ${missing[*]}"
    # etcd-server brings a service; the lab runs its own etcd, so the machine must not get one now or at the next boot.
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
        printf '#!/bin/sh\n# Of overlay quickstart.sh: no service starts while it installs packages.\nexit 101\n' >/usr/sbin/policy-rc.d
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

# The user who owns the sources: under sudo the one who called, so that target/ stays theirs.
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
    say "Build (release; the first time takes some minutes)"
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
    [[ -n $cargo ]] || die "cargo is not to be found, neither in PATH nor in ~/.cargo/bin: install Rust, see https://rustup.rs"
    local command=("$cargo" build --release --locked --manifest-path "$root/Cargo.toml" --package overlay-agent --package overlayctl)
    if [[ -n $user ]]; then
        home=$(getent passwd "$user" | cut -d: -f6)
        command=(runuser -u "$user" -- env "HOME=$home" "PATH=$(dirname "$cargo"):$PATH" "${command[@]}")
    elif [[ $cargo == */.cargo/bin/cargo ]]; then
        # Root with somebody else's toolchain: cargo's proxy finds it beside its own directory.
        home=${cargo%/.cargo/bin/cargo}
        command=(env "CARGO_HOME=${CARGO_HOME:-$home/.cargo}" "RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}" "PATH=$(dirname "$cargo"):$PATH" "${command[@]}")
    fi
    "${command[@]}" || die "cargo could not build; its messages are above"
    overlayctl=${CARGO_TARGET_DIR:-$root/target}/release/overlayctl
    [[ -x $overlayctl ]] || die "cargo has built, but $overlayctl is not there"
    note "$("$overlayctl" --version) in ${overlayctl%/*}"
}

bring_up() {
    say "Lab: $HOSTS hosts with $CONTAINERS containers each, IPv4 and IPv6"
    # One that an earlier run with --keep left up.
    "$overlayctl" lab down --name "$LAB" >"$work/lab-down.log" 2>&1 || die "an earlier lab cannot be removed: $(cat "$work/lab-down.log")"
    lab_up=yes
    "$overlayctl" lab up --name "$LAB" --hosts "$HOSTS" --containers "$CONTAINERS" --family dual ||
        die "the lab did not come up; the reason is above"
}

show() {
    say "Subnets, as host h1 sees them"
    "$overlayctl" lab exec --name "$LAB" h1 -- overlayctl subnets || die "h1's agent does not tell the subnets"
    say "Check: every container calls every other one and the world outside"
    "$overlayctl" lab check --name "$LAB" || die "not every call went as it must; the calls are above"
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
        note "bring up a lab that stays: ${BASH_SOURCE[0]} --keep. Then, as the same user:"
    fi
    printf '    export PATH=%s:%s OVERLAY_LAB=%s\n' "${overlayctl%/*}" "\$PATH" "$LAB"
    tip "overlayctl lab status" "hosts, agents, containers"
    tip "overlayctl lab exec h1 -- overlayctl status" "the agent's health"
    tip "overlayctl lab exec h1 -- overlayctl peers" "how h1 reaches the others"
    tip "overlayctl lab exec h1-c1 -- ping -c 3 ${address:-ADDRESS}" "from a container of h1 to one of h2"
    tip "overlayctl lab exec h1 -- ip route" "what the agent made of it"
    tip "overlayctl lab exec h1 -- ip route flush proto 86" "break it, and see it mended"
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
