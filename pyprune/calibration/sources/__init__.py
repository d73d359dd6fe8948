"""Documents of a text, one module a kind: files, data sets of the hub, the built-in text, objects of a caller."""
