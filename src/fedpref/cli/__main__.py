from fedpref.cli import main

main()
