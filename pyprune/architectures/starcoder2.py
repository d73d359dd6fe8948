"""StarCoder2: LayerNorms, biases everywhere, an FFN without a gate."""

from .declaration import FULL, LAYER, SLIDING, Plain
from .family import Family

STARCODER2 = Family(
    name="starcoder2",
    prefix="Starcoder2",
    ffn=Plain(up="mlp.c_fc", output="mlp.c_proj"),
    norm=LAYER,
    kind=lambda config, layer: FULL if config.sliding_window is None else SLIDING,
)
