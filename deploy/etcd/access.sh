#!/bin/sh
# Creates etcd's roles and users for the overlay, each with the least rights it needs; then enables authentication.
#
#   ETCDCTL_ENDPOINTS=https://etcd-1:2379 ETCDCTL_CACERT=ca.crt ETCDCTL_CERT=admin.crt ETCDCTL_KEY=admin.key \
#       access.sh PASSWORDS [PREFIX [NETWORK...]]
#
# PASSWORDS is a directory with one file per user: root, overlay-admin, overlay-agent, overlay-reader. A missing file is created with a random
# password. PREFIX is the overlay's, by default /coreos.com/network. A repeated run sets permissions and passwords again.
# NETWORKs are the named networks in which agents hold leases; other keys of a network only the administrator writes.
#
#   role            may                                                    for
#   overlay-agent   read below PREFIX/, write below PREFIX/subnets/        overlayd on every host
#                   and PREFIX/networks/NETWORK/subnets/
#   overlay-reader  read below PREFIX/                                     monitoring, overlayctl subnets
#   overlay-admin   read and write below PREFIX/                           overlayctl network, config set, reservations
#   root            everything                                             etcd's own administration
set -eu

if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
passwords=$1
prefix=${2:-/coreos.com/network}
prefix=${prefix%/}
if [ $# -gt 2 ]; then shift 2; else shift $#; fi
export ETCDCTL_API=3
umask 077
mkdir -p "$passwords"

password() { # USER
    if [ ! -s "$passwords/$1" ]; then
        openssl rand -hex 24 >"$passwords/$1"
        echo "created a random password for $1: $passwords/$1" >&2
    fi
    cat "$passwords/$1"
}

ctl() {
    etcdctl "$@"
}

# After authentication is enabled only root may continue. The password is passed in the environment, so that process lists do not show it.
if ! etcdctl role list >/dev/null 2>&1; then
    ctl() {
        ETCDCTL_USER="root:$(password root)" etcdctl "$@"
    }
fi

have() { # user|role NAME
    ctl "$1" get "$2" >/dev/null 2>&1
}

role() { # NAME
    have role "$1" || ctl role add "$1"
}

user() { # NAME ROLE
    # On standard input, so that process lists do not show the password.
    if have user "$1"; then
        password "$1" | ctl user passwd "$1" --interactive=false
    else
        password "$1" | ctl user add "$1" --interactive=false
    fi
    ctl user grant-role "$1" "$2"
}

role root
role overlay-agent
role overlay-reader
role overlay-admin
# Ranges that end at the slash: a prefix without its slash would also match keys of other prefixes that begin with it.
ctl role grant-permission overlay-agent read "$prefix/" "${prefix}0"
ctl role grant-permission overlay-agent readwrite "$prefix/subnets/" "$prefix/subnets0"
for network; do
    ctl role grant-permission overlay-agent readwrite "$prefix/networks/$network/subnets/" "$prefix/networks/$network/subnets0"
done
ctl role grant-permission overlay-reader read "$prefix/" "${prefix}0"
ctl role grant-permission overlay-admin readwrite "$prefix/" "${prefix}0"
user root root
user overlay-agent overlay-agent
user overlay-reader overlay-reader
user overlay-admin overlay-admin
ctl auth enable
echo "authentication is enabled; agents use the user overlay-agent with the password in $passwords/overlay-agent"
