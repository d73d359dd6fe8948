"""A uniform checkpoint in a stock transformers class, for everything that loads transformers' models."""

from ..architectures import BIAS_FLAGS
from ..checkpoint import CheckpointReader
from ..modeling.stock import stock_config
from .layout import Layout


def stock_layout(reader: CheckpointReader) -> Layout:
    """InputError where layers differ, or where no stock class holds the model's tensors."""
    stock = stock_config(reader.family, reader.config, reader.shapes, **output_proj_biases(reader))
    notes = (f"with biases of zeros: {', '.join(stock.zero_biases)}",) if stock.zero_biases else ()
    return Layout(stock.config, stock.fill, notes=notes)


def output_proj_biases(reader: CheckpointReader) -> dict[str, bool]:
    """List the output projections that have a bias which the family lacks."""
    return {name: bool(getattr(reader.config, name, False)) for name in BIAS_FLAGS.values()}
