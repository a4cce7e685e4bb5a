"""Carry out the Dockerfile's steps for one target without a container engine, then start what it made.

    python -m ops.rehearse [--short] [cpu]     as root on Linux; cpu and gpu are started, the others only built

With --short the packages are those of the Python that runs this, instead of the locked ones.

Each stage is an overlay over this machine's own root, which stands in for the base image, so nothing is left behind.
The steps are run by chroot, as they are written. The service is then started as the image says: its user, its
variables, a root that cannot be written, its volumes and /tmp; its health is asked for by the image's own command, and
it must stop in order. What this cannot show: that the base images have what the steps need, and how small it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_S_MAX = 120.0
_USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where a stage sees this Python's packages in the short form.
_BORROWED = "/mnt/packages"
# How this machine reaches its package index, as a builder has its own ways.
_WAYS = re.compile(r"PIP_|SSL_|\w+_PROXY|\w+_proxy")


@dataclass(frozen=True)
class Step:
    """One instruction; `text` is its arguments on one line."""

    name: str
    text: str


@dataclass
class Stage:
    """What a stage has come to: where its root is mounted, and what its image says of a container's start."""

    name: str
    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    volumes: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    entry: tuple[str, ...] = ()


def steps_of(text: str) -> list[Step]:
    """The instructions of a Dockerfile, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def stages_of(text: str) -> dict[str, tuple[str, list[Step]]]:
    """Each stage by name: what it is from, and its steps."""
    found: dict[str, tuple[str, list[Step]]] = {}
    current: list[Step] = []
    for step in steps_of(text):
        if step.name == "FROM":
            base, _, name = step.text.partition(" AS ")
            current = []
            found[name] = (base, current)
        elif found:
            current.append(step)
    return found


def let_through(source: str) -> list[Path]:
    """The files that `COPY source` finds in the build context: committed or about to be, and not ignored."""
    patterns = (ROOT / ".dockerignore").read_text("utf-8").split()
    allowed = [one[1:] for one in patterns if one.startswith("!")]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", source],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    held = [Path(name) for name in listed if name and (ROOT / name).is_file()]
    within = [one for one in held if any(one.is_relative_to(way) for way in allowed)]
    return [one for one in within if "__pycache__" not in one.parts]


class Rehearsal:
    """Stages, each built once; in a mount namespace of this process. `work` is a file system that can hold overlays."""

    def __init__(self, text: str, work: Path, bound: Mapping[Path, str] | None = None) -> None:
        """`bound`: folders of this machine that every stage sees, and where."""
        self._written = stages_of(text)
        self._work = work
        self._bound = bound or {}
        self._built: dict[str, Stage] = {}

    def built(self, name: str) -> Stage:
        if name in self._built:
            return self._built[name]
        if name not in self._written:
            raise SystemExit(f"the Dockerfile has no target {name}: there are {', '.join(self._written)}")
        base, steps = self._written[name]
        under = self.built(base) if base in self._written else None
        lower = f"{self._work}/{under.name}/upper:" if under else ""
        while under and (above := self._written[under.name][0]) in self._written:
            under = self._built[above]
            lower += f"{self._work}/{under.name}/upper:"
        folders = {one: self._work / name / one for one in ("upper", "aside", "root")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        layers = f"lowerdir={lower}/,upperdir={folders['upper']},workdir={folders['aside']}"
        self._mount("-t", "overlay", "overlay", "-o", layers, folders["root"])
        if base in self._written:
            stage = replace(self._built[base], name=name, root=folders["root"])
            stage.variables = dict(stage.variables)
        else:
            stage = Stage(name, folders["root"], {"PATH": f"{sys.base_prefix}/bin:{_USUAL_PATH}"})
        for place in ("/proc", "/dev", "/etc/resolv.conf"):
            self._mount("--rbind" if Path(place).is_dir() else "--bind", place, stage.root / place[1:])
        self._mount("-t", "tmpfs", "tmpfs", stage.root / "tmp")
        for folder, place in self._bound.items():
            (stage.root / place[1:]).mkdir(parents=True, exist_ok=True)
            self._mount("--bind", folder, stage.root / place[1:])
        # This machine's interpreter may lie where only root may look; that of a base image does not.
        for parent in Path(sys.base_prefix).parents:
            (stage.root / str(parent)[1:]).chmod(0o755)
        for step in steps:
            _say(f"[{name}] {step.name} {step.text[:140]}")
            self._take(stage, step)
        self._built[name] = stage
        return stage

    def _take(self, stage: Stage, step: Step) -> None:
        match step.name:
            case "RUN":
                command = step.text
                while mount := re.match(r"--mount=type=cache,target=(\S+)\s+", command):
                    cache = stage.root / mount[1][1:]
                    cache.mkdir(parents=True, exist_ok=True)
                    if Path(mount[1]).is_dir():
                        self._mount("--bind", mount[1], cache)
                    command = command[mount.end() :]
                (stage.root / stage.folder[1:]).mkdir(parents=True, exist_ok=True)
                ways = {name: value for name, value in os.environ.items() if _WAYS.match(name)}
                subprocess.run(
                    ["chroot", str(stage.root), "/bin/sh", "-ec", f"cd {shlex.quote(stage.folder)}; {command}"],
                    env={**ways, **stage.variables, "HOME": "/root"}, check=True,
                )  # fmt: skip
            case "COPY":
                self._copy(stage, step.text.split())
            case "ENV":
                for pair in shlex.split(step.text):
                    name, _, value = pair.partition("=")
                    stage.variables[name] = re.sub(r"\$(\w+)", lambda found: stage.variables.get(found[1], ""), value)
            case "WORKDIR":
                stage.folder = step.text
            case "USER":
                stage.user = step.text
            case "VOLUME":
                stage.volumes += tuple(json.loads(step.text))
            case "HEALTHCHECK":
                stage.health = tuple(json.loads(step.text.partition(" CMD ")[2]))
            case "ENTRYPOINT":
                stage.entry = tuple(json.loads(step.text))
            case "EXPOSE" | "STOPSIGNAL":
                pass
            case _:
                raise SystemExit(f"this rehearsal does not know {step.name}")

    def _copy(self, stage: Stage, words: list[str]) -> None:
        other = self.built(words.pop(0).removeprefix("--from=")) if words[0].startswith("--from=") else None
        *sources, target = words
        into = stage.root / os.path.normpath(os.path.join(stage.folder, target))[1:]
        if other:
            (source,) = sources
            into.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", f"{other.root}{source}/.", str(into)], check=True)
            return
        for source in sources:
            files = let_through(source)
            if not files:
                raise SystemExit(f"COPY {source}: .dockerignore lets nothing of it through")
            whole = (ROOT / source).is_dir()
            for file in files:
                to = into / file.relative_to(source) if whole else into / file.name if target.endswith("/") else into
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, to)

    def _mount(self, *words: object) -> None:
        subprocess.run(["mount", *map(str, words)], check=True)

    def serve(self, stage: Stage) -> None:
        """Start the service of a stage and stop it. Raises CalledProcessError or SystemExit."""
        for at, volume in enumerate(stage.volumes):
            held = self._work / f"volume-{at}"
            held.mkdir()
            shutil.copystat(stage.root / volume[1:], held)
            owner = (stage.root / volume[1:]).stat()
            os.chown(held, owner.st_uid, owner.st_gid)
            self._mount("--bind", held, stage.root / volume[1:])
        (stage.root / "tmp").chmod(0o1777)
        self._mount("-o", "remount,ro", stage.root)
        http_port, grpc_port = _free_ports(2)
        variables = stage.variables | {
            "MATCHER_SERVER__HTTP_PORT": str(http_port),
            "MATCHER_SERVER__GRPC_PORT": str(grpc_port),
        }
        inside = ["chroot", f"--userspec={stage.user}", str(stage.root)]
        refused = subprocess.run([*inside, "touch", "/opt/matcher/written"], env=variables, capture_output=True)
        if not refused.returncode:
            raise SystemExit("the root can be written")
        process = subprocess.Popen([*inside, *stage.entry], env=variables)
        try:
            until = time.monotonic() + START_S_MAX
            while subprocess.run([*inside, *stage.health], env=variables, capture_output=True).returncode:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"it did not become healthy (exit {process.poll()})")
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            if code := process.wait(60):
                raise SystemExit(f"it stopped with {code}")
        finally:
            process.kill()
            process.wait()


def _say(what: str) -> None:
    # At once, so that it stands before what the step itself says.
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in listeners]
    finally:
        for one in listeners:
            one.close()


def rehearse(text: str, targets: Sequence[str], bound: Mapping[Path, str] | None = None) -> None:
    """In a mount namespace of one's own. Raises CalledProcessError or SystemExit."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
        try:
            rehearsal = Rehearsal(text, Path(folder), bound)
            for target in targets:
                stage = rehearsal.built(target)
                if stage.entry[0] == "matcher":
                    rehearsal.serve(stage)
                    _say(f"{target}: built, healthy, stopped in order")
                else:
                    _say(f"{target}: built")
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", folder], check=False)


def main(targets: Sequence[str]) -> int:
    if os.geteuid() != 0:
        sys.stderr.write("root is needed, to mount and to chroot\n")
        return 2
    if "--inside" not in targets:
        # Mounts that only this process and its children see, and that end with them.
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "ops.rehearse", "--inside"]
        return subprocess.run([*command, *targets], cwd=ROOT).returncode
    text = (ROOT / "Dockerfile").read_text("utf-8")
    bound: dict[Path, str] = {}
    chosen = [one for one in targets if not one.startswith("--")]
    if "--short" in targets:
        bound = {Path(sysconfig.get_path("purelib")): _BORROWED}
        text = shortened(text)
    rehearse(text, chosen or ["cpu"], bound)
    return 0


def shortened(text: str) -> str:
    """The Dockerfile with this Python's packages instead of those that its locked requirements would install."""
    borrowed = "site=$(/opt/matcher/bin/python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    written, count = re.subn(
        r"&& (python3?) -m pip --python /opt/matcher/bin/python install [^&]*?--require-hashes[^&]*?(?=\n[A-Z])",
        lambda _: f"&& {borrowed} && echo {_BORROWED} > $site/borrowed.pth",
        text,
    )
    if not count:
        raise SystemExit("no installation of locked requirements was found")
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
