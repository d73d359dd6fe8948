"""CWM: Llama's layers with a sliding window by layer."""

from .declaration import by_layer_type
from .family import Family

CWM = Family(name="cwm", prefix="Cwm", kind=by_layer_type)
