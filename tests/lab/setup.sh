#!/usr/bin/env bash
# What the lab boots, made once in build/lab: a Debian cloud kernel (NVMe and virtiofs built in), the
# modules that make a drive part of something else (dm, md), and an initramfs of one busybox. Needs qemu, virtiofsd, busybox-static, cpio, xz (scripts/system_packages tests).
set -euo pipefail
cd "$(dirname "$0")/../.."
lab=${DUALBLADE_LAB_CACHE:-$PWD/build/lab}
mkdir -p "$lab"
exec 9>"$lab/lock"
flock 9

if [[ ! -f $lab/vmlinux || ! -d $lab/modules ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  find_package() {
    for meta in linux-image-6.12-cloud-amd64 linux-image-cloud-amd64; do
      package=$(apt-cache depends "$meta" 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
      [[ -z $package ]] || return 0
    done
    return 1
  }
  find_package || { apt-get update -qq && find_package; }
  (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x ./*.deb kernel)
  # Uncompressed, it boots by PVH and need not unpack itself under emulation.
  python3 tests/lab/unpack_kernel.py "$work"/kernel/boot/vmlinuz-* "$lab/vmlinux.new"
  mv "$lab/vmlinux.new" "$lab/vmlinux"
  rm -rf "$lab/modules.new" && mkdir "$lab/modules.new"
  for module in dm-mod md-mod raid1; do
    find "$work/kernel" -name "$module.ko*" -exec cp {} "$lab/modules.new/" \;
  done
  unxz -q "$lab"/modules.new/*.xz
  mv "$lab/modules.new" "$lab/modules"
fi

if [[ ! -f $lab/initrd.gz || tests/lab/init.sh -nt $lab/initrd.gz ]]; then
  root=$(mktemp -d)
  mkdir -p "$root"/{bin,proc,sys,dev,host,out}
  cp /bin/busybox "$root/bin/"
  install -m 755 tests/lab/init.sh "$root/init"
  (cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$lab/initrd.new"
  mv "$lab/initrd.new" "$lab/initrd.gz"
  rm -rf "$root"
fi
