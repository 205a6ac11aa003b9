"""The kinds of experts: one module each; its name is the name on the command line. See `experts`."""
