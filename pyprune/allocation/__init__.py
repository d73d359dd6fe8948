"""From a ratio to the units that each layer keeps."""
