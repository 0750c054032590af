"""The memory probe on recorded trees: a fake root with the files that the kernel would show."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest

from dualblade.errors import Unsupported
from dualblade.host import groups
from dualblade.host.groups import find_memory_groups
from dualblade.host.memory import (
    AUTO_RESERVE_BYTES,
    MemoryProbe,
    MemoryReading,
    OwnMemory,
    auto_budget_bytes,
    available_memory,
    process_memory,
)
from dualblade.units import GIB, KIB, MIB

V1_NO_LIMIT = 9223372036854771712
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER_MOUNTS = (
    "23 1 254:0 / / rw,relatime - ext4 /dev/root rw\n"
    "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
)


class Tree:
    """Writes the files of one recorded machine under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meminfo(MemTotal=16 * GIB, MemAvailable=8 * GIB)
        self.write("proc/self/cgroup", "")
        self.write("proc/self/mountinfo", OTHER_MOUNTS)

    def write(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def meminfo(self, **fields: int) -> None:
        names = {"ActiveFile": "Active(file)", "InactiveFile": "Inactive(file)"}
        lines = [f"{names.get(k, k)}: {v // KIB:>10} kB\n" for k, v in fields.items()]
        self.write("proc/meminfo", "".join(lines) + "HugePages_Total:       0\n")

    def v1(self, own: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"5:cpu,cpuacct:/x\n4:memory:{own}\n0::/\n")
        self.write("proc/self/mountinfo", OTHER_MOUNTS + V1_MOUNT.format(root=mount_root))

    def v2(self, own: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{own}\n")
        self.write("proc/self/mountinfo", OTHER_MOUNTS + V2_MOUNT.format(root=mount_root))

    def v1_group(
        self,
        path: str,
        limit: int,
        usage: int = 0,
        *,
        hierarchical: int = V1_NO_LIMIT,
        active: int = 0,
        inactive: int = 0,
        mapped: int = 0,
        shared: int = 0,
        use_hierarchy: int = 1,
    ) -> None:
        base = f"sys/fs/cgroup/memory{path.rstrip('/')}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{base}/memory.use_hierarchy", f"{use_hierarchy}\n")
        self.write(
            f"{base}/memory.stat",
            "cache 0\nactive_file 7\ninactive_file 7\n"
            f"hierarchical_memory_limit {min(hierarchical, limit)}\n"
            f"total_active_file {active}\ntotal_inactive_file {inactive}\n"
            f"total_mapped_file {mapped}\ntotal_shmem {shared}\n",
        )

    def v2_group(
        self,
        path: str,
        limit: int | str,
        usage: int = 0,
        *,
        high: int | str = "max",
        active: int = 0,
        inactive: int = 0,
        mapped: int = 0,
        shared: int = 0,
    ) -> None:
        base = f"sys/fs/cgroup{path.rstrip('/')}"
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.high", f"{high}\n")
        self.write(f"{base}/memory.current", f"{usage}\n")
        self.write(
            f"{base}/memory.stat",
            f"anon 1\nshmem {shared}\nfile_mapped {mapped}\n"
            f"active_file {active}\ninactive_file {inactive}\n",
        )

    def probe(self) -> MemoryReading:
        return available_memory(self.root)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_cgroups_the_machine_decides(tree: Tree) -> None:
    memory = tree.probe()
    assert memory.available_bytes == memory.machine_available_bytes == 8 * GIB
    assert memory.limits == ()
    assert "MemAvailable" in memory.source


def test_mapped_file_pages_of_the_machine_are_not_spare(tree: Tree) -> None:
    tree.meminfo(MemAvailable=8 * GIB, ActiveFile=GIB, InactiveFile=GIB, Mapped=512 * MIB)
    assert tree.probe().available_bytes == 8 * GIB - 512 * MIB
    # 'Mapped' counts shared memory too, which is not in MemAvailable: never subtract more than
    # there are file pages.
    tree.meminfo(MemAvailable=8 * GIB, ActiveFile=MIB, InactiveFile=MIB, Mapped=512 * MIB)
    assert tree.probe().available_bytes == 8 * GIB - 2 * MIB


def test_old_kernels_have_no_memavailable(tree: Tree) -> None:
    tree.meminfo(MemFree=GIB, ActiveFile=GIB, InactiveFile=GIB, Mapped=512 * MIB)
    assert tree.probe().available_bytes == 3 * GIB - 512 * MIB


def test_v1_limit_less_usage_plus_reclaimable(tree: Tree) -> None:
    tree.v1("/a")
    tree.v1_group("/", V1_NO_LIMIT)
    tree.v1_group("/a", 2 * GIB, GIB, active=300 * MIB, inactive=200 * MIB, mapped=100 * MIB)
    memory = tree.probe()
    assert memory.available_bytes == GIB + 400 * MIB
    assert [limit.path for limit in memory.limits] == ["/a"]
    assert "cgroup /a (v1)" in memory.source


def test_v1_the_huge_no_limit_number_is_no_limit(tree: Tree) -> None:
    tree.v1("/a")
    tree.v1_group("/a", V1_NO_LIMIT, 3 * GIB)
    tree.v1_group("/", V1_NO_LIMIT, 5 * GIB)
    assert tree.probe().limits == ()


def test_v1_an_enclosing_group_may_be_tighter(tree: Tree) -> None:
    tree.v1("/outer/inner")
    tree.v1_group("/", V1_NO_LIMIT)
    tree.v1_group("/outer", 3 * GIB, 2 * GIB + 512 * MIB)
    tree.v1_group("/outer/inner", 2 * GIB, 100 * MIB)
    memory = tree.probe()
    assert memory.available_bytes == 512 * MIB
    assert [limit.path for limit in memory.limits] == ["/outer/inner", "/outer"]
    assert "/outer (v1)" in memory.source


def test_v1_without_hierarchy_an_ancestor_does_not_bind(tree: Tree) -> None:
    tree.v1("/outer/inner")
    tree.v1_group("/outer", 64 * MIB, 64 * MIB, use_hierarchy=0)
    tree.v1_group("/outer/inner", 2 * GIB, use_hierarchy=0)
    assert tree.probe().available_bytes == 2 * GIB


def test_v1_a_limit_above_the_mount_is_known_through_the_hierarchy(tree: Tree) -> None:
    tree.v1("/docker/abc", mount_root="/docker/abc")
    tree.v1_group("/", V1_NO_LIMIT, 100 * MIB, hierarchical=GIB)
    memory = tree.probe()
    assert memory.available_bytes == GIB - 100 * MIB
    assert memory.limits[0].limit_name == "hierarchical_memory_limit"


def test_v2_max_means_no_limit(tree: Tree) -> None:
    tree.v2("/user.slice/app")
    tree.v2_group("/user.slice", "max", GIB)
    tree.v2_group("/user.slice/app", "max", GIB)
    assert tree.probe().limits == ()


def test_v2_nested_limits_take_the_least_that_is_left(tree: Tree) -> None:
    tree.v2("/user.slice/app")
    tree.v2_group("/user.slice", 4 * GIB, 4 * GIB, active=GIB, inactive=GIB, mapped=512 * MIB)
    tree.v2_group("/user.slice/app", 3 * GIB, GIB)
    memory = tree.probe()
    assert memory.available_bytes == GIB + 512 * MIB
    assert "/user.slice (v2)" in memory.source


def test_v2_high_counts_as_a_limit(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", 4 * GIB, GIB, high=2 * GIB)
    assert tree.probe().available_bytes == GIB
    assert tree.probe().limits[0].limit_name == "memory.high"


def test_over_its_limit_there_is_nothing_left(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", GIB, 2 * GIB)
    assert tree.probe().available_bytes == 0
    assert auto_budget_bytes(tree.probe()) == 0


def test_hybrid_machines_have_both_versions(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/a\n0::/b\n")
    mounts = V1_MOUNT.format(root="/") + V2_MOUNT.format(root="/").replace(
        "/sys/fs/cgroup ", "/sys/fs/cgroup/unified "
    )
    tree.write("proc/self/mountinfo", OTHER_MOUNTS + mounts)
    tree.v1_group("/", V1_NO_LIMIT)
    tree.v1_group("/a", GIB)
    tree.write("sys/fs/cgroup/unified/b/cgroup.procs", "")
    memory = tree.probe()
    assert memory.available_bytes == GIB
    assert memory.warnings == ()
    assert [(g.version, g.path) for g in find_memory_groups(tree.root)] == [
        (1, "/a"),
        (1, "/"),
        (2, "/b"),
        (2, "/"),
    ]


@pytest.mark.parametrize("is_first", [True, False])
def test_the_hosts_tree_in_a_container_hides_no_limit(tree: Tree, *, is_first: bool) -> None:
    """With -v /:/host the host's cgroups are there too, from outside our namespace."""
    tree.v2("/")
    tree.v2_group("/", GIB, 2 * GIB)
    mounts = [
        V2_MOUNT.format(root="/"),
        V2_MOUNT.format(root="/../..").replace("/sys/fs/cgroup ", "/host/sys/fs/cgroup "),
    ]
    ordered = mounts[::-1] if is_first else mounts
    tree.write("proc/self/mountinfo", OTHER_MOUNTS + "".join(ordered))
    assert [str(g.directory) for g in find_memory_groups(tree.root)] == [
        str(tree.root / "sys/fs/cgroup")
    ]


def test_a_later_mount_of_another_group_hides_not_ours(tree: Tree) -> None:
    """Somebody's bind mount of one group, where our path is not below it."""
    tree.v2("/mine")
    tree.v2_group("/", 8 * GIB)
    tree.v2_group("/mine", GIB)
    other = V2_MOUNT.format(root="/other.service").replace("/sys/fs/cgroup ", "/mnt/x ")
    tree.write("proc/self/mountinfo", OTHER_MOUNTS + V2_MOUNT.format(root="/") + other)
    assert [g.path for g in find_memory_groups(tree.root)] == ["/mine", "/"]


@pytest.mark.parametrize("own", ["/", "/../other", "/docker/not-below-this-mount"])
def test_in_a_namespace_the_top_of_the_mount_is_ours(tree: Tree, own: str) -> None:
    tree.v2(own)
    tree.v2_group("/", 2 * GIB, GIB)
    memory = tree.probe()
    assert memory.available_bytes == GIB
    assert [limit.path for limit in memory.limits] == ["/"]


def test_without_a_namespace_only_the_own_group_may_be_mounted(tree: Tree) -> None:
    tree.v2("/docker/abc/child", mount_root="/docker/abc")
    tree.v2_group("/child", GIB)
    tree.v2_group("/", 3 * GIB)
    assert [limit.path for limit in tree.probe().limits] == ["/child", "/"]


def test_a_mount_point_with_a_space(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/\n")
    tree.write("proc/self/mountinfo", r"30 23 0:26 / /my\040cg rw - cgroup2 cgroup2 rw" + "\n")
    tree.write("my cg/memory.max", str(GIB))
    tree.write("my cg/memory.current", "0")
    tree.write("my cg/memory.stat", "anon 0\n")
    assert tree.probe().available_bytes == GIB
    mounts = tree.root / "proc/self/mountinfo"
    mounts.write_bytes(mounts.read_bytes() + b"31 23 8:1 / /mnt/Donn\xe9es rw - vfat d rw\n")
    assert tree.probe().available_bytes == GIB


def test_missing_files_are_left_out_and_said(tree: Tree) -> None:
    tree.v1("/a")
    tree.v1_group("/", 3 * GIB)
    tree.v1_group("/a", GIB)
    (tree.root / "sys/fs/cgroup/memory/a/memory.usage_in_bytes").unlink()
    memory = tree.probe()
    assert memory.available_bytes == 3 * GIB
    assert len(memory.warnings) == 1
    assert "cgroup /a (v1) left out" in memory.warnings[0]


def test_unreadable_files_are_left_out_and_said(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.v2("/app")
    tree.v2_group("/app", GIB)
    real = groups.read_file

    def refuse(path: Path) -> str:
        if path.name == "memory.current":  # root may read everything: a mode would not do
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(groups, "read_file", refuse)
    memory = tree.probe()
    assert memory.available_bytes == 8 * GIB
    assert "Permission denied" in memory.warnings[0]


def test_garbage_is_left_out_and_said(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", "soon")
    assert "left out" in tree.probe().warnings[0]


def test_a_probe_sees_limits_change_and_go(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", 2 * GIB)
    probe = MemoryProbe(tree.root)
    assert probe.read().available_bytes == 2 * GIB
    tree.v2_group("/app", GIB)
    assert probe.read().available_bytes == GIB
    for name in ("memory.max", "memory.high"):  # the controller was taken away
        (tree.root / "sys/fs/cgroup/app" / name).unlink()
    assert probe.read().available_bytes == 8 * GIB


def test_a_probe_follows_a_process_that_was_moved(tree: Tree) -> None:
    tree.v1("/a")
    tree.v1_group("/a", 2 * GIB)
    tree.v1_group("/b", GIB)
    probe = MemoryProbe(tree.root)
    assert probe.read().available_bytes == 2 * GIB
    tree.v1("/b")
    assert probe.read().available_bytes == GIB


def test_a_group_that_vanishes_is_said_once_and_looked_for_again(tree: Tree) -> None:
    tree.v1("/a")
    tree.v1_group("/", 3 * GIB)
    tree.v1_group("/a", GIB)
    probe = MemoryProbe(tree.root)
    assert probe.read().available_bytes == GIB
    shutil.rmtree(tree.root / "sys/fs/cgroup/memory/a")
    gone = probe.read()
    assert (gone.available_bytes, len(gone.warnings)) == (3 * GIB, 1)
    again = probe.read()
    assert (again.available_bytes, again.warnings) == (3 * GIB, ())


def test_our_page_cache_counts_once(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", 2 * GIB, 2 * GIB, inactive=GIB, mapped=100 * MIB)
    alone = tree.probe()
    ours = MemoryProbe(tree.root).read(OwnMemory(page_cache_bytes=512 * MIB))
    assert ours.available_bytes == alone.available_bytes == GIB - 100 * MIB
    assert ours.binding is not None
    assert ours.binding.ours_bytes == 512 * MIB
    assert "512 MiB of that our store's" in ours.source


@pytest.mark.parametrize("version", [1, 2])
def test_mapped_shared_memory_does_not_hide_our_page_cache(tree: Tree, version: int) -> None:
    """'Mapped' counts shared memory, which is no file page: 1000 - 800 would be 200."""
    figures = {"active": 400 * MIB, "inactive": 600 * MIB, "mapped": 800 * MIB}
    if version == 1:
        tree.v1("/app")
        tree.v1_group("/app", 2 * GIB, 2 * GIB, shared=800 * MIB, **figures)
    else:
        tree.v2("/app")
        tree.v2_group("/app", 2 * GIB, 2 * GIB, shared=800 * MIB, **figures)
    probe = MemoryProbe(tree.root)
    assert probe.read().available_bytes == 200 * MIB
    assert probe.read(OwnMemory(page_cache_bytes=600 * MIB)).available_bytes == 600 * MIB


def test_mapped_weights_are_never_taken_for_our_page_cache(tree: Tree) -> None:
    """A store whose pages another group is charged for adds nothing here."""
    tree.v2("/app")
    tree.v2_group("/app", 2 * GIB, 2 * GIB, active=GIB, mapped=GIB)
    own = OwnMemory(page_cache_bytes=512 * MIB)
    assert MemoryProbe(tree.root).read(own).available_bytes == 0


def test_our_staging_is_ours_and_the_reserve_is_not(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", 2 * GIB, GIB)
    probe = MemoryProbe(tree.root, reserve_bytes=100 * MIB)
    memory = probe.read(OwnMemory(fixed_bytes=300 * MIB))
    assert memory.available_bytes == GIB
    assert memory.budget_bytes == GIB + 300 * MIB - 100 * MIB
    usual = MemoryProbe(tree.root).read()
    assert usual.reserve_bytes == AUTO_RESERVE_BYTES
    tree.v2_group("/app", 2 * GIB, 2 * GIB - 200 * MIB)
    assert MemoryProbe(tree.root).read().reserve_bytes == 50 * MIB
    assert MemoryProbe(tree.root, reserve_bytes=GIB).read().budget_bytes == 0


def test_swap_and_huge_pages_set_aside_are_not_memory_to_use(tree: Tree) -> None:
    """The kernel keeps huge pages out of MemAvailable; swap is in none of the figures."""
    tree.meminfo(MemTotal=16 * GIB, MemFree=9 * GIB, MemAvailable=GIB, Hugetlb=8 * GIB)
    tree.v1("/a")
    tree.v1_group("/a", 2 * GIB)
    tree.write("sys/fs/cgroup/memory/a/memory.memsw.limit_in_bytes", f"{8 * GIB}")
    tree.write("proc/swaps", "Filename Type Size Used Priority\n/swap file 8388604 0 -2\n")
    memory = tree.probe()
    assert (memory.available_bytes, memory.binding) == (GIB, None)


PSI = "some avg10={avg} avg60=0.00 avg300=0.00 total={some}\nfull avg10=0.00 avg60=0 total=1\n"


def test_pressure_is_that_of_the_limit_that_binds(tree: Tree) -> None:
    assert tree.probe().pressure is None
    tree.write("proc/pressure/memory", PSI.format(avg="1.50", some=2_500_000))
    machine = tree.probe().pressure
    assert machine is not None
    assert (machine.some_seconds, machine.full_seconds, machine.some_percent) == (2.5, 1e-6, 1.5)
    tree.v1("/a")
    tree.v1_group("/a", GIB)
    assert tree.probe().pressure is None  # v1 has none, and the machine's is not about our limit
    tree.v2("/app")
    tree.v2_group("/app", 2 * GIB)
    tree.write("sys/fs/cgroup/app/memory.pressure", PSI.format(avg="0.00", some=7_000_000))
    assert tree.probe().group_pressure is None  # without cgroup.events it is the root
    tree.write("sys/fs/cgroup/app/cgroup.events", "populated 1\nfrozen 0\n")
    memory = tree.probe()
    assert memory.pressure is memory.group_pressure
    assert memory.pressure is not None
    assert memory.pressure.some_seconds == 7.0
    assert memory.machine_pressure is not None
    tree.write("sys/fs/cgroup/app/memory.pressure", "off")
    assert tree.probe().group_pressure is None


def test_pressure_of_a_neighbour_at_its_own_limit_is_not_ours(tree: Tree) -> None:
    """The machine counts it, too; but with memory free nobody waits for ours."""
    tree.write("proc/pressure/memory", PSI.format(avg="60.00", some=2_500_000))
    tree.meminfo(MemTotal=16 * GIB, MemFree=2 * GIB, MemAvailable=8 * GIB)
    assert tree.probe().machine_pressure is not None
    assert tree.probe().pressure is None
    tree.meminfo(MemTotal=16 * GIB, MemFree=128 * MIB, MemAvailable=8 * GIB)
    assert tree.probe().pressure is not None


def test_no_proc_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="meminfo"):
        available_memory(tmp_path)
    assert find_memory_groups(tmp_path) == ()


def test_auto_takes_what_there_is_less_the_reserve(tree: Tree) -> None:
    def budget(available: int) -> int:
        tree.v2("/app")
        tree.v2_group("/app", 8 * GIB, 8 * GIB - available)
        return auto_budget_bytes(tree.probe())

    assert budget(2 * GIB) == 2 * GIB - AUTO_RESERVE_BYTES
    assert budget(200 * MIB) == 150 * MIB
    assert budget(0) == 0


def test_this_machine_answers() -> None:
    memory = available_memory()
    assert 0 < memory.available_bytes <= memory.machine_available_bytes
    assert memory.warnings == ()


def test_process_memory_sees_what_is_touched() -> None:
    before = process_memory()
    with mmap.mmap(-1, 64 * MIB) as block:  # never of memory that the process has already
        block.write(os.urandom(MIB) * 64)
        after = process_memory()
    assert after.anonymous_bytes - before.anonymous_bytes >= 60 * MIB
    assert after.peak_resident_bytes >= after.resident_bytes
    assert after.resident_bytes >= after.anonymous_bytes


def test_a_group_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cgroup"
    file.write_bytes(b"0::/caf\xe9\n")
    assert groups.read_file(file) == "0::/caf\udce9\n"
