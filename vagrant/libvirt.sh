#!/bin/bash
# Runs a command with a private libvirt, for machines without libvirt: containers, CI, tests without side effects.
#
#   sudo ./vagrant/libvirt.sh ./vagrant/lab.sh all
#   sudo ./vagrant/libvirt.sh bash                   for interactive work
#
# libvirtd, its networks, the virtual machines and Vagrant's state use own namespaces (network, mount, PID) and a temporary directory, which
# end with the command; this machine's network does not change. Boxes are in the caller's VAGRANT_HOME. Needs root and Debian's
# libvirt-daemon-system, libvirt-clients, qemu-system-x86, qemu-utils and dnsmasq-base.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

die() {
    echo "libvirt.sh: $*" >&2
    exit 1
}

outside() {
    [ "$(id -u)" -eq 0 ] || die "creating namespaces needs root: run  sudo $0 $*"
    local pair missing=()
    for pair in libvirtd:libvirt-daemon-system virtlogd:libvirt-daemon virsh:libvirt-clients qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils dnsmasq:dnsmasq-base \
        iptables:iptables; do
        PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] || die "programs are missing: run  sudo apt-get install --no-install-recommends ${missing[*]}"
    # The namespaces have no internet access, so the lab's package is built here.
    "$(dirname "$0")/lab.sh" package
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/overlay-libvirt.XXXXXX")
    # libvirt's user must read disks in this directory.
    chmod 755 "$work"
    trap 'rm -rf --one-file-system "$work"' EXIT
    local code=0
    # All processes of a PID namespace, including the virtual machines, end with its first process.
    OVERLAY_LIBVIRT=$work unshare --net --mount --pid --fork --kill-child --mount-proc "$0" "$@" || code=$?
    exit $code
}

inside() {
    local work=$OVERLAY_LIBVIRT limit
    export PATH=$PATH:/usr/sbin:/sbin
    mount --make-rprivate /
    mkdir -p "$work"/{lib,etc,cache,log,vagrant}
    cp -a /etc/libvirt/. "$work/etc"
    cp -a /var/lib/libvirt/. "$work/lib"
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /run/lock
    mount --bind "$work/etc" /etc/libvirt
    mount --bind "$work/lib" /var/lib/libvirt
    mount --bind "$work/log" /var/log/libvirt
    mount --bind "$work/cache" /var/cache/libvirt
    # cgroups and security modules belong to the outer system, so qemu must not use them.
    printf 'cgroup_controllers = []\nsecurity_driver = "none"\nnamespaces = []\n' >>/etc/libvirt/qemu.conf
    printf 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n' >>/etc/libvirt/libvirtd.conf
    ip link set lo up
    virtlogd --daemon
    libvirtd --daemon || die "libvirtd does not start; its log is in $work/log"
    limit=$((SECONDS + 60))
    until virsh -c qemu:///system version >"$work/version" 2>&1; do
        [ $SECONDS -lt $limit ] || die "libvirtd does not answer: $(tail -1 "$work/version")"
        sleep 0.5
    done
    virsh -q -c qemu:///system pool-info default >/dev/null 2>&1 || {
        mkdir -p /var/lib/libvirt/images
        virsh -q -c qemu:///system pool-define-as default dir --target /var/lib/libvirt/images
        virsh -q -c qemu:///system pool-start default
    }
    export VAGRANT_DOTFILE_PATH=$work/vagrant VAGRANT_DEFAULT_PROVIDER=libvirt
    unset OVERLAY_LIBVIRT
    local code=0
    "$@" || code=$?
    exit $code
}

case ${1:-} in
'') usage >&2 && exit 2 ;;
-h | --help) usage && exit 0 ;;
esac
if [ -n "${OVERLAY_LIBVIRT:-}" ]; then inside "$@"; else outside "$@"; fi
