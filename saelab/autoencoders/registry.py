"""Every architecture there is, one line each: importing its file registers it."""

import saelab.autoencoders.choice
import saelab.autoencoders.topk  # noqa: F401
