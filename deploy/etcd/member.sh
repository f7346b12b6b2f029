#!/bin/sh
# Writes the settings of one member of a three-member etcd cluster with TLS to standard output, for overlay-etcd.service.
#
#   member.sh NAME CERTIFICATES NAME=ADDRESS NAME=ADDRESS NAME=ADDRESS >/etc/overlay-etcd/etcd.env
#
# NAME is this member; CERTIFICATES the directory with ca.crt, NAME.crt and NAME.key. Clients and members need a certificate of the CA.
# DATA is the data directory (/var/lib/overlay-etcd), TOKEN identifies the cluster, STATE is `existing` to join a running cluster.
set -eu

if [ $# -lt 3 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 certificates=$2
shift 2
own="" cluster=""
for member in "$@"; do
    host=${member#*=}
    case $host in
    *:*) host="[$host]" ;;
    esac
    cluster=${cluster:+$cluster,}${member%%=*}=https://$host:2380
    if [ "${member%%=*}" = "$name" ]; then own=$host; fi
done
if [ -z "$own" ]; then
    echo "member.sh: $name is not among $*" >&2
    exit 2
fi
cat <<SETTINGS
ETCD_NAME=$name
ETCD_DATA_DIR=${DATA:-/var/lib/overlay-etcd}
ETCD_LISTEN_CLIENT_URLS=https://$own:2379
ETCD_ADVERTISE_CLIENT_URLS=https://$own:2379
ETCD_LISTEN_PEER_URLS=https://$own:2380
ETCD_INITIAL_ADVERTISE_PEER_URLS=https://$own:2380
ETCD_INITIAL_CLUSTER=$cluster
ETCD_INITIAL_CLUSTER_STATE=${STATE:-new}
ETCD_INITIAL_CLUSTER_TOKEN=${TOKEN:-overlay}
ETCD_TRUSTED_CA_FILE=$certificates/ca.crt
ETCD_CERT_FILE=$certificates/$name.crt
ETCD_KEY_FILE=$certificates/$name.key
ETCD_CLIENT_CERT_AUTH=true
ETCD_PEER_TRUSTED_CA_FILE=$certificates/ca.crt
ETCD_PEER_CERT_FILE=$certificates/$name.crt
ETCD_PEER_KEY_FILE=$certificates/$name.key
ETCD_PEER_CLIENT_CERT_AUTH=true
# History older than an hour is compacted, so that the database stays small. Agents that fall behind read all leases again.
ETCD_AUTO_COMPACTION_MODE=periodic
ETCD_AUTO_COMPACTION_RETENTION=1h
SETTINGS
