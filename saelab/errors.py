"""The errors, at the path that users' scripts import them from: see `saelab.base.errors`."""

from saelab.base.errors import *  # noqa: F403
