#!/bin/sh
# Installs overlayd from a built tree or an unpacked tarball.
#
#   sudo ./install.sh                          installs below /usr/local, units in /etc/systemd/system
#   sudo ./install.sh --uninstall              removes the files; configuration and state stay
#   PREFIX=/usr ./install.sh                   uses another prefix
#   DESTDIR=/tmp/root PREFIX=/usr ./install.sh uses another root, as for a package; starts nothing
#
# SOURCE is the directory with the files (by default the script's own); its subdirectory `bin` contains the programs.
set -eu

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
SOURCE=${SOURCE:-$(cd "$(dirname "$0")" && pwd)}
case $PREFIX in
/usr) UNITS=${UNITS:-/lib/systemd} CONF=/usr/lib CNI=${CNI:-/usr/lib/cni} ;;
*) UNITS=${UNITS:-/etc/systemd} CONF=/etc CNI=${CNI:-/opt/cni/bin} ;;
esac

# The list of installed files: MODE FILE DESTINATION. `sub`: paths inside the file follow PREFIX. `conf`: a changed file is kept.
list() {
    cat <<LIST
0755 bin/overlayd $PREFIX/sbin/overlayd
0755 bin/overlayctl $PREFIX/bin/overlayctl
0755 bin/overlay-cni $CNI/overlay-cni
sub  systemd/overlayd.service $UNITS/system/overlayd.service
0644 systemd/overlayd.socket $UNITS/system/overlayd.socket
0644 systemd/overlayd-netns.socket $UNITS/system/overlayd-netns.socket
sub  systemd/overlayd-netns@.service $UNITS/system/overlayd-netns@.service
0644 systemd/overlayd.sysusers $CONF/sysusers.d/overlayd.conf
0644 systemd/overlayd.tmpfiles $CONF/tmpfiles.d/overlayd.conf
0644 systemd/runtime.conf $UNITS/system/docker.service.d/50-overlayd.conf
0644 systemd/runtime.conf $UNITS/system/containerd.service.d/50-overlayd.conf
0644 systemd/proc-netns.conf $PREFIX/share/doc/overlayd/proc-netns.conf
0644 docker/60-overlay.conf $PREFIX/share/doc/overlayd/60-overlay.conf
0644 monitoring/alerts.yaml $PREFIX/share/overlayd/monitoring/alerts.yaml
0644 monitoring/grafana.json $PREFIX/share/overlayd/monitoring/grafana.json
conf overlayd.toml /etc/overlayd/overlayd.toml
0644 completions/overlayctl.bash $PREFIX/share/bash-completion/completions/overlayctl
0644 completions/_overlayctl $PREFIX/share/zsh/vendor-completions/_overlayctl
0644 completions/overlayctl.fish $PREFIX/share/fish/vendor_completions.d/overlayctl.fish
LIST
    (cd "$SOURCE" && find man -name '*.[1-8].gz' | LC_ALL=C sort) | while read -r page; do
        echo "0644 $page $PREFIX/share/$page"
    done
}

put() {
    mode=$1 from=$SOURCE/$2 to=$DESTDIR$3
    mkdir -p "$(dirname "$to")"
    case $mode in
    sub) sed "s|/usr/sbin/|$PREFIX/sbin/|" "$from" >"$to.new" && chmod 0644 "$to.new" ;;
    conf)
        if [ -e "$to" ] && ! cmp -s "$from" "$to"; then
            echo "kept the changed file $to; the default is $from"
            return 0
        fi
        install -m 0644 "$from" "$to.new"
        ;;
    *) install -m "$mode" "$from" "$to.new" ;;
    esac
    # A running program's file cannot be written, only replaced.
    mv -f "$to.new" "$to"
}

each() {
    list | while read -r mode from to; do
        "$1" "$mode" "$from" "$to"
    done
}

remove() {
    [ "$1" = conf ] || rm -f "$DESTDIR$3"
}

case ${1:-} in
"") ;;
--uninstall)
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
        systemctl disable --now overlayd.socket overlayd.service || true
    fi
    each remove
    for directory in "$UNITS/system/docker.service.d" "$UNITS/system/containerd.service.d" "$PREFIX/share/overlayd/monitoring" "$PREFIX/share/overlayd"; do
        rmdir "$DESTDIR$directory" 2>/dev/null || true
    done
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
    echo "removed; /etc/overlayd, /var/lib/overlayd and the data path are kept (run overlayd cleanup before to remove the overlay from the host)"
    exit 0
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

each put
mkdir -p "$DESTDIR/etc/overlayd/credentials"
chmod 0700 "$DESTDIR/etc/overlayd/credentials"
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    systemd-sysusers "$CONF/sysusers.d/overlayd.conf"
    systemd-tmpfiles --create "$CONF/tmpfiles.d/overlayd.conf"
    systemctl daemon-reload
    echo "installed; write /etc/overlayd/overlayd.toml, then: systemctl enable --now overlayd.socket overlayd.service"
else
    echo "installed below ${DESTDIR:-/}"
fi
