#!/bin/sh
# Roles and users of etcd for the overlay, each with the least it needs; then authentication is switched on.
#
#   ETCDCTL_ENDPOINTS=https://etcd-1:2379 ETCDCTL_CACERT=ca.crt ETCDCTL_CERT=admin.crt ETCDCTL_KEY=admin.key \
#       access.sh PASSWORDS [PREFIX]
#
# PASSWORDS is a directory with one file a user: root, overlay-admin, overlay-agent, overlay-reader; where one is missing a password is made up
# and written there. PREFIX is the overlay's, /coreos.com/network by default. It can be repeated: permissions and passwords are then set anew.
#
#   role            may                                                    for
#   overlay-agent   read below PREFIX/, write below PREFIX/subnets/        overlayd on every host
#   overlay-reader  read below PREFIX/                                     monitoring, overlayctl subnets
#   overlay-admin   read and write below PREFIX/                           overlayctl config set, reservations
#   root            everything                                             etcd's own administration
set -eu

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
passwords=$1
prefix=${2:-/coreos.com/network}
prefix=${prefix%/}
export ETCDCTL_API=3
umask 077
mkdir -p "$passwords"

password() { # USER
    if [ ! -s "$passwords/$1" ]; then
        openssl rand -hex 24 >"$passwords/$1"
        echo "made up a password for $1: $passwords/$1" >&2
    fi
    cat "$passwords/$1"
}

ctl() {
    etcdctl "$@"
}

# Once authentication is on, only root may go on. The password is in no list of processes.
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
    # On standard input, so that the password is in no list of processes.
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
# Two ranges, not a prefix: a prefix without its slash would hold its neighbours' keys as well.
ctl role grant-permission overlay-agent read "$prefix/" "${prefix}0"
ctl role grant-permission overlay-agent readwrite "$prefix/subnets/" "$prefix/subnets0"
ctl role grant-permission overlay-reader read "$prefix/" "${prefix}0"
ctl role grant-permission overlay-admin readwrite "$prefix/" "${prefix}0"
user root root
user overlay-agent overlay-agent
user overlay-reader overlay-reader
user overlay-admin overlay-admin
ctl auth enable
echo "authentication is on; agents are user overlay-agent with the password in $passwords/overlay-agent"
