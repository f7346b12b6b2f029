#!/bin/bash
# Builds the packages: overlayd_VERSION_ARCH.deb and overlayd-VERSION-linux-ARCH.tar.gz, with their checksums, into target/package.
#
#   ./deploy/package.sh                    release binaries
#   PROFILE=dev ./deploy/package.sh        debug binaries, for the tests: built in a minute
#   VERSION=0.1.0+lab2 ./deploy/package.sh another version of the package
#   OUT=DIR ./deploy/package.sh            into another directory
#
# Builds are reproducible: times are those of the last commit (SOURCE_DATE_EPOCH), file order and owners are fixed, and release binaries
# contain no path of this machine. Needs cargo and Debian's protobuf-compiler, libprotobuf-dev and dpkg-dev; the first run builds cargo-deb
# in the version below.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022

CARGO_DEB=3.8.0
PROFILE=${PROFILE:-release}
OUT=${OUT:-target/package}
root=$PWD
export LC_ALL=C TZ=UTC

if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null) || SOURCE_DATE_EPOCH=$(stat -c %Y CHANGELOG.md)
fi
export SOURCE_DATE_EPOCH
VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)}
arch=$(dpkg --print-architecture)

for program in cargo protoc dpkg-shlibdeps strip gzip; do
    if ! command -v "$program" >/dev/null; then
        echo "deploy/package.sh: $program is missing: install Rust with rustup, and the packages protobuf-compiler libprotobuf-dev dpkg-dev binutils" >&2
        exit 1
    fi
done

# Converts CHANGELOG.md to the format of deb-changelog(5).
changelog() {
    local date
    date=$(date -u -R -d "@$SOURCE_DATE_EPOCH")
    awk -v version="$VERSION" -v date="$date" '
        function close_entry() { if (open) printf "\n -- overlayd developers <overlayd@localhost>  %s\n\n", date }
        /^## / { close_entry(); split($2, v, ","); printf "overlayd (%s) unstable; urgency=medium\n\n", open ? v[1] : version; open = 1; next }
        open && /^- / { sub(/^- /, "  * "); print; next }
        open && /^  [^ ]/ { print "  " $0 }
        END { close_entry() }' CHANGELOG.md
}

echo "== programs ($PROFILE)"
case $PROFILE in
release)
    # A separate directory, because other flags give other objects.
    export CARGO_TARGET_DIR=$root/target/package-build
    export RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$root=/usr/src/overlayd --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/usr/src/cargo"
    built=$CARGO_TARGET_DIR/release
    ;;
dev) built=${CARGO_TARGET_DIR:-$root/target}/debug ;;
*) echo "deploy/package.sh: PROFILE is release or dev, not $PROFILE" >&2 && exit 2 ;;
esac
cargo build --locked --profile "$PROFILE" -p overlay-agent -p overlayctl
# The plugin runs for some milliseconds per container: static linking saves a third of a millisecond of library loading.
cargo rustc --locked --profile "$PROFILE" -p overlayctl --bin overlay-cni -- -C target-feature=+crt-static
unset RUSTFLAGS

echo "== files"
stage=$root/target/package-stage
rm -rf "$stage"
files=$stage/overlayd-$VERSION
mkdir -p "$files/bin" "$files/completions" "$OUT"
for program in overlayd overlayctl overlay-cni; do
    install -m 0755 "$built/$program" "$files/bin/"
done
for program in "$files"/bin/*; do
    strip --strip-unneeded --remove-section=.comment --remove-section=.note "$program"
done
"$built/overlayctl" man --dir "$files/man"
find "$files/man" -type f -exec gzip -9n {} +
"$built/overlayctl" completions bash >"$files/completions/overlayctl.bash"
"$built/overlayctl" completions zsh >"$files/completions/_overlayctl"
"$built/overlayctl" completions fish >"$files/completions/overlayctl.fish"
cp -r deploy/systemd deploy/overlayd.toml deploy/install.sh deploy/etcd deploy/docker deploy/monitoring README.md CHANGELOG.md LICENSE docs "$files/"
find "$stage" -type d -exec chmod 0755 {} +
SOURCE=$files DESTDIR=$stage/deb PREFIX=/usr "$files/install.sh"
mkdir -p "$stage/deb/usr/share/doc/overlayd"
cp README.md "$stage/deb/usr/share/doc/overlayd/"
cp -r docs deploy/etcd "$stage/deb/usr/share/doc/overlayd/"
changelog >"$stage/changelog"
find "$stage" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

echo "== tarball"
tarball=$OUT/overlayd-$VERSION-linux-$arch.tar.gz
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=gnu -C "$stage" -cf - "overlayd-$VERSION" |
    gzip -9n >"$tarball"

echo "== .deb"
tools=$root/target/package-tools
if [ "$("$tools/bin/cargo-deb" --version 2>/dev/null)" != "cargo-deb $CARGO_DEB" ]; then
    CARGO_TARGET_DIR=$tools/build cargo install cargo-deb --locked --version $CARGO_DEB --root "$tools"
    rm -rf "$tools/build"
fi
deb=$OUT/overlayd_${VERSION}_$arch.deb
if [ "$PROFILE" = dev ]; then compression=(--compress-type xz --fast); else compression=(--compress-type xz); fi
PATH=$tools/bin:$PATH CARGO_TARGET_DIR=$stage/cargo-deb cargo deb --quiet "${compression[@]}" --no-build --no-strip -p overlay-agent --deb-version "$VERSION" --output "$deb"
# install.sh and agent/Cargo.toml both list the installed files: every file of install.sh must be in the package.
forgotten=$(comm -23 <(cd "$stage/deb" && find . -type f | sort) <(dpkg-deb --fsys-tarfile "$deb" | tar -t | sort))
if [ -n "$forgotten" ]; then
    echo "deploy/package.sh: not in the .deb, see its assets in agent/Cargo.toml:" "$forgotten" >&2
    exit 1
fi

(cd "$OUT" && sha256sum "$(basename "$deb")" "$(basename "$tarball")" | tee "overlayd-$VERSION-$arch.sha256")
