"""From text to token windows, and from windows to statistics."""
