"""The machine: devices, processes, streams, signals, small files."""
