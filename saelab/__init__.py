"""saelab: mechanistic interpretability of autoencoders, for language models and diffusion denoisers.

Everything a user needs is an attribute of this module, loaded at first use:

>>> import saelab
>>> saelab.TopK(k=32, d_sae=4096)
TopK(k=32, d_sae=4096)
"""

from typing import TYPE_CHECKING

from saelab.lazy import lazily

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "saelab.models.language",
    "LanguageModel": "saelab.models.language",
    "Tokens": "saelab.models.tokens",
    "load_denoiser": "saelab.models.denoiser",
    "Denoiser": "saelab.models.denoiser",
    "load_corpus": "saelab.activations.corpus",
    "Corpus": "saelab.activations.corpus",
    "harvest": "saelab.activations.harvest",
    "ActivationStore": "saelab.activations.store",
    "ActivationBuffer": "saelab.activations.buffer",
    "SAE": "saelab.autoencoders.sae",
    "SparseCodes": "saelab.autoencoders.codes",
    "TopK": "saelab.autoencoders.topk",
    "MutualChoice": "saelab.autoencoders.choice",
    "BatchTopK": "saelab.autoencoders.choice",
    "ReLU": "saelab.autoencoders.relu",
    "Gated": "saelab.autoencoders.gated",
    "JumpReLU": "saelab.autoencoders.jumprelu",
    "Matryoshka": "saelab.autoencoders.matryoshka",
    "MultiTopK": "saelab.autoencoders.multitopk",
    "FeatureChoice": "saelab.autoencoders.feature_choice",
    "GradientTopK": "saelab.autoencoders.gradient",
    "Transcoder": "saelab.autoencoders.transcoder",
    "train": "saelab.training.loop",
    "sweep": "saelab.training.loop",
    "Run": "saelab.training.run",
    "Sweep": "saelab.training.run",
    "load_run": "saelab.training.run",
    "evaluate": "saelab.evaluation.fidelity",
    "Report": "saelab.evaluation.fidelity",
    "QuickSelection": "saelab.selection.estimator",
    "SaelabError": "saelab.errors",
    "ConfigError": "saelab.errors",
    "SiteError": "saelab.errors",
    "FormatError": "saelab.errors",
    "DataError": "saelab.errors",
    "CheckpointError": "saelab.errors",
    "InterventionError": "saelab.errors",
}

__all__ = sorted(_PUBLIC)


__getattr__, __dir__ = lazily(globals(), _PUBLIC, subpackages=("dashboards",))


if TYPE_CHECKING:
    from saelab import dashboards as dashboards
    from saelab.activations.buffer import ActivationBuffer as ActivationBuffer
    from saelab.activations.corpus import Corpus as Corpus
    from saelab.activations.corpus import load_corpus as load_corpus
    from saelab.activations.harvest import harvest as harvest
    from saelab.activations.store import ActivationStore as ActivationStore
    from saelab.autoencoders.choice import BatchTopK as BatchTopK
    from saelab.autoencoders.choice import MutualChoice as MutualChoice
    from saelab.autoencoders.codes import SparseCodes as SparseCodes
    from saelab.autoencoders.feature_choice import FeatureChoice as FeatureChoice
    from saelab.autoencoders.gated import Gated as Gated
    from saelab.autoencoders.gradient import GradientTopK as GradientTopK
    from saelab.autoencoders.jumprelu import JumpReLU as JumpReLU
    from saelab.autoencoders.matryoshka import Matryoshka as Matryoshka
    from saelab.autoencoders.multitopk import MultiTopK as MultiTopK
    from saelab.autoencoders.relu import ReLU as ReLU
    from saelab.autoencoders.sae import SAE as SAE
    from saelab.autoencoders.topk import TopK as TopK
    from saelab.autoencoders.transcoder import Transcoder as Transcoder
    from saelab.errors import CheckpointError as CheckpointError
    from saelab.errors import ConfigError as ConfigError
    from saelab.errors import DataError as DataError
    from saelab.errors import FormatError as FormatError
    from saelab.errors import InterventionError as InterventionError
    from saelab.errors import SaelabError as SaelabError
    from saelab.errors import SiteError as SiteError
    from saelab.evaluation.fidelity import Report as Report
    from saelab.evaluation.fidelity import evaluate as evaluate
    from saelab.models.denoiser import Denoiser as Denoiser
    from saelab.models.denoiser import load_denoiser as load_denoiser
    from saelab.models.language import LanguageModel as LanguageModel
    from saelab.models.language import load_model as load_model
    from saelab.models.tokens import Tokens as Tokens
    from saelab.selection.estimator import QuickSelection as QuickSelection
    from saelab.training.loop import sweep as sweep
    from saelab.training.loop import train as train
    from saelab.training.run import Run as Run
    from saelab.training.run import Sweep as Sweep
    from saelab.training.run import load_run as load_run
