"""What one does with runs: begin, watch, sweep, evaluate, join, export, and score answers."""
