"""`python -m duopool.cluster`: the command line without installing it."""

from duopool.cluster.cli import main

main()
