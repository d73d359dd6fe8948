"""One operator a file: its problems in a model, the baselines, the limit of its error. `cases(model, scale)`."""
