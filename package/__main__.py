"""`python -m kvcluster`: the `kvcluster` command."""

from kvcluster.cli import main

main()
