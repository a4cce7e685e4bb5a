"""Fixtures that tests of several folders share."""

from hypothesis import settings

# No timed assertions: a busy machine makes no law false.
settings.register_profile("laws", deadline=None, print_blob=True)
settings.load_profile("laws")

pytest_plugins = ["tests.cluster.fixtures"]
