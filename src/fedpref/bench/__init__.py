"""Studies that others can run: suites of data and methods, by the same rules for all."""
