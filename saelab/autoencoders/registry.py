"""Every architecture there is, one line each: importing its file registers it."""

import saelab.autoencoders.architectures.feature_choice
import saelab.autoencoders.architectures.gated
import saelab.autoencoders.architectures.gradient
import saelab.autoencoders.architectures.jumprelu
import saelab.autoencoders.architectures.low_rank
import saelab.autoencoders.architectures.matryoshka
import saelab.autoencoders.architectures.multitopk
import saelab.autoencoders.architectures.mutual_choice
import saelab.autoencoders.architectures.relu
import saelab.autoencoders.architectures.topk
import saelab.autoencoders.architectures.transcoder  # noqa: F401
