#!/bin/sh
# Makes one machine of the lab a host of the overlay. Runs on the machine as root, in the directory of files from `lab.sh prepare`. It can be
# repeated.
#
# It does not wait for other machines, so that they can be provisioned in any order. Exception: the machine with SETUP, which is provisioned last
# among etcd's members, waits for etcd and writes the network's configuration.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
# NAME, ADDRESS4, ADDRESS6, ETCD, MEMBERS, ENDPOINTS, SETUP
# shellcheck disable=SC1091
. "$here/node.env"
pki=/etc/overlay-etcd/pki
export DEBIAN_FRONTEND=noninteractive

say() { echo "$NAME: $*"; }

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

packages() {
    # Complete the installation of an interrupted run.
    dpkg --configure -a
    missing=
    for package in etcd-server etcd-client openssl iproute2 iputils-ping nftables curl busybox; do
        installed $package || missing="$missing $package"
    done
    if [ -n "$missing" ]; then
        say "installing$missing"
        # shellcheck disable=SC2086
        if ! apt-get -q update || ! apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing; then
            echo "$NAME: no apt mirror has$missing: does this machine have internet access? A box of make-box.sh has all packages" >&2
            exit 1
        fi
    fi
    say "installing overlayd $(dpkg-deb --field "$here/overlayd.deb" Version)"
    # --reinstall, because another build may have the same version.
    apt-get -q -o DPkg::Lock::Timeout=300 install -y --reinstall --allow-downgrades "$here/overlayd.deb" >"$here/apt.log" 2>&1 || {
        cat "$here/apt.log" >&2
        exit 1
    }
}

# IPv6 between the machines: Vagrant configures only one address of a network card.
underlay_ipv6() {
    card=$(ip -o -4 address show | awk -v address="$ADDRESS4" '{ split($4, part, "/") } part[1] == address { print $2 }')
    if [ -z "$card" ]; then
        echo "$NAME: no network card has the address $ADDRESS4: is the private network configured?" >&2
        exit 1
    fi
    cat >/etc/systemd/system/overlay-lab-ipv6.service <<UNIT
[Unit]
Description=IPv6 between the machines of the lab
After=network.target
Before=overlayd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/ip -6 address replace $ADDRESS6/64 dev $card nodad

[Install]
WantedBy=multi-user.target
UNIT
    systemctl daemon-reload
    systemctl enable --quiet overlay-lab-ipv6.service
    systemctl restart overlay-lab-ipv6.service
}

etcd_single() {
    [ -n "$SETUP" ] || return 0
    say "etcd at $ENDPOINTS"
    cat >/etc/default/etcd <<SETTINGS
ETCD_NAME=$NAME
ETCD_LISTEN_CLIENT_URLS=$ENDPOINTS
ETCD_ADVERTISE_CLIENT_URLS=$ENDPOINTS
SETTINGS
    systemctl enable --quiet etcd.service
    systemctl restart etcd.service
}

etcd_member() {
    [ -e "$here/pki/$NAME.key" ] || return 0
    say "etcd, one of $MEMBERS"
    systemctl disable --quiet --now etcd.service 2>/dev/null || true
    install -d -m 700 -o etcd -g etcd /etc/overlay-etcd $pki
    for file in ca.crt "$NAME.crt" "$NAME.key"; do install -m 600 -o etcd -g etcd "$here/pki/$file" $pki/; done
    # shellcheck disable=SC2086
    sh "$here/etcd/member.sh" "$NAME" $pki $MEMBERS >/etc/overlay-etcd/etcd.env
    # Without KVM an answer may take a second, and members would elect a new leader again and again.
    if [ "$(systemd-detect-virt)" = qemu ]; then
        printf 'ETCD_HEARTBEAT_INTERVAL=1000\nETCD_ELECTION_TIMEOUT=10000\n' >>/etc/overlay-etcd/etcd.env
    fi
    install -m 644 "$here/etcd/overlay-etcd.service" /etc/systemd/system/
    systemctl daemon-reload
    systemctl enable --quiet overlay-etcd.service
    # The first member waits for the second.
    systemctl restart --no-block overlay-etcd.service
}

agent() {
    {
        echo "# By the lab's provision.sh."
        echo "etcd-endpoints = [\"$(echo "$ENDPOINTS" | sed 's/,/", "/g')\"]"
        # By address, because the card's name differs between boxes.
        echo "iface = [\"$ADDRESS4\"]"
        echo "node-name = \"$NAME\""
        if [ "$ETCD" = cluster ]; then
            printf 'etcd-cafile = "ca.crt"\netcd-certfile = "overlay-agent.crt"\netcd-keyfile = "overlay-agent.key"\n'
            printf 'etcd-username = "overlay-agent"\netcd-password-file = "password"\n'
        fi
    } >/etc/overlayd/overlayd.toml
    if [ "$ETCD" = cluster ]; then
        for file in ca.crt overlay-agent.crt overlay-agent.key; do install -m 600 "$here/pki/$file" /etc/overlayd/credentials/; done
        install -m 600 "$here/passwords/overlay-agent" /etc/overlayd/credentials/password
    fi
    # --no-block: the agent becomes ready only after etcd has the network's configuration.
    systemctl restart --no-block overlayd.service
}

# Roles, passwords and the network's configuration, once etcd answers.
setup() {
    [ -n "$SETUP" ] || return 0
    export ETCDCTL_API=3 ETCDCTL_ENDPOINTS="$ENDPOINTS"
    flags=
    if [ "$ETCD" = cluster ]; then
        export ETCDCTL_CACERT="$here/pki/ca.crt" ETCDCTL_CERT="$here/pki/overlay-agent.crt" ETCDCTL_KEY="$here/pki/overlay-agent.key"
        flags="--etcd-cafile $ETCDCTL_CACERT --etcd-certfile $ETCDCTL_CERT --etcd-keyfile $ETCDCTL_KEY"
    fi
    say "waiting for etcd"
    tries=0
    until etcdctl endpoint health >"$here/health.log" 2>&1; do
        tries=$((tries + 1))
        if [ $tries -ge 300 ]; then
            echo "$NAME: etcd does not answer at $ENDPOINTS: $(tail -1 "$here/health.log")" >&2
            exit 1
        fi
        sleep 2
    done
    if [ "$ETCD" = cluster ]; then
        say "roles and users of etcd"
        sh "$here/etcd/access.sh" "$here/passwords" >"$here/access.log" 2>&1 || {
            cat "$here/access.log" >&2
            exit 1
        }
        flags="$flags --etcd-username overlay-admin --etcd-password-file $here/passwords/overlay-admin"
    fi
    # shellcheck disable=SC2086
    overlayctl config set "$here/network.json" --etcd-endpoints "$ENDPOINTS" $flags
}

packages
underlay_ipv6
case $ETCD in
single) etcd_single ;;
cluster) etcd_member ;;
esac
agent
setup
# Keys and passwords are installed; the copies are not needed any more.
rm -rf "$here/pki" "$here/passwords"
say "done"
