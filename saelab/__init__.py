"""saelab: mechanistic interpretability of autoencoders, for language models and diffusion denoisers.

Everything a user needs is an attribute of this module, loaded at first use:

>>> import saelab
>>> saelab.TopK(k=32, d_sae=4096)
TopK(k=32, d_sae=4096)
"""

from typing import TYPE_CHECKING

from saelab.base.lazy import lazily, provide
from saelab.base.version import __version__ as __version__

_PUBLIC = {
    "load_model": "saelab.models.language",
    "LanguageModel": "saelab.models.language",
    "Tokens": "saelab.models.tokens",
    "load_denoiser": "saelab.models.denoiser",
    "Denoiser": "saelab.models.denoiser",
    "load_corpus": "saelab.reading.corpus",
    "Corpus": "saelab.reading.corpus",
    "harvest": "saelab.reading.harvest",
    "ActivationStore": "saelab.reading.store",
    "ActivationBuffer": "saelab.reading.buffer",
    "SAE": "saelab.autoencoders.sae",
    "load_sae": "saelab.interop.loading",
    "SparseCodes": "saelab.base.codes",
    "TopK": "saelab.autoencoders.architectures.topk",
    "MutualChoice": "saelab.autoencoders.architectures.mutual_choice",
    "BatchTopK": "saelab.autoencoders.architectures.mutual_choice",
    "ReLU": "saelab.autoencoders.architectures.relu",
    "Gated": "saelab.autoencoders.architectures.gated",
    "JumpReLU": "saelab.autoencoders.architectures.jumprelu",
    "Matryoshka": "saelab.autoencoders.architectures.matryoshka",
    "LowRank": "saelab.autoencoders.architectures.low_rank",
    "MultiTopK": "saelab.autoencoders.architectures.multitopk",
    "FeatureChoice": "saelab.autoencoders.architectures.feature_choice",
    "GradientTopK": "saelab.autoencoders.architectures.gradient",
    "Transcoder": "saelab.autoencoders.architectures.transcoder",
    "train": "saelab.training.loop",
    "sweep": "saelab.training.loop",
    "estimate": "saelab.training.estimating",
    "Run": "saelab.training.run",
    "Sweep": "saelab.training.run",
    "load_run": "saelab.training.run",
    "evaluate": "saelab.evaluation.fidelity",
    "benchmark": "saelab.evaluation.benchmarking",
    "synthetic": "saelab.evaluation",
    "publish": "saelab.interop.publishing",
    "calibrate": "saelab.evaluation.calibration",
    "Report": "saelab.evaluation.fidelity",
    "explain": "saelab.evaluation.explaining",
    "score": "saelab.evaluation.explaining",
    "QuickSelection": "saelab.selection.estimator",
    "SaelabError": "saelab.base.errors",
    "ConfigError": "saelab.base.errors",
    "SiteError": "saelab.base.errors",
    "FormatError": "saelab.base.errors",
    "DataError": "saelab.base.errors",
    "CheckpointError": "saelab.base.errors",
    "InterventionError": "saelab.base.errors",
    "ProcessError": "saelab.base.errors",
}

__all__ = sorted(_PUBLIC)


provide(
    {
        "read_path": "saelab.interop.loading",
        "steer": "saelab.steering.apply",
        "sweep": "saelab.training.loop",
        "show": "saelab.dashboards.showing",
        "of_run": "saelab.dashboards.showing",
        "save_as": "saelab.interop.exports",
        "hub_name": "saelab.models.loading",
        "publish": "saelab.interop.publishing",
    }
)

__getattr__, __dir__ = lazily(
    globals(), _PUBLIC, subpackages=("analysis", "dashboards", "hspace", "interop", "steering")
)


if TYPE_CHECKING:
    from saelab import analysis as analysis
    from saelab import dashboards as dashboards
    from saelab import hspace as hspace
    from saelab import interop as interop
    from saelab import steering as steering
    from saelab.autoencoders.architectures.feature_choice import FeatureChoice as FeatureChoice
    from saelab.autoencoders.architectures.gated import Gated as Gated
    from saelab.autoencoders.architectures.gradient import GradientTopK as GradientTopK
    from saelab.autoencoders.architectures.jumprelu import JumpReLU as JumpReLU
    from saelab.autoencoders.architectures.low_rank import LowRank as LowRank
    from saelab.autoencoders.architectures.matryoshka import Matryoshka as Matryoshka
    from saelab.autoencoders.architectures.multitopk import MultiTopK as MultiTopK
    from saelab.autoencoders.architectures.mutual_choice import BatchTopK as BatchTopK
    from saelab.autoencoders.architectures.mutual_choice import MutualChoice as MutualChoice
    from saelab.autoencoders.architectures.relu import ReLU as ReLU
    from saelab.autoencoders.architectures.topk import TopK as TopK
    from saelab.autoencoders.architectures.transcoder import Transcoder as Transcoder
    from saelab.autoencoders.sae import SAE as SAE
    from saelab.base.codes import SparseCodes as SparseCodes
    from saelab.base.errors import CheckpointError as CheckpointError
    from saelab.base.errors import ConfigError as ConfigError
    from saelab.base.errors import DataError as DataError
    from saelab.base.errors import FormatError as FormatError
    from saelab.base.errors import InterventionError as InterventionError
    from saelab.base.errors import ProcessError as ProcessError
    from saelab.base.errors import SaelabError as SaelabError
    from saelab.base.errors import SiteError as SiteError
    from saelab.evaluation import synthetic as synthetic
    from saelab.evaluation.benchmarking import benchmark as benchmark
    from saelab.evaluation.calibration import calibrate as calibrate
    from saelab.evaluation.explaining import explain as explain
    from saelab.evaluation.explaining import score as score
    from saelab.evaluation.fidelity import Report as Report
    from saelab.evaluation.fidelity import evaluate as evaluate
    from saelab.interop.loading import load_sae as load_sae
    from saelab.interop.publishing import publish as publish
    from saelab.models.denoiser import Denoiser as Denoiser
    from saelab.models.denoiser import load_denoiser as load_denoiser
    from saelab.models.language import LanguageModel as LanguageModel
    from saelab.models.language import load_model as load_model
    from saelab.models.tokens import Tokens as Tokens
    from saelab.reading.buffer import ActivationBuffer as ActivationBuffer
    from saelab.reading.corpus import Corpus as Corpus
    from saelab.reading.corpus import load_corpus as load_corpus
    from saelab.reading.harvest import harvest as harvest
    from saelab.reading.store import ActivationStore as ActivationStore
    from saelab.selection.estimator import QuickSelection as QuickSelection
    from saelab.training.loop import sweep as sweep
    from saelab.training.loop import train as train
    from saelab.training.run import Run as Run
    from saelab.training.run import Sweep as Sweep
    from saelab.training.run import load_run as load_run
