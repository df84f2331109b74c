"""What the system and the environment allow: CPU quotas of cgroups, wherever they stand, and a tier that is asked for.

The files of the cgroups are read from a tree of the test's own, or, where the kernel lets an ordinary user mount, from
the real places.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastblock
from fastblock._core import _quota_cpus

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cgroups are Linux's")

V1 = "36 31 0:29 {top} {at} rw,nosuid shared:9 master:1 - cgroup cgroup rw,{controllers}"
V2 = "30 25 0:26 {top} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = """\
22 28 0:20 / /proc rw,nosuid shared:14 - proc proc rw
28 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
29 28 0:25 / /sys/fs/cgroup ro shared:8 - tmpfs tmpfs ro,mode=755
40 29 0:33 / /sys/fs/cgroup/cpuset rw shared:13 - cgroup cgroup rw,cpuset
41 29 0:34 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=cpu
"""


def v1(at="/sys/fs/cgroup/cpu", top="/", controllers="cpu"):
    return V1.format(at=at, top=top, controllers=controllers) + "\n"


def v2(at="/sys/fs/cgroup", top="/"):
    return V2.format(at=at, top=top) + "\n"


def quota_v1(folder, quota, period="100000"):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


def quota_v2(folder, text):
    return {f"{folder}/cpu.max": f"{text}\n"}


def make(root, groups, mounts, files):
    """A tree with these files and what the kernel says of the process; None: no such file."""
    for name, text in {"/proc/self/cgroup": groups, "/proc/self/mountinfo": mounts, **files}.items():
        if text is not None:
            path = root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())


CPU, BOTH, ROOT = "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup"
NESTED_V1 = {**quota_v1(f"{CPU}/a/b", 300000), **quota_v1(f"{CPU}/a", 100000), **quota_v1(CPU, -1)}
NESTED_V2 = {**quota_v2(f"{ROOT}/a/b", "300000 100000"), **quota_v2(f"{ROOT}/a", "100000 100000")}
TREES = {
    # name: (CPUs, /proc/self/cgroup, mounts, files)
    "v1, cpu": (2, "4:cpu:/a\n0::/x\n", v1(), quota_v1(f"{CPU}/a", 150000)),
    "v1, cpu,cpuacct": (2, "11:cpu,cpuacct:/a\n", v1(BOTH, controllers="cpu,cpuacct"), quota_v1(f"{BOTH}/a", 200000)),
    "v1, cpuacct,cpu": (2, "11:cpuacct,cpu:/a\n", v1(BOTH, controllers="cpuacct,cpu"), quota_v1(f"{BOTH}/a", 200000)),
    "v1, at the root": (3, "4:cpu:/\n", v1(), quota_v1(CPU, 250000)),
    "v1, another period": (3, "4:cpu:/a\n", v1(), quota_v1(f"{CPU}/a", 25000, 10000)),
    "v1, nested, the outer one": (1, "4:cpu:/a/b\n", v1(), NESTED_V1),
    "v1, nested, the inner one": (3, "4:cpu:/a/b\n", v1(), {**NESTED_V1, **quota_v1(f"{CPU}/a", 900000)}),
    "v1, of another group": (0, "4:cpu:/c\n2:cpuset:/a\n1:name=cpu:/a\n", v1(), NESTED_V1),
    "v1, none": (0, "4:cpu:/a\n", v1(), quota_v1(f"{CPU}/a", -1)),
    "v1, a container's own group as the root": (2, "4:cpu:/docker/1/a\n", v1(top="/docker/1"), quota_v1(CPU, 200000)),
    "v1, inside a container": (1, "4:cpu:/docker/1/a\n", v1(top="/docker/1"), quota_v1(f"{CPU}/a", 100000)),
    "v1, a mount that does not show it": (2, "4:cpu:/docker/12\n", v1(top="/docker/1"), quota_v1(CPU, 200000)),
    "v1, one mount of two shows it": (
        4, "4:cpu:/a\n", v1("/other", top="/b") + v1(), {**quota_v1("/other", 100000), **quota_v1(CPU, 400000)},
    ),
    "v2": (2, "0::/a\n", v2(), quota_v2(f"{ROOT}/a", "150000 100000")),
    "v2, at the root": (1, "0::/\n", v2(), quota_v2(ROOT, "100000 100000")),
    "v2, nested, the outer one": (1, "0::/a/b\n", v2(), NESTED_V2),
    "v2, nested, the inner one": (3, "0::/a/b\n", v2(), {**NESTED_V2, **quota_v2(f"{ROOT}/a", "max 100000")}),
    "v2, a level without the file": (1, "0::/a/b/c\n", v2(), NESTED_V2),
    "v2, max": (0, "0::/a\n", v2(), quota_v2(f"{ROOT}/a", "max 100000")),
    "v2, of another group": (0, "0::/ab\n", v2(), NESTED_V2),
    "v2, a removed group": (1, "0::/a/b/gone (deleted)\n", v2(), NESTED_V2),
    "v2, a name with colons": (2, "0::/a:b:c\n", v2(), quota_v2(f"{ROOT}/a:b:c", "200000 100000")),
    "v2, a name with a space": (2, "0::/my group\n", v2(), quota_v2(f"{ROOT}/my group", "200000 100000")),
    "v2, escapes": (2, "0::/g h/i\n", v2(r"/mnt/c\040\134d", r"/g\040h"), quota_v2("/mnt/c \\d/i", "200000 100000")),
    "v2, mounted elsewhere": (2, "0::/a\n", v2("/mnt"), quota_v2("/mnt/a", "200000 100000")),
    "v2, mounted at /": (2, "0::/a\n", v2("/"), quota_v2("/a", "200000 100000")),
    "namespace": (2, "0::/\n", v2(top="/.."), quota_v2(ROOT, "200000 100000")),
    "namespace, mounted outside": (2, "0::/../b\n", v2(top="/.."), quota_v2(f"{ROOT}/b", "200000 100000")),
    "namespace, the process is outside": (
        0, "0::/../b\n", v2(), {**quota_v2("/sys/fs/b", "200000 100000"), **quota_v2("/sys/fs", "100000 100000")},
    ),
    "namespace, no way out of the mount": (0, "0::/..\n", v2(), quota_v2("/sys/fs", "100000 100000")),
    "hybrid": (
        2, "4:cpu:/a\n0::/b\n", v1() + v2(f"{ROOT}/unified"),
        {**quota_v1(f"{CPU}/a", 200000), **quota_v1(f"{CPU}/b", 100000), **quota_v2(f"{ROOT}/unified/b", "max 100000")},
    ),
    "hybrid, both": (
        1, "4:cpu:/a\n0::/b\n", v1() + v2(f"{ROOT}/unified"),
        {**quota_v1(f"{CPU}/a", 200000), **quota_v2(f"{ROOT}/unified/b", "50000 100000")},
    ),
    "more than there are threads": (256, "0::/\n", v2(), quota_v2(ROOT, "9223372036854775807 1")),
    "no files": (0, None, None, quota_v2(ROOT, "100000 100000")),
    "no mounts": (0, "0::/\n", None, quota_v2(ROOT, "100000 100000")),
    "no groups": (0, None, v2(), quota_v2(ROOT, "100000 100000")),
    "v1, no period": (0, "4:cpu:/\n", v1(), {f"{CPU}/cpu.cfs_quota_us": "100000\n"}),
}  # fmt: skip


@linux
@pytest.mark.parametrize("name", TREES)
def test_the_smallest_quota_on_the_way_up(tmp_path, name):
    cpus, groups, mounts, files = TREES[name]
    make(tmp_path, groups, mounts and OTHERS + mounts, files)
    assert _quota_cpus(tmp_path) == cpus


@linux
@pytest.mark.parametrize("text", ["", "\n", "max", "100000 ", "100000 max", "100000 0", "0 100000", "-1 100000",
                                  "-100000 -100000", "1e5 100000", "100000 100000 1", "100000\t100000", " 1 1", "x",
                                  "\0", "100000 100000x", "9" * 100000 + "x 1"])  # fmt: skip
def test_text_that_is_no_quota(tmp_path, text):
    make(tmp_path, "0::/a\n4:cpu:/a\n", v2() + v1(), {
        **quota_v2(f"{ROOT}/a", text), **quota_v2(ROOT, "700000 100000"), **quota_v1(f"{CPU}/a", text, text),
    })  # fmt: skip
    assert _quota_cpus(tmp_path) == 7


@linux
def test_lines_that_say_nothing(tmp_path):
    """Every line is cut short at every byte, and spoilt at every byte, among lines that count."""
    groups, mounts = b"0::/a\n", v2().encode()
    spoilt = [
        b"\n",
        b":\n",
        b"::\n",
        b"0::\n",
        b"0::a\n",
        b"x" * 100000 + b"\n",
        b"\xff\xfe::/\n",
        b"-\n",
        b" - \n",
        b"a - b\n",
    ]
    for line in (b"4:cpu:/a", v1().encode()[:-1]):
        spoilt += [line[:end] + b"\n" for end in range(len(line))]
        spoilt += [
            line[:at] + byte + line[at + 1 :] + b"\n" for at in range(len(line)) for byte in (b"\0", b" ", b"\\")
        ]
    spoilt = b"".join(spoilt)
    make(tmp_path, spoilt + groups, spoilt + mounts + spoilt, quota_v2(f"{ROOT}/a", "300000 100000"))
    assert _quota_cpus(tmp_path) == 3
    make(tmp_path, groups[:-1], mounts[:-1], {})  # no end of line at the end of the file
    assert _quota_cpus(tmp_path) == 3


@linux
def test_long_paths(tmp_path):
    """What is too long to be opened has groups above it that are not."""
    make(tmp_path, "0::/a" + "/long" * 3000 + "\n", OTHERS * 1000 + v2(), quota_v2(f"{ROOT}/a", "200000 100000"))
    assert _quota_cpus(tmp_path) == 2


@linux
def test_folders_in_the_place_of_files(tmp_path):
    make(tmp_path, "0::/a\n4:cpu:/a\n", v2() + v1(), quota_v2(ROOT, "200000 100000"))
    for name in (f"{ROOT}/a/cpu.max", f"{CPU}/a/cpu.cfs_quota_us", f"{CPU}/a/cpu.cfs_period_us"):
        (tmp_path / name[1:]).mkdir(parents=True)
    assert _quota_cpus(tmp_path) == 2


@linux
@pytest.mark.parametrize("name", ["v1, nested, the outer one", "v2, nested, the outer one"])
def test_threads_by_default(tmp_path, name):
    """The whole way, with the trees mounted where the kernel has its own: the quota of 1 makes one thread."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*mount, "mount -t tmpfs t /sys"], capture_output=True).returncode:
        pytest.skip("an ordinary user cannot mount here")
    _, groups, mounts, files = TREES[name]
    make(tmp_path, groups, OTHERS + mounts, files)
    script = (
        'mount --bind "$0/sys" /sys && mount --bind "$0/proc" /proc && '
        'exec "$1" -P -c "import fastblock; print(fastblock.get_num_threads())"'
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("FASTBLOCK_NUM_THREADS", "OMP_NUM_THREADS")}
    result = subprocess.run(
        [*mount, script, tmp_path, sys.executable], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
def test_a_tier_that_is_missing_is_a_status(tmp_path):
    """For a C program, too: every function says so, and none falls back."""
    root = Path(__file__).resolve().parent.parent
    sources = [*sorted((root / "csrc").glob("*.c")), root / "tests" / "tiers" / "no_tier.c"]
    flags = ["-std=gnu11", "-O0", "-ffp-contract=off", "-Wno-psabi", "-pthread", "-I", root / "csrc"]
    program = tmp_path / "no_tier"
    subprocess.run(["gcc", *flags, *sources, "-lm", "-o", program], check=True)

    def printed(tier):
        environment = os.environ | {"FASTBLOCK_ISA": tier}
        return subprocess.run([program], env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert printed("no-such-tier") == ["-1"] + ["3"] * 11 + ["1", "0"]
    for name in ("", fastblock.isas()[0], fastblock.isas()[-1]):
        got = printed(name)
        assert int(got[0]) >= 0 and got[1:] == ["0"] * 11 + ["1", "0"], name
