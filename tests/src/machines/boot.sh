#!/bin/bash
# The init process of a host for a documentation page, in its own namespaces (network, mounts, processes, host name). Files
# written to /etc, /root, /var and /usr are in memory and vanish with it; /run is its own.
#
#   boot.sh NAME PROGRAMS: PROGRAMS is a directory that comes first in the search path
set -euo pipefail
name=$1 programs=$2
mount --make-rprivate /
hostname "$name"
mount -t tmpfs tmpfs /mnt
# /run is replaced below, and PROGRAMS may be inside it.
mkdir /mnt/programs
cp "$programs"/* /mnt/programs/
for dir in etc root var usr; do
    mkdir -p "/mnt/$dir/new" "/mnt/$dir/work"
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=/mnt/$dir/new,workdir=/mnt/$dir/work" "/$dir"
done
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t sysfs sysfs /sys
mkdir -p /run/machine /etc/overlayd
cp /mnt/programs/* /usr/local/sbin/
ip link set lo up
# As systemd does, so that unprivileged users may ping.
echo "0 2147483647" >/proc/sys/net/ipv4/ping_group_range
touch /run/machine/ready
# An init process has to reap orphaned processes.
trap : CHLD
while :; do
    sleep 1000 &
    wait $! || true
done
