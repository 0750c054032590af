#!/bin/busybox sh
# The guest's first process: the host's root, read-only, becomes its own; then the command on the
# share runs, and its exit status goes back by the same way.
/bin/busybox --install -s /bin
mount -t proc p /proc
mount -t sysfs s /sys
mount -t devtmpfs d /dev 2>/dev/null
for module in /modules/*.ko; do [ ! -f $module ] || insmod $module; done
mount -t virtiofs -o ro host /host
mount -t virtiofs out /out
for folder in proc sys dev; do mount --bind /$folder /host/$folder; done
mkdir -p /host/dev/pts /host/dev/shm
mount -t devpts p /host/dev/pts
mount -t tmpfs s /host/dev/shm
mount -t tmpfs -o size=40% r /host/run
mount -t cgroup2 c /host/sys/fs/cgroup
mount --bind /out /host/mnt
ip link set lo up
chroot /host /bin/bash --login /mnt/command.sh
echo $? >/out/status
sync
poweroff -f
