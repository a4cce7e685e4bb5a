"""Write what each image holds, as CycloneDX: one file for each lock file of ops/image (make sbom).

    python -m ops.sbom [FOLDER]           without: build/sbom

From the lock files, so with the hash of every wheel, and the same text for the same locks. What the base images hold
is their makers' to say.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ops.lock import TARGETS, path_of


def write(target: str, into: Path) -> Path:
    """The file of one image. Raises CalledProcessError."""
    made = into / f"{target}.cdx.json"
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible", "--of", "JSON"]
    subprocess.run([*command, "-o", str(made), str(path_of(target))], check=True)
    return made


def main(into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for target in TARGETS:
        sys.stdout.write(f"{write(target, into)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/sbom"))
