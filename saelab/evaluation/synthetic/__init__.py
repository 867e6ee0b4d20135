"""Activations whose features are known, and what an autoencoder recovers of them: `saelab.synthetic`.

>>> from saelab import synthetic
>>> planted = synthetic.make(features=12, d_in=16, l0=2.0, orthogonal=True)
>>> x, codes = planted.sample(1000)
>>> x.shape, codes.n_latents
(torch.Size([1000, 16]), 12)
>>> scores = synthetic.recovery(planted.dictionary(), planted, tokens=1000)
>>> round(scores.value("matched cosine"), 3), round(scores.value("f1"), 3)
(1.0, 1.0)
"""

from saelab.evaluation.synthetic.features import Planted as Planted
from saelab.evaluation.synthetic.features import make as make
from saelab.evaluation.synthetic.recovered import compare as compare
from saelab.evaluation.synthetic.recovered import recovery as recovery
