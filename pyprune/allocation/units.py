"""Parse `--units`, the kinds of units that may go, and fix the others."""

from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..errors import InputError

# KV groups are called heads where all query heads share one key and value head: then a unit is a query head.
NAMES = {"kv-groups": ATTENTION, "heads": ATTENTION, "channels": FFN}


def parse_units(text: str) -> list[str]:
    """The names of kinds of units in `text`, separated by commas. InputError: another name, or none."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise InputError(f"--units {text!r}: {name!r} is no kind of unit; they are {', '.join(NAMES)}")
    return names


def with_units(shapes: list[LayerShape], text: str | None) -> list[LayerShape]:
    """The shapes whose sublayers lose nothing that `text` (None: everything) does not name.

    Raises:
        InputError: a kind that no layer of the model can lose.
    """
    if text is None:
        return shapes
    names = parse_units(text)
    for name in names:
        if not any(shape.removable(NAMES[name]) for shape in shapes):
            raise InputError(
                f"--units {text}: no layer of this model can lose {name}: what a head computes depends on their number "
                "(norms over all heads at once, or widths that follow from it), or there are none; take channels"
            )
        if name == "heads" and not any(shape.shared_key_value for shape in shapes):
            raise InputError(
                f"--units {text}: single heads go where all query heads share one key and value head; in this model "
                "they go with their key and value head: take kv-groups"
            )
    fixed = [sublayer for sublayer in SUBLAYERS if sublayer not in {NAMES[name] for name in names}]
    return [shape.fixing(*fixed) for shape in shapes]
