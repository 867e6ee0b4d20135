"""QuickSelection: unsupervised feature selection by a sparse denoising autoencoder whose links evolve.

`estimator` is what users meet; `samples`, `links` and `autoencoder` train, `runs` keeps a run on disk; `protocol` and
`baselines` measure the features that were chosen. This package needs scikit-learn (`pip install saelab[selection]`).
"""
