#!/bin/sh
# Creates the certificates of an etcd cluster for the overlay, with openssl.
#
#   certs.sh DIR ca                        the CA: DIR/ca.crt and DIR/ca.key; keep ca.key on this machine
#   certs.sh DIR member NAME HOST...       a member: DIR/NAME.crt and .key, for its names and addresses (also as a client of other members)
#   certs.sh DIR client NAME               a client: DIR/NAME.crt and .key; NAME is its common name
#
# Existing files are kept, so it can be repeated; delete a file to renew it. Certificates are valid for DAYS (365; the CA ten times as long).
set -eu

DAYS=${DAYS:-365}

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 2 ] || usage
dir=$1 what=$2
shift 2
mkdir -p "$dir"
umask 077

key() { # FILE
    openssl ecparam -genkey -name prime256v1 -noout -out "$1.new"
    mv "$1.new" "$1"
}

# sign NAME EXTENSIONS: creates a certificate signed by the CA.
sign() {
    if [ -e "$dir/$1.crt" ]; then
        echo "kept $dir/$1.crt"
        return
    fi
    if [ ! -e "$dir/ca.key" ]; then
        echo "certs.sh: there is no CA in $dir: run  $0 $dir ca  first" >&2
        exit 1
    fi
    [ -e "$dir/$1.key" ] || key "$dir/$1.key"
    request=$(mktemp) extensions=$(mktemp)
    printf '%s\n' "$2" >"$extensions"
    openssl req -new -key "$dir/$1.key" -subj "/CN=$1" -out "$request"
    openssl x509 -req -in "$request" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -set_serial "0x00$(openssl rand -hex 16)" -days "$DAYS" \
        -sha256 -extfile "$extensions" -out "$dir/$1.crt.new" 2>/dev/null
    chmod 0644 "$dir/$1.crt.new"
    mv "$dir/$1.crt.new" "$dir/$1.crt"
    rm -f "$request" "$extensions"
    echo "made $dir/$1.crt"
}

common='basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid'

case $what in
ca)
    [ $# -eq 0 ] || usage
    if [ -e "$dir/ca.crt" ]; then
        echo "kept $dir/ca.crt"
        exit 0
    fi
    key "$dir/ca.key"
    openssl req -x509 -new -key "$dir/ca.key" -sha256 -days "$((DAYS * 10))" -subj "/CN=overlay etcd CA" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$dir/ca.crt.new"
    chmod 0644 "$dir/ca.crt.new"
    mv "$dir/ca.crt.new" "$dir/ca.crt"
    echo "made $dir/ca.crt"
    ;;
member)
    [ $# -ge 2 ] || usage
    name=$1
    shift
    names=DNS:$name,DNS:localhost,IP:127.0.0.1
    for host in "$@"; do
        case $host in
        *:* | *[0-9].*[0-9].*[0-9].*[0-9]) names=$names,IP:$host ;;
        *) names=$names,DNS:$host ;;
        esac
    done
    # Members are also clients of each other.
    sign "$name" "$common
extendedKeyUsage=serverAuth,clientAuth
subjectAltName=$names"
    ;;
client)
    [ $# -eq 1 ] || usage
    sign "$1" "$common
extendedKeyUsage=clientAuth"
    ;;
*) usage ;;
esac
