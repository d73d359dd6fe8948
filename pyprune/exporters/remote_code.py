"""A checkpoint as it is, with its model code beside it: it loads where pyprune is not installed."""

import copy
from pathlib import Path

from ..architectures import FAMILIES, LLAMA, PRUNED_PREFIX
from ..checkpoint import CheckpointReader
from ..errors import InputError
from .layout import Layout

CODE = "modeling_pruned.py"


def remote_code_layout(reader: CheckpointReader) -> Layout:
    """The code derives from the family's transformers classes. InputError for a checkpoint that needs none."""
    config = copy.deepcopy(reader.config)
    if not config.model_type.startswith(PRUNED_PREFIX):
        raise InputError(f"{reader.folder}: a stock {config.model_type} model, which loads without code of its own")
    family = reader.family
    if not family.remote_code:
        known = ", ".join(name for name, other in FAMILIES.items() if other.remote_code)
        raise InputError(f"{reader.folder}: code beside the weights is written for {known}, not for {family.name}")
    # The file is code for Llama; the families' classes differ in their names only.
    code = Path(__file__).with_name(CODE).read_text(encoding="utf-8")
    code = code.replace(LLAMA.prefix, family.prefix).replace(LLAMA.name, family.name)
    module = CODE.removesuffix(".py")
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    config.auto_map = {auto: f"{module}.Pruned{family.prefix}{suffix}" for auto, suffix in classes.items()}
    config.architectures = [f"Pruned{family.prefix}ForCausalLM"]
    note = "load it with trust_remote_code=True, after reading the code"
    return Layout(config, dict, {CODE: code}, (note,))
