"""Studies: whole experiment plans, each run by one command into one report."""
