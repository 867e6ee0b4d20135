"""Every architecture there is, one line each: importing its file registers it."""

import saelab.autoencoders.choice
import saelab.autoencoders.feature_choice
import saelab.autoencoders.gated
import saelab.autoencoders.gradient
import saelab.autoencoders.jumprelu
import saelab.autoencoders.matryoshka
import saelab.autoencoders.multitopk
import saelab.autoencoders.relu
import saelab.autoencoders.topk
import saelab.autoencoders.transcoder  # noqa: F401
