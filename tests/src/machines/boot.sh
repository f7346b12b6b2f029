#!/bin/bash
# The first process of a machine of a page, in namespaces of its own (network, mounts, processes, host name): files that are written in /etc, /root and /var
# lie in memory and go with it; /run is its own.
#
#   boot.sh NAME PROGRAMS: PROGRAMS is a directory that stands first in the search path
set -euo pipefail
name=$1 programs=$2
mount --make-rprivate /
hostname "$name"
mount -t tmpfs tmpfs /mnt
# What stands in /run is the machine's own; programs may lie there.
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
# As systemd does, so that a group may ping.
echo "0 2147483647" >/proc/sys/net/ipv4/ping_group_range
touch /run/machine/ready
# What is left behind by others is collected, as a first process has to.
trap : CHLD
while :; do
    sleep 1000 &
    wait $! || true
done
