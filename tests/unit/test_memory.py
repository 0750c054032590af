"""The memory probe on recorded trees: a fake root with the files that the kernel would show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dualblade.errors import Unsupported
from dualblade.host.memory import (
    AUTO_RESERVE_BYTES,
    MemoryBudget,
    auto_budget_bytes,
    available_memory,
    find_memory_groups,
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
            f"total_mapped_file {mapped}\n",
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
    ) -> None:
        base = f"sys/fs/cgroup{path.rstrip('/')}"
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.high", f"{high}\n")
        self.write(f"{base}/memory.current", f"{usage}\n")
        self.write(
            f"{base}/memory.stat",
            f"anon 1\nactive_file {active}\ninactive_file {inactive}\nfile_mapped {mapped}\n",
        )

    def probe(self) -> MemoryBudget:
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
    real = Path.read_text

    def refuse(self: Path, *args: str, **kwargs: str) -> str:
        if self.name == "memory.current":  # root may read everything: a mode would not do
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    memory = tree.probe()
    assert memory.available_bytes == 8 * GIB
    assert "Permission denied" in memory.warnings[0]


def test_garbage_is_left_out_and_said(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", "soon")
    assert "left out" in tree.probe().warnings[0]


def test_groups_found_once_may_be_read_again(tree: Tree) -> None:
    tree.v2("/app")
    tree.v2_group("/app", 2 * GIB)
    groups = find_memory_groups(tree.root)
    tree.v2_group("/app", GIB)
    assert available_memory(tree.root, groups).available_bytes == GIB
    for name in ("memory.max", "memory.high"):  # the controller was taken away
        (tree.root / "sys/fs/cgroup/app" / name).unlink()
    assert available_memory(tree.root, groups).available_bytes == 8 * GIB


def test_no_proc_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="meminfo"):
        available_memory(tmp_path)
    assert find_memory_groups(tmp_path) == ()


def test_auto_leaves_a_reserve_and_takes_half() -> None:
    def budget(available: int) -> int:
        return auto_budget_bytes(
            MemoryBudget(
                available_bytes=available,
                source="test",
                machine_available_bytes=available,
                limits=(),
            )
        )

    assert budget(GIB) == (GIB - AUTO_RESERVE_BYTES) // 2
    assert budget(200 * MIB) == 75 * MIB
    assert budget(0) == 0


def test_this_machine_answers() -> None:
    memory = available_memory()
    assert 0 < memory.available_bytes <= memory.machine_available_bytes
    assert memory.warnings == ()


def test_process_memory_sees_what_is_touched() -> None:
    before = process_memory()
    block = bytearray(os.urandom(MIB)) * 64
    after = process_memory()
    assert len(block) == 64 * MIB
    assert after.anonymous_bytes - before.anonymous_bytes >= 60 * MIB
    assert after.peak_resident_bytes >= after.resident_bytes
    assert after.resident_bytes >= after.anonymous_bytes
