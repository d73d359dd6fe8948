"""One operator a file: the problems that it meets in a model, rivals, the limit of its error. `cases(model, scale)`."""
