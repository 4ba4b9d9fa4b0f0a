"""The command line, ``pruna-opt``: one module a subcommand, imported when it is asked for."""
