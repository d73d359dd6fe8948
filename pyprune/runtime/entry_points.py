"""Entry points: modules of other packages that register methods or families."""

from importlib.metadata import entry_points

from ..errors import InputError
from .files import reason_of


def load_entry_points(group: str) -> None:
    """Import the modules that installed packages name in an entry-point group; they register what they bring.

    InputError: one cannot be imported, or refuses to register. The line names the package.
    """
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            package = f"the package {entry.dist.name} {entry.dist.version}" if entry.dist else "a package"
            raise InputError(
                f"{package} extends pyprune by {entry.value} ({group}), which cannot be loaded: {reason_of(error)}; "
                "repair or uninstall it"
            ) from error
