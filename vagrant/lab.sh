#!/bin/bash
# A lab of virtual machines: Debian machines with overlayd, created by Vagrant.
#
#   ./vagrant/lab.sh up        builds this tree's package, creates the machines (vagrant up), waits until all agents are ready
#   ./vagrant/lab.sh check     tests calls between containers, a published port, the CNI plugin and the subnets; runs overlayctl check
#   ./vagrant/lab.sh status    shows the subnets on the first machine, and each agent's state
#   ./vagrant/lab.sh ssh nodeN [COMMAND...]
#   ./vagrant/lab.sh down      removes the machines and the lab's files
#   ./vagrant/lab.sh all       up, check, down; down also after a failure
#   ./vagrant/lab.sh prepare   only creates the input of `vagrant up`: package, certificates, settings
#   ./vagrant/lab.sh package   only builds the package, the one step that may need the internet
#
# Variables: NODES (2, with a cluster 3), ETCD (single, cluster), VAGRANT_DEFAULT_PROVIDER (libvirt, virtualbox); PROFILE=dev builds a debug
# package, which is faster; more are in Vagrantfile. Boxes: make-box.sh. Without a running libvirt: libvirt.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
files=$top/target/vagrant/lab
# Time limit of a step in seconds, long enough for machines without KVM.
STEP_TIMEOUT=${STEP_TIMEOUT:-900}

# Vagrant uses this directory's Vagrantfile, independent of the working directory.
export VAGRANT_CWD=$here

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }

say() { printf '\n== %s\n' "$*"; }

die() {
    echo "lab.sh: $*" >&2
    exit 1
}

# The command that runs at every exit.
finally=:

tidy() {
    local code=$?
    trap - EXIT
    $finally || true
    exit $code
}

main() {
    trap tidy EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    case ${1:-} in
    prepare) prepare ;;
    package) package ;;
    up) up ;;
    check)
        load
        check
        ;;
    status)
        load
        status
        ;;
    ssh)
        [ $# -ge 2 ] || { usage >&2 && echo "lab.sh: ssh to which machine?" >&2 && exit 2; }
        load
        shift
        on "$@"
        ;;
    down) down ;;
    all)
        finally=down
        up
        load
        check
        ;;
    -h | --help) usage ;;
    *) usage >&2 && echo "lab.sh: no such command: ${1:-}" >&2 && exit 2 ;;
    esac
}

# Runs a command as the tree's owner under sudo, because cargo and the created files belong to that user.
as_owner() {
    local owner home
    owner=$(stat -c %U "$top")
    if [ "$(id -u)" -eq 0 ] && [ "${SUDO_USER:-root}" != root ] && [ "$owner" = "$SUDO_USER" ]; then
        home=$(getent passwd "$owner" | cut -d: -f6)
        runuser -u "$owner" -- env "HOME=$home" "PATH=$home/.cargo/bin:$PATH" "$@"
    else
        PATH=$HOME/.cargo/bin:$PATH "$@"
    fi
}

# ---- input of the machines

prepare() {
    settings
    local program deb
    for program in openssl tar; do
        command -v $program >/dev/null || die "$program is missing: run  sudo apt-get install $program"
    done
    package

    as_owner mkdir -p -m 700 "$files"
    write_settings
    local n
    for n in $(seq "$NODES"); do pack "$n" "$deb"; done
    if [ -n "${SUDO_USER:-}" ]; then chown -R --reference="$top" "$top/target/vagrant/lab"; fi
}

# Builds this tree's package, or uses the package DEB; sets `deb` to its path.
package() {
    say "the package"
    as_owner mkdir -p "$top/target/vagrant"
    deb=${DEB:-}
    if [ -z "$deb" ]; then
        as_owner env OUT="$top/target/vagrant/package" "$top/deploy/package.sh" >"$top/target/vagrant/package.log" 2>&1 ||
            { tail -20 "$top/target/vagrant/package.log" >&2 && die "cannot build the package; DEB=FILE uses an existing one"; }
        # shellcheck disable=SC2012 # names are ours
        deb=$(ls -t "$top"/target/vagrant/package/overlayd_*.deb | head -1)
    fi
    [ -r "$deb" ] || die "there is no package $deb"
    echo "$deb"
}

settings() {
    ETCD=${ETCD:-single}
    case $ETCD in
    single) NODES=${NODES:-2} ;;
    cluster) NODES=${NODES:-3} ;;
    *) die "ETCD is single or cluster, not '$ETCD'" ;;
    esac
    UNDERLAY=${UNDERLAY:-192.168.56}
    case $NODES in *[!0-9]* | '' | 0*) die "NODES is a number of machines, not '$NODES'" ;; esac
    [ "$NODES" -le 200 ] || die "NODES is at most 200, not $NODES"
    [[ $UNDERLAY =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || die "UNDERLAY is the first three bytes of an IPv4 network, as 192.168.56, not '$UNDERLAY'"
    if [ "$ETCD" = cluster ] && [ "$NODES" -lt 3 ]; then die "a cluster of etcd has three members: NODES is at least 3, not $NODES"; fi
    # An existing lab keeps its settings.
    if [ -e "$files/lab.env" ] && [ "$(lab_env)" != "$(cat "$files/lab.env")" ]; then
        die "there is a lab with other settings ($(tr '\n' ' ' <"$files/lab.env")): take it down first, $0 down"
    fi
}

lab_env() { printf 'NODES=%s\nETCD=%s\nUNDERLAY=%s\n' "$NODES" "$ETCD" "$UNDERLAY"; }

address() { echo "$UNDERLAY.$((10 + $1))"; }

# The endpoints of the etcd cluster.
cluster() { echo "https://$(address 1):2379,https://$(address 2):2379,https://$(address 3):2379"; }

write_settings() {
    lab_env >"$files/lab.env"
    [ "$ETCD" = cluster ] || return 0
    say "certificates and passwords"
    (
        umask 077
        local n user
        "$top/deploy/etcd/certs.sh" "$files/pki" ca
        for n in 1 2 3; do "$top/deploy/etcd/certs.sh" "$files/pki" member "node$n" "$(address $n)"; done
        "$top/deploy/etcd/certs.sh" "$files/pki" client overlay-agent
        mkdir -p "$files/passwords"
        for user in root overlay-admin overlay-agent overlay-reader; do
            [ -s "$files/passwords/$user" ] || openssl rand -hex 24 >"$files/passwords/$user"
        done
    )
}

# pack N PACKAGE: creates an archive with exactly the files that a machine needs.
pack() {
    local n=$1 name=node$1 stage members="" endpoints setup="" i
    stage=$(mktemp -d)
    case $ETCD in
    single)
        endpoints=http://$(address 1):2379
        if [ "$n" -eq 1 ]; then setup=yes; fi
        ;;
    cluster)
        endpoints=$(cluster)
        for i in 1 2 3; do members="$members${members:+ }node$i=$(address $i)"; done
        # Machines start in order, so the cluster answers when the third machine is up.
        if [ "$n" -eq 3 ]; then setup=yes; fi
        mkdir -m 700 "$stage/pki" "$stage/passwords"
        cp "$files/pki/ca.crt" "$files"/pki/overlay-agent.* "$stage/pki/"
        if [ "$n" -le 3 ]; then cp "$files/pki/$name.crt" "$files/pki/$name.key" "$stage/pki/"; fi
        cp "$files/passwords/overlay-agent" "$stage/passwords/"
        if [ -n "$setup" ]; then cp "$files"/passwords/* "$stage/passwords/"; fi
        ;;
    esac
    cat >"$stage/node.env" <<ENV
NAME=$name
ADDRESS4=$(address "$n")
ADDRESS6=fd00:56::$n
ETCD=$ETCD
MEMBERS="$members"
ENDPOINTS=$endpoints
SETUP=$setup
ENV
    cat >"$stage/network.json" <<'JSON'
{
  "Network": "10.244.0.0/16",
  "EnableIPv6": true,
  "IPv6Network": "fd00:10:244::/56",
  "Backend": {"Type": "vxlan", "VNI": 1, "Port": 8472}
}
JSON
    cp "$2" "$stage/overlayd.deb"
    cp -r "$top/deploy/etcd" "$stage/etcd"
    cp "$here/provision.sh" "$stage/"
    (umask 077 && tar -C "$stage" -cf "$files/$name.tar" .)
    rm -rf "$stage"
}

# ---- the machines

# Runs Vagrant, without progress bars if standard output is not a terminal.
call() {
    if [ -t 1 ]; then vagrant "$@"; else vagrant --no-tty "$@" | grep --line-buffered -v '^\s*$'; fi
}

up() {
    command -v vagrant >/dev/null || die "vagrant is missing: run  sudo apt-get install vagrant vagrant-libvirt"
    prepare
    say "vagrant up: $NODES machines, etcd $ETCD"
    export OVERLAY_LAB_PREPARED=1
    if [ -e "$files/begun" ]; then
        # Existing machines are provisioned again; with libvirt `up --provision` would do it twice.
        call up --no-provision
        call provision
    else
        : >"$files/begun"
        call up
    fi
    rm -f "$files/ssh_config"
    load
    say "agents"
    for_all wait_ready
}

load() {
    [ -e "$files/lab.env" ] || die "there is no lab: $0 up"
    # shellcheck disable=SC1091
    . "$files/lab.env"
    ssh_config=$files/ssh_config
    # Flags for commands that query etcd directly: the agent reports etcd's endpoints, but no secrets.
    as_agent=()
    if [ "$ETCD" = cluster ]; then
        local dir=/etc/overlayd/credentials
        as_agent=(--etcd-endpoints "$(cluster)"
            --etcd-cafile "$dir/ca.crt" --etcd-certfile "$dir/overlay-agent.crt" --etcd-keyfile "$dir/overlay-agent.key"
            --etcd-username overlay-agent --etcd-password-file "$dir/password")
    fi
    # Cached, because `vagrant ssh-config` takes seconds.
    if [ ! -s "$ssh_config" ] || ! on node1 true 2>/dev/null; then
        (umask 077 && vagrant ssh-config >"$ssh_config.new") || die "the machines do not run: $0 up"
        mv "$ssh_config.new" "$ssh_config"
    fi
}

# on NODE COMMAND...: runs a command as root on a machine.
on() {
    local node=$1
    shift
    if [ $# -eq 0 ]; then
        ssh -F "$ssh_config" "$node"
    else
        ssh -F "$ssh_config" -o LogLevel=ERROR "$node" "sudo $(printf '%q ' "$@")" </dev/null
    fi
}

for_all() {
    local n
    for n in $(seq "$NODES"); do "$@" "node$n"; done
}

wait_ready() {
    on "$1" overlayctl status --brief --wait "${STEP_TIMEOUT}s" || die "the agent of $1 is not ready: $(on "$1" journalctl -u overlayd -n 5 --no-pager)"
}

status() {
    on node1 overlayctl subnets || failed "cannot read the subnets on node1"
    for_all agent_status
}

agent_status() { printf '%s: %s, kernel %s\n' "$1" "$(on "$1" overlayctl status --brief || true)" "$(on "$1" uname -r)"; }

down() {
    if [ -e "$files/lab.env" ]; then
        # shellcheck disable=SC1091
        . "$files/lab.env"
    fi
    say "vagrant destroy"
    call destroy --force
    rm -rf "$files"
}

# ---- the check

failures=0

failed() {
    echo "FAILED $*" >&2
    failures=$((failures + 1))
}

check() {
    say "agents"
    for_all wait_ready
    for_all agent_status
    declare -gA repaired
    for_all remember_repairs
    say "containers, one on each machine"
    declare -gA v4 v6
    for_all attach
    say "pings between all containers, over IPv4 and IPv6"
    for_all pings
    say "a published port of the last machine, called from the first"
    published
    say "a container attached by the CNI plugin, pinged from the first machine's container"
    plugin
    say "subnets"
    on node1 overlayctl subnets || failed "cannot read the subnets on node1"
    if [ "$ETCD" = cluster ]; then
        say "subnets, read from the cluster"
        on node1 overlayctl subnets "${as_agent[@]}" || failed "node1 cannot read the subnets from etcd"
    fi
    say "no drift repairs during the check"
    for_all same_repairs
    say "overlayctl check"
    for_all doctor
    if [ $failures -gt 0 ]; then
        say "the agents' last log lines"
        for_all last_words
        die "$failures checks failed, see FAILED above"
    fi
    say "all checks passed: $NODES machines, etcd $ETCD"
}

# field NAME: the first string with this name in JSON.
field() { sed -n 's/.*"'"$1"'": "\([^"]*\)".*/\1/p' | head -1; }

attach() {
    local json error=""
    v4[$1]="" v6[$1]=""
    # A repeated attach returns the same container. A machine may hang until the watchdog restarts its agent.
    for _ in 1 2 3; do
        error=$(on "$1" overlayctl attach lab 2>&1 >/dev/null) || true
        if json=$(on "$1" overlayctl inspect lab -o json 2>&1); then break; fi
        echo "$1: retrying after: ${error:-$json}"
        wait_ready "$1"
    done
    [ -n "$(field v4 <<<"$json")" ] || { failed "$1 has no container: $error $json" && return; }
    v4[$1]=$(field v4 <<<"$json") v6[$1]=$(field v6 <<<"$json")
    printf '%s: %s %s\n' "$1" "${v4[$1]}" "${v6[$1]}"
}

# reach NODE ADDRESS: the node's container must get three replies of three; prints ping's last line. Tries twice, because a machine may hang for
# longer than ping waits.
reach() {
    local answer
    for _ in 1 2; do
        answer=$(on "$1" ip netns exec lab ping -n -c 3 -i 0.3 -W 5 "${2:-missing}" 2>&1) || true
        if grep -q ' 0% packet loss' <<<"$answer"; then
            tail -1 <<<"$answer"
            return
        fi
    done
    tail -1 <<<"$answer"
    return 1
}

pings() {
    local from=$1 n to address answer
    for n in $(seq "$NODES"); do
        to=node$n
        [ "$to" != "$from" ] || continue
        for address in "${v4[$to]}" "${v6[$to]}"; do
            if answer=$(reach "$from" "$address"); then
                printf '%s -> %s  %-22s %s\n' "$from" "$to" "$address" "$answer"
            else
                failed "$from -> $to $address: $answer"
            fi
        done
    done
}

published() {
    local last=node$NODES host answer
    host=$(address "$NODES")
    on "$last" overlayctl detach web >/dev/null 2>&1 || true
    on "$last" overlayctl attach web --publish 8080:80/tcp >/dev/null || { failed "attach with --publish on $last" && return; }
    on "$last" systemctl stop lab-web.service 2>/dev/null || true
    on "$last" systemd-run --quiet --collect --unit lab-web ip netns exec web busybox httpd -f -p 80 -h /etc
    for address in "$host" "[fd00:56::$NODES]"; do
        answer=$(on node1 curl --silent --show-error --max-time 30 --retry 5 --retry-connrefused "http://$address:8080/hostname" 2>&1) || true
        if [ "$answer" = "$last" ]; then echo "node1 -> $address port 8080: $answer"; else failed "port 8080 of $address: $answer"; fi
    done
    on "$last" systemctl stop lab-web.service
    on "$last" overlayctl detach web >/dev/null || failed "detach on $last"
}

plugin() {
    local last=node$NODES result address answer
    local conf='{"cniVersion":"1.0.0","name":"overlay","type":"overlay-cni"}'
    # shellcheck disable=SC2016
    local run='ip netns add lab-cni 2>/dev/null; echo "$2" | CNI_COMMAND=$1 CNI_CONTAINERID=lab-cni CNI_NETNS=/run/netns/lab-cni CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni /usr/lib/cni/overlay-cni'
    on "$last" sh -c "$run" sh DEL "$conf" >/dev/null 2>&1 || true
    if result=$(on "$last" sh -c "$run" sh ADD "$conf" 2>&1); then
        address=$(tr -d ' \n' <<<"$result" | grep -o '"address":"[0-9.]*/' | tr -dc '0-9.' | head -1)
        if answer=$(reach node1 "$address"); then echo "node1 -> $last $address  $answer"; else failed "ping of $address: $answer"; fi
    else
        failed "overlay-cni ADD: $result"
    fi
    on "$last" sh -c "$run" sh DEL "$conf" || failed "overlay-cni DEL"
    on "$last" ip netns delete lab-cni || true
}

# repairs NODE: the agent's number of drift repairs. Kernels differ in the events about an agent's own writes, which must not count as drift.
repairs() { on "$1" overlayctl status -o json | sed -n 's/.*"drift_repairs": \([0-9]*\).*/\1/p'; }

remember_repairs() { repaired[$1]=$(repairs "$1") || failed "cannot read the state of $1"; }

same_repairs() {
    local now
    now=$(repairs "$1") || true
    if [ -n "$now" ] && [ "$now" -le "${repaired[$1]:-0}" ]; then
        echo "$1: ${repaired[$1]:-0} repairs before, $now after"
    else
        failed "$1: ${repaired[$1]:-?} repairs before, ${now:-?} after: $(on "$1" overlayctl status -o json | tr -d '\n ' | grep -o '"last_drift":{[^}]*}')"
    fi
}

last_words() { on "$1" journalctl -u overlayd -n 20 --no-pager || true; }

# Warnings are shown, errors count as failures.
doctor() {
    local code=0 answer
    answer=$(on "$1" overlayctl check "${as_agent[@]}" 2>&1) || code=$?
    printf '%s (exit code %d)\n%s\n' "$1" $code "$answer"
    case $code in 0 | 3) ;; *) failed "overlayctl check on $1" ;; esac
}

main "$@"
