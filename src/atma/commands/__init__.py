"""The verbs of the command line, one module each: a typed `run` that calls plain Python and prints."""
