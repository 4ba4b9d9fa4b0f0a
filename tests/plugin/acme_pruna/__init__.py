"""A plugin for pruna-ir: the pass ``expand-hardswish``, ``acme::swish``, the backend ``numpy``."""
