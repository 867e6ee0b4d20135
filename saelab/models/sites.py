"""Sites: places in a module where an activation can be read and written, by PyTorch hooks and nothing else.

`record` and `intervene` work on any `torch.nn.Module`; `LanguageModel` gives them names, positions and tokens. A path
names a submodule and means its output; `path.input` means its input. Of several tensors the first is meant.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from saelab.base.errors import SiteError
from saelab.models.hooks import editing, first_runs
from saelab.models.site_names import MODULE, Side
from saelab.models.tokens import Tokens
from saelab.models.wrappers import eager

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


@dataclass(frozen=True)
class Site:
    """A resolved place: `path` is a module, `side` says whether its input or its output is meant.

    `width` is the length of the vector at each position, heads flattened; `heads` their number where there are any.
    """

    name: str
    path: str
    side: Side
    width: int
    kind: str = MODULE
    heads: int | None = None

    @property
    def d_head(self) -> int | None:
        """Width of one head."""
        return self.width // self.heads if self.heads else None

    @property
    def shared(self) -> bool:
        """Whether others hold the same tensor: the stream between attention and MLP goes round the norm that reads
        it, so that an edit must be written into the tensor itself."""
        return self.name.endswith("hook_resid_mid")


@dataclass(frozen=True)
class Call:
    """How the outer module was called: what `fn` gets as `where` on a plain module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record(module: nn.Module, path: str | Sequence[str], /, *args: Any, **kwargs: Any) -> Any:
    """Run `module(*args, **kwargs)` up to the last of the paths and give the activation there.

    One path gives a tensor, several a dict by path. The forward pass stops once all are seen; a submodule that runs
    several times gives its first run. Gradients follow the caller's mode. Raises `SiteError` for a path that does
    not exist (near names listed), never runs or holds no tensor.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> record(net, "1", torch.ones(4, 2)).shape
    torch.Size([4, 3])
    >>> sorted(record(net, ["0.input", "2"], torch.ones(4, 2)))
    ['0.input', '2']
    """
    paths = [path] if isinstance(path, str) else list(path)
    with eager(module):
        found = first_runs({name: resolve(module, name) for name in paths}, lambda: module(*args, **kwargs))
    return found[path] if isinstance(path, str) else found


@contextlib.contextmanager
def intervene(
    module: nn.Module,
    path: str,
    fn: Callable[[Shaped[Tensor, "..."], Any], Shaped[Tensor, "..."]],
    locate: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Within it, the activation at `path` is replaced by `fn(activation, where)` in every forward pass of `module`.

    `where` is the `Call` with which `module` ran (its args and kwargs), or what `locate(args, kwargs)` makes of it.
    Interventions nest: the outer one acts first. Hooks are gone afterwards, whatever happens. Threads, derivatives and
    gradient checkpointing: as `LanguageModel.intervene`. Raises `SiteError` for an unknown path, `InterventionError` when
    `fn` gives no tensor of the same shape.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with intervene(net, "0", lambda x, where: -torch.ones_like(x)):
    ...     net(torch.ones(1, 2))
    tensor([[0., 0., 0.]])
    """
    target, side = resolve(module, path)
    with editing({module: locate or Call}, target, side, fn):
        yield


def resolve(module: nn.Module, path: str) -> tuple[nn.Module, Side]:
    """The submodule at `path` and the side meant: a module of that very name first, then `.input` and `.output`.

    Raises `SiteError` that lists near names.
    """
    modules = dict(module.named_modules())
    if path in modules:
        return modules[path], "output"
    stem, _, side = path.rpartition(".")
    if stem in modules and side in ("input", "output"):
        return modules[stem], side  # type: ignore[return-value]
    raise unknown_site(path, (name for name in modules if name))


def unknown_site(name: str, known: Iterable[str], hint: str = "") -> SiteError:
    """The error for a site that is not there, with the nearest names that are."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)
    return SiteError(f"no site {name!r}; near it: {', '.join(near) or 'nothing'}.{hint}")


def run_recording(
    lm: "LanguageModel",
    tokens: Tokens,
    sites: Sequence[Site],
    *,
    gradients: bool = False,
    label_seeds: Sequence[int] | None = None,
) -> Any:
    """One forward pass of the plain model: {site name: activations [batch, position, width]}, heads flattened.

    The pass stops after the last site. With `gradients` it goes on to the loss and gives (activations, gradients):
    the gradient of the *summed* next-token cross-entropy over real targets, so that a row's does not depend on the
    batch it came in. With `label_seeds`, one a text, the labels are not the true next tokens but drawn from the model's
    own distribution. The backward pass ends at the earliest site; the parameters get no gradient, and their
    `requires_grad` flags are as before afterwards. Values are in the model's dtype.
    """
    targets = {site.name: lm.place(site) for site in sites}
    if not gradients:
        # no_grad rather than inference_mode, whose tensors could not be trained on
        with torch.no_grad():
            found = first_runs(targets, lambda: lm.forward(tokens))
        return {name: flat(x) for name, x in found.items()}
    with torch.inference_mode(False), torch.enable_grad(), frozen(lm.runner):
        losses: list[Tensor] = []
        live = first_runs(
            targets,
            lambda: losses.append(lm.token_losses(tokens, label_seeds).sum()),
            keep=Tensor.requires_grad_,
            stop=False,
        )
        slopes = torch.autograd.grad(losses[0], list(live.values()))
    found = {name: flat(x.detach()) for name, x in live.items()}
    return found, {name: flat(slope) for name, slope in zip(live, slopes, strict=True)}


def flat(x: Shaped[Tensor, "*rest"]) -> Shaped[Tensor, "*flattened"]:
    """[batch, position, heads, d_head] as [batch, position, width]; others as they are.

    >>> flat(torch.zeros(2, 5, 4, 8)).shape
    torch.Size([2, 5, 32])
    """
    return x.flatten(2) if x.ndim == 4 else x


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: nothing before the first site is kept, and nothing for the weights after it."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
