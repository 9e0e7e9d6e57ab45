"""The verbs of the command line: names, options and help. What they do is in a module for each noun."""
