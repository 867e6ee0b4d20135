"""The errors that saelab raises: each states the numbers and the way out."""


class SaelabError(Exception):
    """Base of every error that saelab raises on purpose."""


class ConfigError(SaelabError, ValueError):
    """An argument or a configuration that cannot work."""


class SiteError(SaelabError, KeyError):
    """A site that the model does not have, or whose width is not the one asked for."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class FormatError(SaelabError, ValueError):
    """A file that is not what its name or manifest says."""


class DataError(SaelabError, ValueError):
    """Text, tokens or activations that cannot be used."""


class CheckpointError(SaelabError, RuntimeError):
    """A run that cannot be written, continued or reopened."""


class InterventionError(SaelabError, RuntimeError):
    """An intervention that did not, or could not, do what it says."""
