#!/bin/bash
# Runs the page docs/vagrant.md completely, with virtual machines that need neither KVM nor a libvirt of this machine.
#
#   sudo ./tests/vagrant.sh        half an hour or more without acceleration; therefore not a part of run.sh
#
# The Debian packages that it installs stay; the box, the virtual machines and their networks are removed.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
-h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit 0 ;;
?*) echo "tests/vagrant.sh: unknown argument: $1" >&2 && exit 2 ;;
esac
[ "$(id -u)" -eq 0 ] || { echo "tests/vagrant.sh: root is needed: run  sudo $0" >&2 && exit 2; }

VAGRANT_HOME=$(mktemp -d /var/tmp/overlay-vagrant.XXXXXX)
export VAGRANT_HOME PROFILE=${PROFILE:-dev} DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
saved=$policy.overlay-vagrant
# No installed service may start on this machine. Container images have such a policy already, which is restored.
if [ -e $policy ] && [ ! -e $saved ]; then mv $policy $saved; fi
unpolicy() {
    rm -f $policy
    if [ -e $saved ]; then mv $saved $policy; fi
}
trap 'unpolicy; rm -rf "$VAGRANT_HOME"' EXIT
printf '#!/bin/sh\nexit 101\n' >$policy
chmod +x $policy
apt-get install -y -q --no-install-recommends debootstrap dnsmasq-base libvirt-clients qemu-utils
apt-get install vagrant vagrant-libvirt libvirt-daemon-system qemu-system-x86 <<<y
unpolicy
trap 'rm -rf "$VAGRANT_HOME"' EXIT

./vagrant/make-box.sh --add
DRIVER=qemu ./vagrant/libvirt.sh ./vagrant/lab.sh all
ETCD=cluster DRIVER=qemu ./vagrant/libvirt.sh ./vagrant/lab.sh all
# The same virtual machines with Vagrant's own commands and with the lab's.
DRIVER=qemu ./vagrant/libvirt.sh bash <<'EOF'
set -e
trap './vagrant/lab.sh down' EXIT
(cd vagrant && vagrant up)
./vagrant/lab.sh up
./vagrant/lab.sh check
./vagrant/lab.sh ssh node1 overlayctl peers
(cd vagrant && vagrant ssh node2 --command 'sudo overlayctl peers' </dev/null && vagrant destroy --force)
EOF
