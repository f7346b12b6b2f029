#!/bin/bash
# Installs the tests' packages, checks this machine, and runs all tests with formatting, lints and docs.
#
#   sudo ./tests/run.sh            everything
#   sudo ./tests/run.sh --quick    without the end-to-end tests on real kernels and a real etcd
#
# It can be repeated at any time. It needs root, because the end-to-end tests create network namespaces. It does not touch this
# machine's own network namespace; the last section compares it with its earlier state.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(busybox-static ca-certificates containerd containernetworking-plugins curl docker.io etcd-client etcd-server faketime gcc iproute2 iptables
    iputils-ping libc6-dev nftables openssl podman procps prometheus libprotobuf-dev protobuf-compiler runc tcpdump util-linux)
OPTIONAL_PACKAGES=(shellcheck) # used if available
SCRIPTS=(.ci/run tests/run.sh tests/fuzz.sh tests/systemd.sh tests/vagrant.sh)

quick=no
failed=()
summary=()
work=$(mktemp -d)

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; }

main() {
    for argument in "$@"; do
        case $argument in
        --quick) quick=yes ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && echo "unknown argument: $argument" >&2 && exit 2 ;;
        esac
    done
    if [ "$(id -u)" -ne 0 ]; then
        echo "tests/run.sh: root is needed to install packages and to create network namespaces: run  sudo $0 $*" >&2
        exit 2
    fi
    trap clean_up EXIT
    find_cargo
    ulimit -n "$(ulimit -Hn)" || true

    section "packages" install_packages || summarize
    section "machine" check_machine || summarize
    host_state >"$work/before"
    section "format" cargo fmt --all --check || true
    section "clippy" cargo clippy --workspace --all-targets --locked -- -D warnings || true
    section "docs" env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked || true
    section "scripts" check_scripts || true
    # The end-to-end tests start the binaries, so all of them are built first.
    section "build" cargo build --workspace --locked || summarize
    if [ "$quick" = yes ]; then
        section "tests" run_tests --exclude overlay-tests || true
        section "architecture" cargo test --locked -p overlay-tests --test architecture --test docs || true
    else
        section "tests" run_tests || true
    fi
    if [ "$quick" = no ]; then
        section "quickstart" ./deploy/quickstart.sh --bin "${CARGO_TARGET_DIR:-target}/debug" || true
    fi
    section "untouched" check_untouched || true
    summarize
}

# Runs the tests of the workspace, several side by side: most of their time they wait. Keeps how long each took for the summary.
run_tests() {
    # libtest prints times only with unstable options, so the test binaries, not the compiler, run with RUSTC_BOOTSTRAP.
    local runner
    runner=CARGO_TARGET_$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')_RUNNER
    env "$runner=env RUSTC_BOOTSTRAP=1" RUST_TEST_THREADS="${RUST_TEST_THREADS:-$(($(nproc) + 1))}" \
        cargo test --workspace --locked --no-fail-fast --lib --bins --tests "$@" -- -Z unstable-options --report-time | tee "$work/tests"
}

# The tests that took longest, from the output of run_tests: "test NAME ... ok <1.234s>".
slowest() {
    sed -nE 's/^test (.*) \.\.\. [a-zA-Z]+ <([0-9.]+)s>$/\2 s  \1/p' "$work/tests" | sort -rn | head -10
}

# Runs a command under a heading and keeps its outcome for the summary.
section() {
    local name=$1 start=$SECONDS outcome=ok
    shift
    printf '\n=== %s\n' "$name"
    # A subshell, so that -e also applies inside functions.
    set +e
    (
        set -e
        "$@"
    )
    local code=$?
    set -e
    if [ $code -ne 0 ]; then
        outcome=FAILED
        failed+=("$name")
    fi
    summary+=("$(printf '%-10s %-6s %4d s' "$name" "$outcome" $((SECONDS - start)))")
    printf -- '--- %s: %s after %d s\n' "$name" "$outcome" $((SECONDS - start))
    return $code
}

summarize() {
    printf '\n=== summary\n'
    printf '%s\n' "${summary[@]}"
    if [ -s "$work/tests" ]; then
        printf 'the ten slowest tests:\n%s\n' "$(slowest)"
    fi
    if [ ${#failed[@]} -gt 0 ]; then
        echo "FAILED: ${failed[*]}"
        exit 1
    fi
    echo "all passed after $SECONDS s"
    exit 0
}

clean_up() {
    restore_policy
    rm -rf "$work"
}

# sudo drops the user's PATH: look for cargo in rustup's directories, the user's before root's.
find_cargo() {
    local home=
    if [ -n "${SUDO_USER:-}" ]; then
        home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    fi
    if ! command -v cargo >/dev/null && [ -n "$home" ] && [ -x "$home/.cargo/bin/cargo" ]; then
        export CARGO_HOME=${CARGO_HOME:-$home/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
        PATH=$home/.cargo/bin:$PATH
    elif ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
        PATH=$HOME/.cargo/bin:$PATH
    fi
    if ! command -v cargo >/dev/null; then
        echo "tests/run.sh: cargo is not in PATH: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer with rustup" >&2
        exit 2
    fi
    if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
        echo "tests/run.sh: rustfmt or clippy is missing: run  rustup component add rustfmt clippy" >&2
        exit 2
    fi
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
    local missing=() optional=() package
    for package in "${PACKAGES[@]}"; do installed "$package" || missing+=("$package"); done
    for package in "${OPTIONAL_PACKAGES[@]}"; do installed "$package" || optional+=("$package"); done
    if [ $((${#missing[@]} + ${#optional[@]})) -eq 0 ]; then
        echo "all installed: ${PACKAGES[*]} ${OPTIONAL_PACKAGES[*]}"
        return
    fi
    if ! command -v apt-get >/dev/null; then
        [ ${#missing[@]} -eq 0 ] && return
        echo "this is not Debian: install the contents of these Debian packages: ${missing[*]}" >&2
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -q -o DPkg::Lock::Timeout=120)
    "${apt[@]}" update || echo "apt-get update failed: continuing with the existing package lists"
    if [ ${#missing[@]} -gt 0 ]; then
        keep_services_down
        "${apt[@]}" install -y --no-install-recommends "${missing[@]}" || {
            echo "cannot install ${missing[*]}: see apt-get's message above" >&2
            return 1
        }
        restore_policy
    fi
    if [ ${#optional[@]} -gt 0 ]; then
        "${apt[@]}" install -y --no-install-recommends "${optional[@]}" || echo "without ${optional[*]}: its section is skipped"
    fi
}

# etcd-server, containerd, docker.io and prometheus start services at their installation; the tests run their own servers.
# policy-rc.d prevents the start, see invoke-rc.d(8); an existing one is restored afterwards.
policy=/usr/sbin/policy-rc.d
saved=$policy.overlay-saved

keep_services_down() {
    if [ -e $policy ] && [ ! -e $saved ]; then mv $policy $saved; fi
    printf '#!/bin/sh\n# temporary, by tests/run.sh of overlayd\nexit 101\n' >$policy
    chmod 755 $policy
}

restore_policy() {
    if grep -qs 'by tests/run.sh of overlayd' $policy; then rm -f $policy; fi
    if [ -e $saved ]; then mv $saved $policy; fi
}

# Checks each kernel feature that the end-to-end tests need, in separate namespaces, with advice for each failure.
check_machine() {
    local bad=0
    try() {
        local what=$1 advice=$2
        shift 2
        if "$@" >"$work/out" 2>&1; then
            echo "ok      $what"
        else
            echo "MISSING $what: $(tail -1 "$work/out"); $advice"
            bad=1
        fi
    }
    local in_ns=(unshare --net --mount sh -euc)
    local modules="load the module, or use a kernel that has it (Debian's has all)"
    try "network namespaces" "run on a machine or in a container with CAP_SYS_ADMIN and CONFIG_NET_NS" \
        "${in_ns[@]}" 'ip link set lo up'
    try "IPv6" "switch it on: no ipv6.disable=1 on the kernel's command line" test -d /proc/sys/net/ipv6
    try "veth and bridge" "modprobe veth bridge: $modules" \
        "${in_ns[@]}" 'ip link add name v0 type veth peer name v1 && ip link add name b0 type bridge && ip link set v0 master b0'
    try "vxlan" "modprobe vxlan: $modules" \
        "${in_ns[@]}" 'ip link add name x0 type vxlan id 1 dstport 8472 nolearning local 192.0.2.1 && ip link set x0 up'
    try "next-hop objects" "a kernel from 5.3 on is needed" \
        "${in_ns[@]}" 'ip link set lo up && ip nexthop add id 7 dev lo'
    try "nftables with address translation" "modprobe nf_tables nft_masq nft_chain_nat: $modules" \
        "${in_ns[@]}" 'nft "table inet t { chain c { type nat hook postrouting priority 100; ip saddr 192.0.2.0/24 masquerade random,fully-random; }; }"'
    try "sysctls of a namespace" "/proc/sys must be writable: run the container privileged" \
        "${in_ns[@]}" 'echo 1 >/proc/sys/net/ipv4/ip_forward'
    try "named namespaces" "/run/netns must be mountable: CAP_SYS_ADMIN" \
        "${in_ns[@]}" 'mount -t tmpfs none /run && ip netns add t && ip netns exec t true'
    try "namespaces without root" "sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000" \
        unshare --user --map-root-user --net --mount ip link set lo up
    try "etcd" "see the section packages" etcd --version
    return $bad
}

check_scripts() {
    local script
    for script in "${SCRIPTS[@]}" deploy/*.sh deploy/etcd/*.sh deploy/debian/p* vagrant/*.sh; do
        if [ -e "$script" ]; then
            bash -n "$script"
        fi
    done
    if ! command -v shellcheck >/dev/null; then
        echo "shellcheck is not installed: checking the syntax only"
        return
    fi
    for script in "${SCRIPTS[@]}" deploy/*.sh deploy/etcd/*.sh deploy/debian/p* vagrant/*.sh; do
        if [ -e "$script" ]; then
            # Its notes on functions called through section() are wrong, so only warnings count.
            shellcheck --severity=warning "$script"
        fi
    done
}

# This machine's own network namespace as text, without values that depend on a clock or a counter.
host_state() {
    # The values of valid_lft and expires count down.
    local timers='s/(valid_lft|preferred_lft|expires) [^ ]+//g'
    {
        ip -d link | sed 's/^/link: /'
        ip -d address | sed 's/^/address: /'
        local family
        for family in -4 -6; do
            ip $family -d route show table all | sed "s/^/route $family: /"
            ip $family rule | sed "s/^/rule $family: /"
        done
        ip nexthop 2>/dev/null | sed 's/^/nexthop: /'
        nft -s list ruleset 2>/dev/null | sed 's/^/nft: /'
    } | sed -E "$timers"
    sysctl -a -r '^net\.' 2>/dev/null | grep -v -e nf_conntrack_count -e tcp_fastopen_key -e stable_secret |
        sed 's/^/sysctl: /' | sort
}

check_untouched() {
    host_state >"$work/after"
    # A new sysctl came with a kernel module; a missing or different one was changed.
    local known=$work/after.known
    awk 'NR == FNR { split($0, p, " = "); seen[p[1]] = 1; next }
        { split($0, p, " = "); if ($0 !~ /^sysctl: / || p[1] in seen) print }' "$work/before" "$work/after" >"$known"
    if diff -u --label before --label after "$work/before" "$known"; then
        echo "links, addresses, routes, rules, next hops, nftables and sysctls are unchanged ($(wc -l <"$work/before") lines)"
    else
        echo "this machine's own network namespace has changed: see the difference above" >&2
        return 1
    fi
}

main "$@"
