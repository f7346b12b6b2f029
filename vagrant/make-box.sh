#!/bin/bash
# Creates a Vagrant box of Debian with Debian's own kernel, from this machine's apt mirror. It downloads no box.
#
#   sudo ./vagrant/make-box.sh    target/vagrant/debian-SUITE.box for the provider libvirt, and its disk (.qcow2) for qemu
#
#   --suite SUITE   Debian's suite (by default this machine's, if it runs Debian)
#   --mirror URL    mirror of the packages (by default from this machine's apt sources)
#   --size GIB      size of the sparse disk (10)
#   --out DIR       output directory
#   --add           also add the box to Vagrant, as overlayd/debian-SUITE, for the user who calls sudo
#
# The box contains the packages that the lab's provisioning needs (etcd, OpenSSL, iproute2), so that the virtual machines need only their own
# network. It is an ordinary Vagrant box: user `vagrant` with Vagrant's public key pair, which Vagrant replaces at the first start. Use it only for labs.
#
# Needs root (for debootstrap) and Debian's debootstrap, e2fsprogs, fdisk and qemu-utils. Mounts nothing outside the new tree and uses no loop
# device: file system and boot loader are written into a file.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)

suite=
mirror=${MIRROR:-}
size=10
out=$top/target/vagrant
add=no
work=

# Debian's standard kernel, not the cloud kernel: it has drivers for all hypervisors.
TREE_PACKAGES=(linux-image-amd64 initramfs-tools grub-pc-bin grub-common systemd systemd-sysv dbus init-system-helpers udev
    openssh-server sudo ifupdown isc-dhcp-client ca-certificates iproute2 iputils-ping procps kmod less nftables iptables tcpdump curl
    etcd-server etcd-client openssl busybox)
# Vagrant's insecure public key; Vagrant replaces it with a new key.
VAGRANT_KEY="ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key"

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; }

die() {
    echo "make-box.sh: $*" >&2
    exit 1
}

tidy() {
    if [ -n "$work" ]; then
        # A failed debootstrap leaves /proc and /sys mounted.
        umount -q "$work/tree/proc" "$work/tree/sys" 2>/dev/null || true
        rm -rf --one-file-system "$work"
    fi
}

main() {
    while [ $# -gt 0 ]; do
        case $1 in
        --suite) suite=${2:-} && shift ;;
        --mirror) mirror=${2:-} && shift ;;
        --size) size=${2:-} && shift ;;
        --out) out=${2:-} && shift ;;
        --add) add=yes ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && echo "make-box.sh: unknown argument: $1" >&2 && exit 2 ;;
        esac
        shift || { usage >&2 && exit 2; }
    done
    case $size in *[!0-9]* | '' | 0) echo "make-box.sh: --size is a number of GiB, not '$size'" >&2 && exit 2 ;; esac
    prerequisites
    find_suite
    find_mirror
    trap tidy EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # New directories belong to the user who called sudo.
    if [ -z "${SUDO_USER:-}" ] || ! runuser -u "$SUDO_USER" -- mkdir -p "$out" 2>/dev/null; then mkdir -p "$out"; fi
    # In the output directory, because many a /tmp is too small for a Debian tree.
    work=$(mktemp -d "$out/.make-box.XXXXXX")
    chmod 755 "$work"
    make_tree
    configure_tree
    make_disk
    make_box
}

prerequisites() {
    [ "$(id -u)" -eq 0 ] || die "debootstrap needs root to create files of other users: run  sudo $0"
    [ "$(dpkg --print-architecture)" = amd64 ] || die "boxes can be created on amd64 only, this machine is $(dpkg --print-architecture)"
    local missing=() pair
    for pair in debootstrap:debootstrap mkfs.ext4:e2fsprogs sfdisk:fdisk qemu-img:qemu-utils; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] || die "programs are missing: run  sudo apt-get install ${missing[*]}"
    export PATH=$PATH:/usr/sbin:/sbin
}

find_suite() {
    [ -z "$suite" ] || return 0
    # shellcheck disable=SC1091
    suite=$(. /etc/os-release && [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-}") || true
    [ -n "$suite" ] || die "this machine does not run Debian: name a suite, --suite SUITE"
}

# The suite's mirror in this machine's apt sources, else the mirror of any Debian suite there, because mirrors have all suites.
find_mirror() {
    [ -z "$mirror" ] || return 0
    local list
    # shellcheck disable=SC2016 # apt fills these in
    list=$(apt-get indextargets --format '$(CODENAME) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null) || true
    mirror=$(awk -v suite="$suite" '$2 == "Debian" { any = any ? any : $3 } $1 == suite && $2 == "Debian" { print $3; found = 1; exit }
        END { if (!found) print any }' <<<"$list")
    [ -n "$mirror" ] || die "no mirror of Debian in this machine's apt sources (has apt-get update run?): name one, --mirror URL"
}

make_tree() {
    echo "== Debian $suite from $mirror"
    local include
    include=$(IFS=, && echo "${TREE_PACKAGES[*]}")
    if ! debootstrap --variant=minbase --include="$include" "$suite" "$work/tree" "$mirror" >"$work/debootstrap.log" 2>&1; then
        tail -5 "$work/debootstrap.log" >&2
        cp "$work/debootstrap.log" "$out/debootstrap.log"
        die "debootstrap failed; its log is $out/debootstrap.log"
    fi
    rm -f "$work/tree"/var/cache/apt/archives/*.deb
}

in_tree() { chroot "$work/tree" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"; }

configure_tree() {
    local tree=$work/tree
    echo "== configuration"
    uuid=$(cat /proc/sys/kernel/random/uuid)
    echo "UUID=$uuid / ext4 errors=remount-ro 0 1" >"$tree/etc/fstab"
    echo debian >"$tree/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n' >"$tree/etc/hosts"
    rm -f "$tree/etc/resolv.conf" "$tree"/etc/ssh/ssh_host_*
    # An empty file makes systemd generate an ID for each machine.
    : >"$tree/etc/machine-id"
    rm -f "$tree/var/lib/dbus/machine-id"
    mkdir -p "$tree/etc/network/interfaces.d"
    # Vagrant's management network; Vagrant adds the other interfaces.
    printf 'source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n' >"$tree/etc/network/interfaces"

    cat >"$tree/etc/systemd/system/ssh-host-keys.service" <<'UNIT'
[Unit]
Description=Host keys of this machine
Before=ssh.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
# Elliptic curves, because an RSA key takes a minute without KVM.
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
ExecStart=/usr/bin/ssh-keygen -q -t ecdsa -N "" -f /etc/ssh/ssh_host_ecdsa_key

[Install]
WantedBy=multi-user.target
UNIT
    in_tree systemctl enable --quiet ssh-host-keys.service
    # The lab configures etcd itself, if it needs it on this machine.
    in_tree systemctl disable --quiet etcd.service
    printf 'UseDNS no\nHostKey /etc/ssh/ssh_host_ed25519_key\nHostKey /etc/ssh/ssh_host_ecdsa_key\n' >"$tree/etc/ssh/sshd_config.d/vagrant.conf"

    in_tree useradd --create-home --shell /bin/bash --password "$(in_tree openssl passwd -6 vagrant)" vagrant
    install -d -m 700 "$tree/home/vagrant/.ssh"
    echo "$VAGRANT_KEY" >"$tree/home/vagrant/.ssh/authorized_keys"
    chmod 600 "$tree/home/vagrant/.ssh/authorized_keys"
    in_tree chown -R vagrant: /home/vagrant/.ssh
    echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$tree/etc/sudoers.d/vagrant"
    chmod 440 "$tree/etc/sudoers.d/vagrant"
    # Vagrant expects the name eth0, independent of the card's slot (net.ifnames=0). /vmlinuz is always the newest kernel.
    mkdir -p "$tree/boot/grub"
    cat >"$tree/boot/grub/grub.cfg" <<GRUB
set root=(hd0,msdos1)
linux /vmlinuz root=UUID=$uuid ro net.ifnames=0 biosdevname=0 console=tty0 console=ttyS0,115200
initrd /initrd.img
boot
GRUB
    [ -e "$tree/vmlinuz" ] || die "$suite's kernel package has created no /vmlinuz"
    kernel=$(basename "$(readlink "$tree/vmlinuz")")
}

make_disk() {
    local tree=$work/tree core=$work/core.img start=2048 sectors=$((size * 1024 * 1024 * 2))
    echo "== disk with ${kernel/vmlinuz-/kernel }"
    # core.img follows the partition table in contiguous sectors from sector 1, the default place that boot.img reads.
    in_tree grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /boot/core.img biosdisk part_msdos ext2 linux normal all_video
    mv "$tree/boot/core.img" "$core"
    [ "$(stat -c %s "$core")" -lt $(((start - 1) * 512)) ] || die "the boot loader does not fit before the first partition"

    truncate -s "${size}G" "$work/disk.raw"
    printf 'label: dos\nstart=%s, type=83, bootable\n' $start | sfdisk --quiet "$work/disk.raw"
    dd if="$tree/usr/lib/grub/i386-pc/boot.img" of="$work/disk.raw" bs=440 count=1 conv=notrunc status=none
    dd if="$core" of="$work/disk.raw" bs=512 seek=1 conv=notrunc status=none
    # -d fills the file system from the tree without a mount.
    mkfs.ext4 -q -F -L root -U "$uuid" -E "offset=$((start * 512)),lazy_itable_init=0,lazy_journal_init=0" -d "$tree" \
        "$work/disk.raw" "$(((sectors - start) / 2))k" 2>"$work/mkfs.log" || { cat "$work/mkfs.log" >&2 && die "cannot create the file system"; }
}

make_box() {
    local box=$out/debian-$suite.box disk=$out/debian-$suite.qcow2 name=overlayd/debian-$suite
    echo "== box"
    mkdir "$work/box"
    qemu-img convert -c -O qcow2 "$work/disk.raw" "$work/box/box.img"
    printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": %s}\n' "$size" >"$work/box/metadata.json"
    printf 'Vagrant.configure("2") do |config|\n  config.vm.synced_folder ".", "/vagrant", disabled: true\nend\n' >"$work/box/Vagrantfile"
    # The image is compressed already, so the fastest gzip level suffices.
    tar -C "$work/box" --sort=name --owner=0 --group=0 -cf - metadata.json Vagrantfile box.img | gzip -1 >"$box.new"
    mv "$work/box/box.img" "$disk"
    mv "$box.new" "$box"
    if [ -n "${SUDO_UID:-}" ]; then chown "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$out" "$box" "$disk"; fi
    ls -sh "$box" "$disk"
    local tell=(vagrant box add --force --provider libvirt --name "$name" "$box")
    if [ $add = no ]; then
        echo "next, as Vagrant's user: ${tell[*]}"
    elif [ -n "${SUDO_USER:-}" ]; then
        runuser -u "$SUDO_USER" -- "${tell[@]}"
    else
        "${tell[@]}"
    fi
}

main "$@"
