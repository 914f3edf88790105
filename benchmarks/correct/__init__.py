"""The parts of `correctness.py`."""
