"""One run, from the request to the output folder."""
