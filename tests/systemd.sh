#!/bin/bash
# Tests the packages on booted systems, through an operator's tasks.
# Two Debian hosts under systemd-nspawn and an etcd with TLS and passwords share one bridge.
#
#   sudo ./tests/systemd.sh            builds the packages (debug binaries) and runs everything
#   sudo ./tests/systemd.sh --release  the same with release packages
#   sudo ./tests/systemd.sh --packages DIR  with the packages of an earlier run, which contain both versions
#   sudo ./tests/systemd.sh --fresh    recreates the Debian tree, which is otherwise kept in /var/cache/overlay-tests
#
# MIRROR is the Debian mirror; the default is that of this machine's apt. CACHE is another directory for the tree.
#
# Everything runs in separate namespaces (network, mounts, processes, control groups): the script leaves no process behind and
# does not touch this machine's own network. The hosts' changes are in a directory that is removed at the end.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)

PACKAGES=(debootstrap systemd-container etcd-server etcd-client openssl iproute2 iputils-ping util-linux procps
    libprotobuf-dev protobuf-compiler dpkg-dev binutils gcc libc6-dev)
# The hosts' packages besides a minimal Debian.
TREE_PACKAGES=systemd,systemd-sysv,dbus,init-system-helpers,iproute2,iputils-ping,procps,nftables,ca-certificates,etcd-server,etcd-client
SUITE=bookworm
MIRROR=${MIRROR:-}
CACHE=${CACHE:-/var/cache/overlay-tests}

cgroups=()

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }

prepare() {
    profile=dev fresh=no
    packages=
    while [ $# -gt 0 ]; do
        case $1 in
        --release) profile=release ;;
        --fresh) fresh=yes ;;
        --packages) packages=${2:?a directory} && shift ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    if [ "$(id -u)" -ne 0 ]; then
        echo "tests/systemd.sh: root is needed to install packages and to boot systems: run  sudo $0" >&2
        exit 2
    fi
    [ -x "$HOME/.cargo/bin/cargo" ] && PATH=$HOME/.cargo/bin:$PATH
    install_packages
    make_tree
    work=$(mktemp -d "${TMPDIR:-/tmp}/overlay-systemd.XXXXXX")
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$top/Cargo.toml" | head -1)
    if [ -n "$packages" ]; then
        cp -r "$packages" "$work/packages"
    else
        build
    fi
    boot_all
}

build() {
    echo "== packages ($profile)"
    cd "$top"
    PROFILE=$profile OUT=$work/packages nice ./deploy/package.sh >"$work/package.log" 2>&1 || { tail -20 "$work/package.log" && exit 1; }
    PROFILE=$profile OUT=$work/packages VERSION=$version+next nice "$top/deploy/package.sh" >>"$work/package.log" 2>&1
    (cd "$work/packages" && cp "overlayd-$version-$(dpkg --print-architecture).sha256" first)
    PROFILE=$profile OUT=$work/packages nice "$top/deploy/package.sh" >>"$work/package.log" 2>&1
    (cd "$work/packages" && sha256sum --check --quiet first) || { echo "FAILED: two builds of the packages differ" >&2 && exit 1; }
    ls -sh "$work/packages"
}

boot_all() {
    # The end of a PID namespace's first process ends all its processes, and with them the mounts and networks that only they
    # held.
    local code=0
    cgroups_make
    WORK=$work VERSION=$version unshare --net --mount --pid --fork --kill-child --mount-proc "$0" --inside || code=$?
    cgroups_remove
    if [ $code -eq 0 ]; then
        rm -rf "$work"
        echo "all $(cat "$CACHE/last-count") steps passed after $SECONDS s"
    else
        echo "FAILED; logs and packages are in $work" >&2
    fi
    exit $code
}

# Control groups of our own, in which systemd-nspawn creates those of the hosts.
cgroups_make() {
    local line path mount
    while IFS= read -r line; do
        path=${line#*:*:}
        case $line in
        0::*) mount=$(findmnt -n -l -t cgroup2 -o TARGET | head -1) ;;
        *:name=systemd:*) mount=$(findmnt -n -l -t cgroup -O name=systemd -o TARGET | head -1) ;;
        *) continue ;;
        esac
        [ -n "$mount" ] || continue
        mkdir "$mount${path%/}/overlay-systemd.$$"
        cgroups+=("$mount${path%/}/overlay-systemd.$$")
    done </proc/self/cgroup
    for path in "${cgroups[@]}"; do echo $$ >"$path/cgroup.procs"; done
}

cgroups_remove() {
    local path
    for path in "${cgroups[@]}"; do
        echo $$ >"${path%/*}/cgroup.procs"
        # A process that ended a moment ago may still be counted.
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            find "$path" -depth -type d -exec rmdir {} + 2>/dev/null && break
            sleep 0.5
        done
    done
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
    local missing=() package policy=/usr/sbin/policy-rc.d
    for package in "${PACKAGES[@]}"; do installed "$package" || missing+=("$package"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "== installing ${missing[*]}"
    # No installed service may start on this machine.
    if [ -e $policy ]; then mv $policy $policy.overlay-saved; fi
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    local code=0
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -q update && apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "${missing[@]}"; } >/dev/null || code=$?
    rm -f $policy
    if [ -e $policy.overlay-saved ]; then mv $policy.overlay-saved $policy; fi
    [ $code -eq 0 ] || { echo "cannot install ${missing[*]}" >&2 && exit 1; }
}

# The mirror of this machine's apt; a mirror has every suite.
mirror() {
    local found update
    for update in "" "apt-get -q update"; do
        $update >/dev/null
        # Read to the end, or apt-get would report a closed pipe.
        found=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Component: main' | sed -n '1s|/$||p')
        case $found in http*) echo "$found" && return ;; esac
    done
    echo "tests/systemd.sh: this machine's apt has no Debian mirror: set one with MIRROR=http://HOST/debian $0" >&2
    return 1
}

make_tree() {
    tree=$CACHE/$SUITE-$(echo "$TREE_PACKAGES" | sha256sum | cut -c1-12)
    if [ $fresh = yes ]; then rm -rf "$tree"; fi
    export TREE=$tree
    [ ! -d "$tree" ] || return 0
    if [ -z "$MIRROR" ]; then MIRROR=$(mirror); fi
    echo "== Debian tree ($SUITE, from $MIRROR) into $tree"
    mkdir -p "$CACHE"
    rm -rf "$tree.new"
    if ! debootstrap --variant=minbase --include="$TREE_PACKAGES" $SUITE "$tree.new" "$MIRROR" >"$CACHE/debootstrap.log" 2>&1; then
        tail -5 "$CACHE/debootstrap.log" >&2
        exit 1
    fi
    rm -f "$tree.new"/var/cache/apt/archives/*.deb "$tree.new/etc/machine-id"
    mv "$tree.new" "$tree"
}

# ---- the functions below run inside the namespaces ----

steps=0
leaders=()
host_pid=()

# step NAME: begins a step; later failures are reported under its name.
step() {
    steps=$((steps + 1)) current=$1
    printf '%3d s  %s\n' "$SECONDS" "$current"
}

fail() {
    echo "FAILED in step '$current': $*" >&2
    for n in 1 2; do
        [ -n "${host_pid[$n]:-}" ] || continue
        echo "--- h$n" >&2
        on $n systemctl --no-pager --full status overlayd.service overlayd.socket >&2 || true
        on $n journalctl --no-pager -n 40 -u overlayd >&2 || true
        on $n systemctl --no-pager list-jobs >&2 || true
    done
    exit 1
}

# on N COMMAND: runs it on a host.
on() {
    local n=$1
    shift
    nsenter --target "${host_pid[$n]}" --mount --uts --ipc --net --pid --cgroup --root --wd -- env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"
}

# eventually SECONDS WHAT COMMAND: retries it until it succeeds.
eventually() {
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >"$WORK/out" 2>&1; do
        if [ $SECONDS -ge $limit ]; then
            fail "not in time: $what; last output: $(tail -3 "$WORK/out")"
        fi
        sleep 0.1
    done
}

want() { # TEXT COMMAND: its output must contain the text
    local text=$1
    shift
    "$@" >"$WORK/out" 2>&1 || fail "$* failed: $(tail -5 "$WORK/out")"
    grep -qF -- "$text" "$WORK/out" || fail "\`$*\` does not print '$text' but: $(tail -5 "$WORK/out")"
}

property() { # N PROPERTY
    on "$1" systemctl show -P "$2" overlayd.service
}

boot() {
    local n=$1 root=$WORK/h$1/root
    mkdir -p "$WORK/h$n/upper" "$WORK/h$n/work" "$root"
    mount -t overlay overlay -o "lowerdir=$TREE,upperdir=$WORK/h$n/upper,workdir=$WORK/h$n/work" "$root"
    echo "h$n" >"$root/etc/hostname"
    rm -f "$root/etc/resolv.conf"
    # As written by Debian's installer.
    printf '127.0.0.1\tlocalhost\n::1\tlocalhost\n' >"$root/etc/hosts"
    # etcd's unit requires network-online.target, but nothing manages the interface here.
    ln -s /dev/null "$root/etc/systemd/system/systemd-networkd-wait-online.service"
    ip netns add "h$n"
    ip link add "h$n" type veth peer name eth0 netns "h$n"
    ip link set "h$n" master sw up
    ip -n "h$n" address add "192.0.2.$n/24" dev eth0
    ip -n "h$n" link set eth0 up
    ip -n "h$n" link set lo up
    ip -n "h$n" route add default via 192.0.2.254
    mkdir -p "$root/root/packages"
    cp "$WORK"/packages/*.deb "$WORK"/packages/*.tar.gz "$root/root/packages/"
    systemd-nspawn --quiet --register=no --keep-unit --boot --directory="$root" --machine="h$n" --console=pipe \
        --network-namespace-path="/run/netns/h$n" --capability=CAP_NET_ADMIN </dev/null >"$WORK/h$n/console" 2>&1 &
    leaders[n]=$!
}

booted() {
    local n=$1 child
    child=$(pgrep -P "${leaders[$n]}" | head -1) || return 1
    [ -n "$child" ] || return 1
    host_pid[n]=$child
    case $(on "$n" systemctl is-system-running) in running | degraded) ;; *) return 1 ;; esac
}

# Traffic from a container of h1 to one of h2 during an action.
flow_start() {
    on 1 ip netns exec c1 ping -n -i 0.02 "$remote" >"$WORK/flow" 2>&1 &
    flow=$!
    eventually 20 "traffic flows" grep -q "icmp_seq=10 " "$WORK/flow"
}

flow_end() {
    # Some more packets, so that late losses are noticed.
    local seen
    seen=$(wc -l <"$WORK/flow")
    eventually 20 "traffic continues" awk -v seen=$((seen + 25)) 'END { exit NR < seen }' "$WORK/flow"
    local ping
    ping=$(pgrep -f "^ping -n -i 0.02 $remote" | head -1)
    kill -INT "$ping"
    wait "$flow" || true
    grep -q " 0% packet loss" "$WORK/flow" || fail "$1: $(grep 'packets transmitted' "$WORK/flow")"
    printf '       %s\n' "$(grep 'packets transmitted' "$WORK/flow")"
}

etcd_up() {
    local pki=$WORK/pki
    "$top/deploy/etcd/certs.sh" "$pki" ca
    "$top/deploy/etcd/certs.sh" "$pki" member etcd-1 192.0.2.254
    "$top/deploy/etcd/certs.sh" "$pki" client overlay-agent
    DATA=$WORK/etcd "$top/deploy/etcd/member.sh" etcd-1 "$pki" etcd-1=192.0.2.254 >"$WORK/etcd.env"
    mkdir -m 700 "$WORK/etcd"
    (
        set -a
        # shellcheck disable=SC1091
        . "$WORK/etcd.env"
        exec etcd >"$WORK/etcd.log" 2>&1
    ) &
    export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=https://192.0.2.254:2379 ETCDCTL_CACERT=$pki/ca.crt \
        ETCDCTL_CERT=$pki/overlay-agent.crt ETCDCTL_KEY=$pki/overlay-agent.key
    eventually 30 "etcd answers" etcdctl endpoint health
    etcdctl put /coreos.com/network/config '{"Network":"10.244.0.0/16"}' >/dev/null
    "$top/deploy/etcd/access.sh" "$WORK/passwords"
}

keys() {
    ETCDCTL_USER="root:$(cat "$WORK/passwords/root")" etcdctl get --prefix --keys-only /coreos.com/network/subnets/
}

configure() {
    local n=$1 root=$WORK/h$1/root
    cp "$WORK/pki/ca.crt" "$WORK/pki/overlay-agent.crt" "$WORK/pki/overlay-agent.key" "$root/etc/overlayd/credentials/"
    cp "$WORK/passwords/overlay-agent" "$root/etc/overlayd/credentials/password"
    chmod 600 "$root"/etc/overlayd/credentials/*
    cat >"$root/etc/overlayd/overlayd.toml" <<TOML
etcd-endpoints = ["https://192.0.2.254:2379"]
etcd-cafile = "ca.crt"
etcd-certfile = "overlay-agent.crt"
etcd-keyfile = "overlay-agent.key"
etcd-username = "overlay-agent"
etcd-password-file = "password"
metrics-listen = "192.0.2.$n:9780"
mesh-interval = "1s"
TOML
}

attach() { # N NAME
    on "$1" overlayctl attach "$2" -o json | sed -n 's/.*"v4": "\([0-9.]*\)".*/\1/p' | head -1
}

inside() {
    set -E
    trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
    trap 'kill "${leaders[@]}" 2>/dev/null || true' EXIT
    mount --make-rprivate /
    mkdir -p /run/netns
    mount -t tmpfs tmpfs /run/netns
    ip link set lo up
    ip link add sw type bridge
    ip address add 192.0.2.254/24 dev sw
    ip link set sw up

    step "etcd with TLS, roles and passwords"
    etcd_up >"$WORK/etcd-setup.log" 2>&1

    step "boot of two hosts"
    boot 1
    boot 2
    eventually 120 "h1 has booted" booted 1
    eventually 120 "h2 has booted" booted 2

    first_cluster
    install
    first_start
    rights
    containers
    health
    mesh
    reloading
    killed
    watchdog
    upgrade
    refused
    removal
    tarball
    etcd_unit
    echo "$steps" >"$CACHE/last-count"
}

# documented PAGE SECTION WHICH HOST...: runs the section's blocks that name this script, all or the one of that number, unchanged
# from the page, with the packages built here; CHANGED holds other replacements for sed.
documented() {
    local page=$1 section=$2 which=$3 n
    shift 3
    awk -v section="$section" -v which="$which" '
        /^##/ { here = $0 == "## " section || $0 == "### " section }
        here && $0 == "<!-- as in tests/systemd.sh -->" { marked = 1; next }
        inside && $0 == "```" { inside = marked = 0; next }
        inside && (which == "all" || which == number) { print }
        marked && !inside && $0 == "```sh" { inside = 1; number++ }' "$top/$page" |
        sed -e "s/overlayd_0\.1\.0_amd64\.deb/overlayd_$VERSION${NEXT:-}_$(dpkg --print-architecture).deb/" -e "${CHANGED:-}" >"$WORK/commands"
    [ -s "$WORK/commands" ] || fail "$page has no commands: $section, $which"
    for n in "$@"; do
        on "$n" bash -euo pipefail -c "cd /root/packages; sudo() { \"\$@\"; }; $(cat "$WORK/commands")" >"$WORK/out" 2>&1 </dev/null ||
            fail "$page, $section, on h$n: $(tail -5 "$WORK/out")"
    done
}

first_cluster() {
    local page=docs/first-cluster.md n
    step "the first-cluster page: etcd, two agents, a network, two containers, removal"
    documented docs/first-cluster.md "etcd" all 1
    grep -q "is healthy" "$WORK/out" || fail "$page: etcd is not healthy"
    documented docs/first-cluster.md "The agents" all 1 2
    documented docs/first-cluster.md "The network" 1 1
    grep -q "ready" "$WORK/out" || fail "$page: not ready"
    eventually 60 "the other host has its subnet" on 2 overlayctl status --wait 5s --brief
    documented docs/first-cluster.md "The network" 2 1
    grep -q "192.0.2.2" "$WORK/out" || fail "$page: host-2 is not listed: $(cat "$WORK/out")"
    documented docs/first-cluster.md "The first containers" 1 1 2
    remote=$(on 2 ip -n first -4 -o address show dev eth0 | awk '{ sub("/.*", "", $4); print $4 }')
    CHANGED="s/10.244.27.2/$remote/" documented docs/first-cluster.md "The first containers" 2 1
    grep -q " 0% packet loss" "$WORK/out" || fail "$page: no replies"
    for n in 1 2; do
        on $n ip netns delete first
        on $n dpkg -P overlayd >"$WORK/h$n/dpkg" 2>&1 || fail "$(tail -5 "$WORK/h$n/dpkg")"
        on $n dpkg -P etcd-server etcd-client >"$WORK/h$n/dpkg" 2>&1 || fail "$(tail -5 "$WORK/h$n/dpkg")"
    done
}

install() {
    step "install: user, directories, units; the agent waits in the background and changes nothing"
    for n in 1 2; do
        on $n dpkg -i "/root/packages/overlayd_${VERSION}_$(dpkg --print-architecture).deb" >"$WORK/h$n/dpkg" 2>&1 || fail "$(tail -5 "$WORK/h$n/dpkg")"
        want overlayd on $n getent passwd overlayd
        want "enabled" on $n systemctl is-enabled overlayd.service overlayd.socket
        want "700 root root" on $n stat -c "%a %U %G" /etc/overlayd/credentials
        eventually 20 "the agent starts" on $n sh -c '[ "$(systemctl show -P ActiveState overlayd.service)" = activating ]'
        eventually 20 "the status says that it is not ready" on $n sh -c 'systemctl show -P StatusText overlayd.service | grep -q "Not ready"'
        # Clients get answers although the agent is not ready.
        eventually 20 "clients get answers" on $n sh -c 'overlayctl status --brief; [ $? -eq 3 ]'
        [ -z "$(on $n ip link show group 22102)" ] || fail "devices exist before a lease"
    done
    want "overlayctl" on 1 ls /usr/share/bash-completion/completions
    want '"cniVersion"' on 1 sh -c 'CNI_COMMAND=VERSION /usr/lib/cni/overlay-cni </dev/null'
    on 1 sh -c 'dpkg -V overlayd' >"$WORK/out" 2>&1 || fail "files are not as packaged: $(cat "$WORK/out")"
    packaged monitoring /usr/share/overlayd/monitoring
    on 1 systemd-analyze verify --man=no /lib/systemd/system/overlayd.service /lib/systemd/system/overlayd.socket \
        /lib/systemd/system/overlayd-netns.socket /lib/systemd/system/overlayd-netns@.service >"$WORK/out" 2>&1 || fail "$(cat "$WORK/out")"
}

# packaged PART DIRECTORY: checks that the files of deploy/PART are installed unchanged.
packaged() {
    diff -r "$top/deploy/$1" "$WORK/h1/root$2" >"$WORK/out" 2>&1 || fail "$2: $(head -5 "$WORK/out")"
}

first_start() {
    step "configure, start: systemctl returns when the agent is ready"
    for n in 1 2; do
        configure $n
        on $n systemctl restart overlayd || fail "start on h$n"
        want "active" on $n systemctl is-active overlayd.service
        want "Ready: 10.244." property $n StatusText
        want "socket" on $n stat -c %F /run/overlayd/overlayd.sock
        want "660 overlayd overlayd" on $n stat -c "%a %U %G" /run/overlayd/overlayd.sock
        want "\"ready\": true" on $n overlayctl status -o json
    done
    [ "$(keys | grep -c subnets)" -eq 2 ] || fail "leases in etcd: $(keys)"
    # The same commands from the page, on configured hosts.
    documented docs/install.md "First start" all 1 2
    for page in man5/overlayd.toml.5 man8/overlayd.8 man8/overlay-cni.8 man1/overlayctl.1 man1/overlayctl-trace.1; do
        on 1 test -e "/usr/share/man/$page.gz" || fail "missing manual page $page"
    done
}

rights() {
    step "the agent has exactly the capabilities it needs"
    local pid status
    pid=$(property 1 MainPID)
    status=$(on 1 cat "/proc/$pid/status")
    # CAP_NET_ADMIN (bit 12), CAP_NET_RAW (bit 13) and CAP_SYS_ADMIN (bit 21).
    for set in CapEff CapPrm CapBnd CapAmb; do
        grep -q "^$set:.*0000000000203000$" <<<"$status" || fail "$set: $(grep $set <<<"$status")"
    done
    grep -q "^NoNewPrivs:.*1" <<<"$status" || fail "NoNewPrivs"
    want overlayd on 1 ps -o user= -p "$pid"
    want "inet overlayd" on 1 nft list tables
    want "= 1" on 1 sysctl net.ipv4.ip_forward
    on 1 sh -c '! su -s /bin/sh nobody -c "overlayctl status"' >"$WORK/out" 2>&1 || fail "user nobody can use the socket"
    grep -q "group" "$WORK/out" || fail "the error names no remedy: $(cat "$WORK/out")"
    local exposure
    exposure=$(on 1 systemd-analyze security --no-pager overlayd.service | sed -n 's/.*exposure level for overlayd.service: \([0-9.]*\).*/\1/p')
    printf '       exposure %s\n' "$exposure"
    awk -v e="$exposure" 'BEGIN { exit !(e != "" && e <= 2.0) }' || fail "exposure $exposure is above 2.0"
    # Each remaining exposure is documented with its reason.
    local open
    while IFS= read -r open; do
        # A bar inside a table cell is escaped.
        grep -qF "| \`${open//|/\\|}\` |" "$top/docs/install.md" || fail "docs/install.md gives no reason for $open"
    done < <(on 1 systemd-analyze security --json=short --no-pager overlayd.service | tr '{' '\n' | grep -v '"exposure":null' | sed -n 's/.*"name":"\([^"]*\)".*/\1/p')
    # Each field of an event is a journal field.
    want "OVERLAYD_SUBNET=10.244." on 1 journalctl -u overlayd -o export --no-pager
    want "PRIORITY=6" on 1 journalctl -u overlayd -o export --no-pager SYSLOG_IDENTIFIER=overlayd
}

containers() {
    step "containers reach each other across hosts; later namespaces are visible to the agent"
    attach 1 c1 >/dev/null
    remote=$(attach 2 c2)
    [ -n "$remote" ] || fail "no address: $(on 2 overlayctl endpoints)"
    eventually 30 "containers reach each other" on 1 ip netns exec c1 ping -n -c 3 -i 0.1 -W 1 "$remote"
    on 1 overlayctl attach gone >/dev/null
    on 1 overlayctl detach gone >/dev/null
    on 1 sh -c '[ ! -e /run/netns/gone ]' || fail "the namespace is left behind"
    # The agent has its own mount namespace; it must not keep deleted namespaces alive.
    on 1 ip netns add held
    on 1 ip link add held0 type veth peer name held1 netns held
    on 1 systemctl restart overlayd
    on 1 ip netns delete held
    eventually 20 "a deleted namespace disappears" on 1 sh -c '! ip link show held0'
    process_namespace
    for unit in docker containerd; do
        on 1 sh -c "printf '[Service]\nExecStart=/bin/true\n' >/etc/systemd/system/$unit.service; systemctl daemon-reload"
        want overlayd.service on 1 systemctl show -P After $unit.service
        on 1 rm /etc/systemd/system/$unit.service
    done
}

# page N PATH: a host's agent's answer over TCP, requested from the other host.
page() {
    on $((3 - $1)) bash -c "exec 3<>/dev/tcp/192.0.2.$1/9780; printf 'GET $2 HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n' >&3; cat <&3"
}

health() {
    step "metrics and health over TCP, from another host"
    for n in 1 2; do
        want "200 OK" page $n /healthz
        want "200 OK" page $n /readyz
        want 'overlayd_ready{network="default"} 1' page $n /metrics
        want 'overlayd_endpoints{network="default"} 1' page $n /metrics
        want "404" page $n /v1/status
    done
}

mesh() {
    step "the agent's own user may probe its peers"
    for n in 1 2; do
        eventually 60 "h$n reaches h$((3 - n))" reaches $n ok
    done
    # The other host blocks the tunnel's port.
    on 2 nft 'add table inet shut; add chain inet shut i { type filter hook input priority -400; }; add rule inet shut i udp dport 8472 drop'
    eventually 60 "the tunnel's fault is distinguished from the underlay's" reaches 1 overlay-down
    on 2 nft delete table inet shut
    eventually 60 "the tunnel is healthy again" reaches 1 ok lossy
}

reaches() { # N STATE...: its only peer has one of these states
    local state
    state=$(on "$1" overlayctl mesh -o json | sed -n 's/.*"state": "\([a-z-]*\)".*/\1/p' | sort -u)
    shift
    case " $* " in *" $state "*) ;; *) echo "'$state'" && return 1 ;; esac
}

# A namespace given by a process needs another capability, which a drop-in grants.
process_namespace() {
    local pid drop=/etc/systemd/system/overlayd.service.d
    # It ends by a signal, which is not a failure.
    on 1 unshare --net sleep 1000 || true &
    eventually 20 "a process in its own namespace" on 1 pgrep -x sleep
    pid=$(on 1 pgrep -x sleep)
    if on 1 overlayctl attach byproc --netns "/proc/$pid/ns/net" >"$WORK/out" 2>&1; then fail "the attach needs no additional capability"; fi
    grep -q "proc-netns.conf" "$WORK/out" || fail "the error names no remedy: $(cat "$WORK/out")"
    on 1 sh -c "mkdir -p $drop; cp /usr/share/doc/overlayd/proc-netns.conf $drop; systemctl daemon-reload; systemctl restart overlayd"
    want "10.244." on 1 overlayctl attach byproc --netns "/proc/$pid/ns/net"
    want "10.244." on 1 nsenter --net="/proc/$pid/ns/net" ip -4 address show dev eth0
    on 1 overlayctl detach byproc
    on 1 sh -c "kill $pid; rm -r $drop; systemctl daemon-reload; systemctl restart overlayd"
    wait $! || true
}

reloading() {
    step "reload: the log level changes, settings that need a restart are named, an error is rejected"
    local file=$WORK/h1/root/etc/overlayd/overlayd.toml pid
    pid=$(property 1 MainPID)
    cp "$file" "$WORK/toml"
    printf 'log-level = "debug"\nresync-interval = "1m"\n' >>"$file"
    on 1 systemctl reload overlayd
    eventually 20 "the setting that needs a restart is named" on 1 sh -c 'journalctl -u overlayd --no-pager -o cat | grep "next start" | grep -q resync-interval'
    on 1 overlayctl attach debug >/dev/null
    on 1 overlayctl detach debug >/dev/null
    eventually 20 "debug events" on 1 sh -c 'journalctl -u overlayd --no-pager -o cat PRIORITY=7 | grep -q .'
    echo 'log-lvl = "info"' >>"$file"
    on 1 systemctl reload overlayd
    eventually 20 "the error is reported" on 1 sh -c 'journalctl -u overlayd --no-pager -o cat | grep -q "did you mean"'
    cp "$WORK/toml" "$file"
    on 1 systemctl reload overlayd
    eventually 20 "active again" on 1 sh -c '[ "$(systemctl show -P ActiveState overlayd.service)" = active ]'
    [ "$(property 1 MainPID)" = "$pid" ] || fail "the process has changed after the reloads"
}

# restarted N OLD: a new process is ready.
restarted() {
    [ "$(property "$1" MainPID)" != "$2" ] && [ "$(property "$1" MainPID)" != 0 ] && [ "$(property "$1" ActiveState)" = active ]
}

killed() {
    step "kill -9: systemd restarts the agent, a client waits, no packet is lost"
    local pid
    pid=$(property 1 MainPID)
    flow_start
    for _ in 1 2 3; do
        pid=$(property 1 MainPID)
        on 1 kill -9 "$pid"
        # Immediately: no process accepts yet, but the socket exists.
        want "c1" on 1 overlayctl endpoints
        eventually 30 "the agent is back" restarted 1 "$pid"
    done
    flow_end "kill -9"
}

watchdog() {
    step "the watchdog restarts a hanging agent"
    on 1 sh -c 'mkdir -p /run/systemd/system/overlayd.service.d; printf "[Service]\nWatchdogSec=4s\n" >/run/systemd/system/overlayd.service.d/t.conf; systemctl daemon-reload; systemctl restart overlayd'
    local pid
    pid=$(property 1 MainPID)
    flow_start
    # With regular notifications it runs longer than the watchdog's timeout.
    local until=$((SECONDS + 10))
    eventually 20 "ten seconds" eval "[ \$SECONDS -ge $until ]"
    [ "$(property 1 MainPID)" = "$pid" ] || fail "the watchdog ended a healthy agent"
    on 1 kill -STOP "$pid"
    eventually 60 "systemd restarts it" restarted 1 "$pid"
    flow_end "watchdog"
    want "Watchdog timeout" on 1 journalctl --no-pager -u overlayd
    on 1 sh -c 'rm -r /run/systemd/system/overlayd.service.d; systemctl daemon-reload; systemctl restart overlayd'
}

upgrade() {
    step "upgrade in place: no packet is lost, containers and configuration stay"
    local pid
    pid=$(property 1 MainPID)
    flow_start
    NEXT=+next documented docs/operations.md "Upgrade" all 1 2
    eventually 30 "the new agent is ready" restarted 1 "$pid"
    flow_end "upgrade"
    want "+next" on 1 dpkg-query -W overlayd
    want "c1" on 1 overlayctl endpoints
    want "192.0.2.254" on 1 cat /etc/overlayd/overlayd.toml
    on 1 systemctl stop overlayd.socket overlayd.service
    on 1 dpkg -i "/root/packages/overlayd_${VERSION}+next_$(dpkg --print-architecture).deb" >/dev/null 2>&1
    want "inactive" on 1 sh -c 'systemctl is-active overlayd.service || true'
    on 1 systemctl start overlayd
}

refused() {
    step "an invalid configuration is rejected by name, and traffic continues"
    flow_start
    echo 'run-dri = "/run/x"' >>"$WORK/h1/root/etc/overlayd/overlayd.toml"
    on 1 systemctl restart overlayd >/dev/null 2>&1 && fail "the agent started"
    want "did you mean \`run-dir\`" on 1 journalctl --no-pager -n 20 -u overlayd
    # A file that the agent's user cannot read, and a credential that systemd has not loaded.
    sed 's/"ca.crt"/"ca.pem"/; s/"overlay-agent.key"/"\/root\/overlay-agent.key"/' "$WORK/toml" >"$WORK/h1/root/etc/overlayd/overlayd.toml"
    on 1 systemctl restart overlayd >/dev/null 2>&1 && fail "the agent started"
    want "systemd has loaded no ca.pem from /etc/overlayd/credentials" on 1 journalctl --no-pager -n 20 -u overlayd
    want "give its bare name, \`overlay-agent.key\`" on 1 journalctl --no-pager -n 20 -u overlayd
    on 1 chmod 600 /etc/overlayd/overlayd.toml
    on 1 systemctl restart overlayd >/dev/null 2>&1 && fail "the agent started"
    want "chmod 644 /etc/overlayd/overlayd.toml" on 1 journalctl --no-pager -n 20 -u overlayd
    on 1 chmod 644 /etc/overlayd/overlayd.toml
    cp "$WORK/toml" "$WORK/h1/root/etc/overlayd/overlayd.toml"
    eventually 30 "systemd retries the start" on 1 systemctl is-active overlayd.service
    flow_end "invalid configuration"
}

removal() {
    step "remove: the agent is gone; configuration, state and traffic stay"
    flow_start
    on 2 dpkg -r overlayd >"$WORK/h2/dpkg" 2>&1 || fail "$(tail -5 "$WORK/h2/dpkg")"
    want "still talk" cat "$WORK/h2/dpkg"
    on 2 sh -c '! pgrep -x overlayd' || fail "the agent is running"
    on 2 test -e /etc/overlayd/overlayd.toml -a -e /var/lib/overlayd/node-id || fail "configuration or state is gone"
    on 2 sh -c '! command -v overlayd' || fail "the program still exists"
    flow_end "remove"

    step "install again: the agent adopts the existing state"
    flow_start
    on 2 dpkg -i "/root/packages/overlayd_${VERSION}+next_$(dpkg --print-architecture).deb" >"$WORK/h2/dpkg" 2>&1 || fail "$(tail -5 "$WORK/h2/dpkg")"
    eventually 30 "the agent is ready" restarted 2 0
    want "c2" on 2 overlayctl endpoints
    flow_end "install again"

    step "purge: the overlay is removed from the host, and its lease is deleted"
    on 2 dpkg -P overlayd >"$WORK/h2/dpkg" 2>&1 || fail "$(tail -5 "$WORK/h2/dpkg")"
    [ -z "$(on 2 ip link show group 22102)" ] || fail "devices are left"
    [ -z "$(on 2 ip route show proto 86)" ] || fail "routes are left"
    on 2 sh -c '! nft list tables | grep -q overlayd' || fail "rules are left"
    on 2 sh -c '[ ! -e /etc/overlayd ] && [ ! -e /var/lib/overlayd ] && [ ! -e /run/overlayd ]' || fail "files are left"
    [ "$(keys | grep -c subnets)" -eq 1 ] || fail "the lease is not deleted: $(keys); $(cat "$WORK/h2/dpkg")"
    eventually 20 "the other host has no peer left" on 1 sh -c '[ -z "$(ip route show proto 86)" ]'
}

tarball() {
    step "tarball: install.sh below /usr/local, start, traffic, uninstall"
    on 2 tar -xzf "/root/packages/overlayd-${VERSION}-linux-$(dpkg --print-architecture).tar.gz" -C /root
    on 2 "/root/overlayd-$VERSION/install.sh" >"$WORK/out" 2>&1 || fail "$(tail -5 "$WORK/out")"
    want "/usr/local/sbin/overlayd" on 2 grep ExecStart /etc/systemd/system/overlayd.service
    configure 2
    on 2 systemctl enable --now overlayd.socket overlayd.service >/dev/null 2>&1 || fail "the agent does not start"
    on 2 ip netns delete c2 2>/dev/null || true
    remote=$(attach 2 c2)
    eventually 30 "containers reach each other" on 1 ip netns exec c1 ping -n -c 3 -i 0.1 -W 1 "$remote"
    documented docs/install.md "Upgrade, remove, purge" all 2
    on 2 "/root/overlayd-$VERSION/install.sh" --uninstall >"$WORK/out" 2>&1 || fail "$(tail -5 "$WORK/out")"
    on 2 sh -c '[ -z "$(find /usr/local /etc/systemd/system -name "*overlay*" -type f)" ]' || fail "files are left"
}

etcd_unit() {
    step "etcd's unit runs a member, hardened"
    local root=$WORK/h2/root pki=$WORK/pki
    "$top/deploy/etcd/certs.sh" "$pki" member h2 192.0.2.2 >/dev/null
    cp "$(command -v etcd)" "$root/usr/bin/etcd"
    on 2 getent passwd etcd >/dev/null || on 2 useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin etcd
    on 2 install -d -o etcd -m 0700 /etc/overlay-etcd/pki
    cp "$pki/ca.crt" "$pki/h2.crt" "$pki/h2.key" "$root/etc/overlay-etcd/pki/"
    on 2 chown -R etcd: /etc/overlay-etcd/pki
    "$top/deploy/etcd/member.sh" h2 /etc/overlay-etcd/pki h2=192.0.2.2 >"$root/etc/overlay-etcd/etcd.env"
    cp "$top/deploy/etcd/overlay-etcd.service" "$root/etc/systemd/system/"
    on 2 systemctl daemon-reload
    on 2 systemctl start overlay-etcd || fail "$(on 2 journalctl --no-pager -n 20 -u overlay-etcd)"
    ETCDCTL_ENDPOINTS=https://192.0.2.2:2379 want "is healthy" etcdctl endpoint health
    on 2 systemctl stop overlay-etcd
}

if [ "${1:-}" = --inside ]; then
    inside
else
    prepare "$@"
fi
