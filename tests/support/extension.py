"""A package that extends pyprune: one module and its entry points, as pip would install them."""

import os
import subprocess
import sys
from pathlib import Path

from support.forked import Running
from support.forked import run as run_forked
from support.paths import ROOT


class Extension:
    """The module `name` with `source`, named by the entry-point `group`, in a folder of its own."""

    def __init__(self, folder: Path, name: str, group: str, source: str) -> None:
        self.folder = folder / "installed"
        information = self.folder / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        (self.folder / f"{name}.py").write_text(source)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}\n")

    def python(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run Python where the package is installed beside pyprune."""
        path = os.pathsep.join([str(self.folder), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    def pyprune(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "pyprune", *arguments)

    def forked(self, *arguments: object) -> Running:
        """Run pyprune in a forked process that finds the package as it imports the command line: methods only."""

        def install() -> None:
            sys.path.insert(0, str(self.folder))
            for name in [name for name in sys.modules if name.startswith("pyprune.cli.")]:
                del sys.modules[name]

        return run_forked(self.folder.parent, *arguments, first=install)
