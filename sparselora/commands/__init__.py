"""One module a sub-command of ``python -m sparselora``: ``add_arguments(parser)`` and ``run(args)``."""
