#!/usr/bin/env bash
# What the lab boots, made once in build/lab: Debian cloud kernels (NVMe built in), each with the
# modules that make a drive part of something else (dm, md), and an initramfs of one busybox, with the
# modules of virtiofs where it is not built in.
# Needs qemu, virtiofsd, busybox-static, cpio, xz, zstd, lz4 (scripts/system_packages tests).
set -euo pipefail
cd "$(dirname "$0")/../.."
lab=${DUALBLADE_LAB_CACHE:-$PWD/build/lab}
mkdir -p "$lab"
exec 9>"$lab/lock"
flock 9

# In the order in which they are loaded.
virtiofs=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci fuse virtiofs)

# newest: of those that Debian 12 and its backports have; stable: Debian 12's own, 6.1.
declare -A metas=(
  [newest]="linux-image-6.12-cloud-amd64 linux-image-cloud-amd64"
  [stable]="linux-image-cloud-amd64"
)
for name in "${!metas[@]}"; do
  kernel=$lab/$name
  [[ ! -f $kernel/vmlinux || ! -d $kernel/modules ]] || continue
  mkdir -p "$kernel"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  find_package() {
    for meta in ${metas[$name]}; do
      package=$(apt-cache depends "$meta" 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
      [[ -z $package ]] || return 0
    done
    return 1
  }
  find_package || { apt-get update -qq && find_package; }
  (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x ./*.deb kernel)
  # Uncompressed, it boots by PVH and need not unpack itself under emulation.
  python3 tests/lab/unpack_kernel.py "$work"/kernel/boot/vmlinuz-* "$kernel/vmlinux.new"
  mv "$kernel/vmlinux.new" "$kernel/vmlinux"
  rm -rf "$kernel/modules.new" && mkdir "$kernel/modules.new"
  for module in dm-mod md-mod raid1 "${virtiofs[@]}"; do
    find "$work/kernel" -name "$module.ko*" -exec cp {} "$kernel/modules.new/" \;
  done
  find "$kernel/modules.new" -name '*.xz' -exec unxz -q {} +
  mv "$kernel/modules.new" "$kernel/modules"
  rm -rf "$work"
done

for name in "${!metas[@]}"; do
  kernel=$lab/$name
  [[ ! -f $kernel/initrd.gz || tests/lab/init.sh -nt $kernel/initrd.gz ]] || continue
  root=$(mktemp -d)
  mkdir -p "$root"/{bin,proc,sys,dev,host,out,modules}
  cp /bin/busybox "$root/bin/"
  for number in "${!virtiofs[@]}"; do
    module=$kernel/modules/${virtiofs[number]}.ko
    [[ ! -f $module ]] || cp "$module" "$root/modules/$number.ko"
  done
  install -m 755 tests/lab/init.sh "$root/init"
  (cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$kernel/initrd.new"
  mv "$kernel/initrd.new" "$kernel/initrd.gz"
  rm -rf "$root"
done
