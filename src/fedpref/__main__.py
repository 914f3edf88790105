"""`python -m fedpref` is the command line."""

from fedpref.cli import main

main()
