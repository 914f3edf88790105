"""An experiment, round by round, into a run directory; a finished run as an object."""
