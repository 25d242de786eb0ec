"""Machines for tests: a real systemd as process 1, in namespaces of its own, over a throw-away copy of this
computer's files.

What a machine changes lies in a layer (overlayfs) that later machines can be put on, so that a long
preparation is done once in a run, whichever of its processes comes first. The copy is of "/", or of what
KEEPALIVE_TEST_ROOT names, such as a tree made by debootstrap. Needs root, cgroup 2 and a systemd in that tree;
`why_not` says what is missing. No machine outlives the process that booted it, and no file the run: they are
in memory, in a mount namespace that ends with it.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

ROOT = Path(os.environ.get("KEEPALIVE_TEST_ROOT", "/"))
T = TypeVar("T")

INIT = "usr/lib/systemd/systemd"
# Nothing here waits this long unless it fails, however busy the computer is.
PATIENCE = 240.0

# Units of a computer with hardware and a network, and of one that was not up a minute ago.
UNWANTED = (
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "modprobe@.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-journal-flush.service",
    "systemd-modules-load.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-utmp.service",
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-firstboot.service",
    "getty.target",
)

BOOT = """
R=$W/root; mkdir -p $W/upper $W/work $R
mount -t overlay overlay -o lowerdir=$LOWER,upperdir=$W/upper,workdir=$W/work $R
mount -t proc proc $R/proc
mount -t sysfs sysfs $R/sys
mount -t cgroup2 cgroup2 $R/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $R/run
mount -t tmpfs tmpfs $R/tmp
mount -t tmpfs -o mode=755 tmpfs $R/dev
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
    IFS=: read name major minor <<<"$device"
    mknod -m 666 $R/dev/$name c $major $minor
done
mkdir $R/dev/pts $R/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts $R/dev/pts
mount -t tmpfs tmpfs $R/dev/shm
ln -s pts/ptmx $R/dev/ptmx
ln -s /proc/self/fd $R/dev/fd
touch $R/dev/console
mount --bind /dev/null $R/dev/console
for pair in $SHARED; do
    mkdir -p $R${pair#*:}
    mount --bind ${pair%%:*} $R${pair#*:}
    mount -o remount,bind,ro $R${pair#*:}
done
if [ -n "$FIRST" ]; then
    rm -rf $R/etc/systemd/system/*.wants $R/usr/lib/systemd/system/multi-user.target.wants/*
    for unit in $UNWANTED; do ln -sf /dev/null $R/etc/systemd/system/$unit; done
    mkdir $R/etc/systemd/system/multi-user.target.wants
    ln -s /usr/lib/systemd/system/dbus.service $R/etc/systemd/system/multi-user.target.wants/
    : >$R/etc/fstab
fi
: >$R/etc/machine-id
hostname machine
ip link set lo up
mkdir -p $R/oldroot
cd $R
pivot_root . oldroot
umount -l /oldroot
mount --make-rshared /   # else LoadCredential= fails in units that do not run as root
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/lib/systemd/systemd --unit=multi-user.target --log-target=journal-or-kmsg --show-status=no \
    </dev/null >/dev/null 2>&1
"""


def why_not() -> str | None:
    """What keeps this computer from booting machines, or None."""
    if os.geteuid() != 0:
        return "needs root, to boot a systemd in namespaces"
    missing = [name for name in ("unshare", "nsenter", "setpriv", "ip", "findmnt") if not shutil.which(name)]
    if missing:
        return f"needs {', '.join(missing)}"
    if not (ROOT / INIT).exists():
        return f"needs systemd: no {ROOT / INIT}"
    if not _cgroup2():
        return "needs cgroup 2"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--cgroup", "--net", "--uts", "--ipc", "true"],
        capture_output=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"may not unshare: {tried.stderr.decode().strip()}"


def _cgroup2() -> Path | None:
    found = subprocess.run(
        ["findmnt", "-nro", "TARGET", "-t", "cgroup2"], capture_output=True, text=True, check=False
    ).stdout.split()
    return Path(found[0]) if found and os.access(found[0], os.W_OK) else None


def until(what: Callable[[], T], why: str, patience: float = PATIENCE) -> T:
    """What `what` returns once that is true; AssertionError when it stays false."""
    end = time.monotonic() + patience
    while True:
        result = what()
        if result:
            return result
        assert time.monotonic() < end, f"waited {patience:.0f} s in vain: {why}"
        time.sleep(0.1)


class Shed:
    """Where the layers lie: a file system in memory, one for all processes of a test run.

    `folder` is the run's, and says to each of them where the others are at work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        folder.mkdir(exist_ok=True)
        holder = self.once("holder", lambda: _hold(folder))
        self.enter = ("nsenter", "--target", str(holder), "--mount")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make`, called by the first process of the run that needs it, returned (as JSON)."""
        note = self.folder.with_name(f"{self.folder.name}.{name}")
        with note.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not note.exists():
                note.write_text(json.dumps(make()))
            return json.loads(note.read_text())

    def next_folder(self) -> Path:
        return self.folder / f"{os.getpid()}-{next(self._numbers)}"


def _hold(folder: Path) -> int:
    """A process in a mount namespace with memory at `folder`; it ends with the run, however that ends."""
    # A worker of pytest-xdist may end before others have begun; who began it stays to the end.
    run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    script = f'mount -t tmpfs -o mode=755 tmpfs "{folder}"; tail --pid={run} -f /dev/null >/dev/null 2>&1 & echo $!'
    began = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "setsid", "/bin/sh", "-euc", script],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(began.stdout)


class Machine:
    """A booted systemd.

    `on` are layers of earlier machines, the newest first; `shared` are folders of this computer, by the path
    that they have there; they cannot be written to.
    """

    def __init__(self, shed: Shed, on: Sequence[Path] = (), shared: Mapping[str, Path] | None = None) -> None:
        self.folder = shed.next_folder()
        self.layers = (self.folder / "upper", *on)
        cgroups = _cgroup2()
        assert cgroups is not None
        self._cgroup = cgroups / f"machine-{self.folder.name}"
        self._cgroup.mkdir()
        environ = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "W": str(self.folder),
            "LOWER": ":".join(map(str, (*on, ROOT))),
            "FIRST": "" if on else "yes",
            "SHARED": " ".join(f"{here}:{there}" for there, here in (shared or {}).items()),
            "UNWANTED": " ".join(UNWANTED),
        }
        namespaces = "--cgroup --mount --pid --net --ipc --uts"
        unshare = f"unshare {namespaces} --fork --kill-child=SIGKILL --propagation private"
        self._process = subprocess.Popen(
            [
                *("/bin/sh", "-euc", f'echo $$ >{self._cgroup}/cgroup.procs; exec "$@"', "sh"),
                *("setpriv", "--pdeathsig", "KILL"),
                *shed.enter,
                *unshare.split(),
                *("/bin/bash", "-euc", BOOT),
            ],
            env=environ,
        )
        self._init = 0
        try:
            self._init = until(self._find_init, "process 1 did not start") or 0
            until(self._is_up, "systemd did not come up")
        except BaseException:
            self.close()
            raise

    def run(
        self, *command: str, check: bool = True, patience: float = PATIENCE, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there, as root."""
        done = subprocess.run(
            [*self._inside(), *command], capture_output=True, text=True, timeout=patience, check=False, **more
        )
        assert not check or done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """Begin a command there; the caller ends it."""
        return subprocess.Popen([*self._inside(), *command], text=True, **more)

    def shell(self, script: str, patience: float = PATIENCE) -> str:
        return self.run("/bin/sh", "-euc", script, patience=patience).stdout

    def write(self, path: str, text: str, mode: str = "644") -> None:
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, input=text)

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", unit).stdout.strip()

    def journal(self, *options: str) -> str:
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--boot", "--no-pager", *options).stdout

    def close(self) -> None:
        """End it as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            if self._init:
                os.kill(self._init, signal.SIGKILL)
        self._process.kill()
        self._process.wait(PATIENCE)
        until(self._remove_cgroup, "processes of the machine live on")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _inside(self) -> tuple[str, ...]:
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return (
            "nsenter",
            "--target",
            str(self._init),
            *namespaces,
            "env",
            "-i",
            path,
            "HOME=/root",
            "LANG=C.UTF-8",
        )

    def _find_init(self) -> int | None:
        assert self._process.poll() is None, "the machine did not boot"
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{child}/exe").endswith(INIT):
                    return child
        return None

    def _is_up(self) -> bool:
        state = self.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
        return state in ("running", "degraded")

    def _remove_cgroup(self) -> bool:
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        return not self._cgroup.exists()
