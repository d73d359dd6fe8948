"""Input of a run, and the record of its result."""
