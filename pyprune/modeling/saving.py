"""config.json as transformers 5 writes it, with what transformers 4 and the engines on it read under other names."""

import json
from pathlib import Path
from typing import Any


def save_config(config: Any, folder: Path) -> None:
    """Write the configuration as `config.json` in the folder, in both spellings."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(fields | earlier_fields(fields), indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def earlier_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that transformers 5 renamed, under the names of 4, which otherwise takes its defaults and says nothing.

    transformers 5 lets `dtype` win over `torch_dtype`, and completes a `rope_scaling` by `rope_theta`: the same values
    come of both spellings. Parameters by kind of layer are left alone: no class of transformers 4 that a
    checkpoint of pyprune has can hold them.
    """
    earlier: dict[str, Any] = {}
    if fields.get("dtype") is not None:
        earlier["torch_dtype"] = fields["dtype"]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        earlier |= _earlier_rope(rope, fields)
    return earlier


def _earlier_rope(rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(rope)
    apart: dict[str, Any] = {
        name: scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in scaling
    }
    kind, original = scaling.get("rope_type", "default"), "original_max_position_embeddings"
    # 5 writes it where nobody gave it; some releases of 4 then take the factor from the two lengths: 1.
    if kind == "yarn" and scaling.get(original) == fields.get("max_position_embeddings"):
        scaling.pop(original, None)
    if kind == "longrope" and original in scaling:
        apart[original] = scaling[original]  # where 4 looks for it
    return apart | {"rope_scaling": None if kind == "default" else scaling}
