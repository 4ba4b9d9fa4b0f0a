"""Settings of every test: hypothesis draws the same examples on every machine and has no clock."""

from hypothesis import settings

settings.register_profile("pruna-ir", derandomize=True, deadline=None)
settings.load_profile("pruna-ir")
