"""`flmctl` and its companions: the command line of Flame."""
