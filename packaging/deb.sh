#!/bin/sh
# usage: packaging/deb.sh [FOLDER]     makes FOLDER/tidegate_VERSION_ARCHITECTURE.deb (dist/), for this machine's Python
# Needs python3 with venv, and dpkg-deb; COMPRESSION='-Zgzip -z1' is quicker and larger. The same source gives the same bytes: times are those of the last commit.
set -eu
out=${1:-dist}
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-/usr/bin/python3} && export PYTHON
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)} && export SOURCE_DATE_EPOCH
wheels=.build/wheels-deb
packaging/wheels.sh $wheels '[ingest]'
tree=$(mktemp -d) && trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"

"$PYTHON" -c 'import sys; print("%d %d" % sys.version_info[:2])' >"$tree/python"
read -r major minor <"$tree/python" && rm "$tree/python"
"$(echo .build/wheel-tools-*/bin/python | tr ' ' '\n' | grep -F "$major.$minor/")" -m pip -q --disable-pip-version-check install \
    --no-index --find-links $wheels --no-compile --target "$tree/usr/lib/tidegate" "tidegate[ingest]"
rm -rf "$tree/usr/lib/tidegate/bin"
find "$tree/usr/lib/tidegate" \( -name direct_url.json -o -name REQUESTED -o -name tests -o -name '*.pyi' \) -prune -exec rm -r {} +
find "$tree/usr/lib/tidegate" -name RECORD -path '*.dist-info/*' -exec rm {} +

mkdir -p "$tree/usr/bin" "$tree/usr/lib/systemd/system" "$tree/usr/lib/sysusers.d" "$tree/usr/lib/tmpfiles.d" \
    "$tree/usr/share/doc/tidegate/examples" "$tree/usr/share/lintian/overrides" "$tree/DEBIAN"
cat >"$tree/usr/bin/tidegate" <<END
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/usr/lib/tidegate")
from gateway.cli import main  # noqa: E402

main()
END
cp systemd/tidegate-gateway.service systemd/tidegate-gateway@.service systemd/tidegate-ingest.service "$tree/usr/lib/systemd/system/"
cp systemd/tidegate.sysusers.conf "$tree/usr/lib/sysusers.d/tidegate.conf"
cp systemd/tidegate.tmpfiles.conf "$tree/usr/lib/tmpfiles.d/tidegate.conf"
cp config/gateway.toml config/ingest.toml "$tree/usr/share/doc/tidegate/examples/"
cp packaging/debian/copyright.in "$tree/usr/share/doc/tidegate/copyright"
gzip -9nc CHANGELOG.md >"$tree/usr/share/doc/tidegate/NEWS.md.gz"
cp packaging/debian/lintian-overrides "$tree/usr/share/lintian/overrides/tidegate"

version=$(basename $wheels/tidegate-*.whl | cut -d- -f2)
architecture=$(dpkg --print-architecture)
printf 'tidegate (%s) unstable; urgency=medium\n\n  * What has changed for users: NEWS.md.gz\n\n -- %s  %s\n' "$version" \
    "$(sed -n 's/^Maintainer: //p' packaging/debian/control.in)" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" |
    gzip -9nc >"$tree/usr/share/doc/tidegate/changelog.gz"
find "$tree" -type d -exec chmod 755 {} + && find "$tree" -type f -exec chmod 644 {} + && chmod 755 "$tree/usr/bin/tidegate"
sed -e "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@PYTHON@/$major.$minor/" \
    -e "s/@PYTHON_NEXT@/$major.$((minor + 1))/; s/@SIZE@/$(du -sk --apparent-size "$tree/usr" | cut -f1)/" \
    packaging/debian/control.in >"$tree/DEBIAN/control"
(cd "$tree" && find usr -type f | LC_ALL=C sort | xargs -d '\n' md5sum >DEBIAN/md5sums)
for script in postinst prerm postrm; do
    cp packaging/debian/$script "$tree/DEBIAN/$script" && chmod 755 "$tree/DEBIAN/$script"
done
find "$tree" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group --threads-max=1 ${COMPRESSION:--Zxz -z4} --build "$tree" "$out/tidegate_${version}_$architecture.deb" >/dev/null
echo "$out/tidegate_${version}_$architecture.deb"
