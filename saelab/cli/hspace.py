"""`saelab hspace`: sample a denoiser, find directions of its bottleneck, edit with them, report what they do."""

from typing import Any

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError
from saelab.base.files import try_file
from saelab.cli.commands import command, group, of
from saelab.cli.configuration import near
from saelab.models.denoiser import load_denoiser

METHODS = ("pca", "joint-pca", "jacobian", "mean-difference", "boundary")


DEVICE = of(load_denoiser, "device")


def opened(trajectory: str, *, denoiser: str = "digits-unet", device: Any = DEVICE) -> tuple[Any, Any]:
    """A denoiser and a trajectory of it.

    Args:
        trajectory: a file that `saelab hspace sample` wrote
        denoiser: digits-unet, mnist-unet, a folder or a name on the hub
    """
    found = hspace.Trajectory.load(trajectory)
    loaded = saelab.load_denoiser(denoiser, device=device)
    if not loaded.made(found.denoiser):
        raise ConfigError(f"{trajectory} is of another denoiser than {loaded.name}: give --denoiser")
    return loaded, found


DENOISER, STRENGTHS, MODE = of(opened, "denoiser"), of(hspace.effects, "strengths"), of(hspace.edit, "mode")


@command(hspace.sample, without="edit cond record")
def sample(
    *, denoiser: Any = DENOISER, device: Any = DEVICE, out: str | None = None, n: int = 64, eta: float = 1.0, **how: Any,
) -> int:  # fmt: skip
    """Draw samples and write what it takes to draw them again.

    Args:
        out: the file to write

    Examples:
        saelab hspace sample --denoiser digits-unet --n 64 --out digits.safetensors
    """
    loaded = saelab.load_denoiser(denoiser, device=device)
    path = try_file(out or f"{loaded.name}.trajectory.safetensors")
    trajectory = hspace.sample(loaded, n, eta=eta, **how)
    trajectory.save(path)
    print(repr(trajectory))
    print(f"trajectory: {path}")
    return 0


@command(opening=opened)
def directions(
    denoiser: Any, trajectory: Any, /, *, out: str | None = None, method: str = "pca", components: int = 8,
    step: int | None = None, sample: int = 0, positive: int | None = None, negative: int | None = None,
) -> int:  # fmt: skip
    """Find directions of the bottleneck in a trajectory.

    Args:
        out: the file to write
        method: pca, joint-pca, jacobian, mean-difference or boundary
        components: how many (pca, joint-pca, jacobian)
        step: which step, 0 the noisiest (jacobian: the middle unless given; boundary: searched unless given)
        sample: the sample whose Jacobian it is
        positive: the class to go to (mean-difference, boundary)
        negative: the class to come from (mean-difference; all others unless given)

    Examples:
        saelab hspace directions digits.safetensors --components 8 --out pca.safetensors
        saelab hspace directions digits.safetensors --out three.safetensors \\
                                 --method mean-difference --positive 3
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; {near(method, METHODS)}")
    path = try_file(out or f"{denoiser.name}.{method}.safetensors")
    if method in ("pca", "joint-pca"):
        made = hspace.pca(trajectory, components, joint=method == "joint-pca")
    elif method == "jacobian":
        if not 0 <= sample < len(trajectory):
            raise ConfigError(f"there is no sample {sample}: the trajectory has {len(trajectory)}")
        step = len(trajectory.timesteps) // 2 if step is None else step
        made = hspace.jacobian(denoiser, trajectory[sample : sample + 1], step, components)
    else:
        made = _of_class(denoiser, trajectory, method, positive, negative, step)
    made.save(path)
    print(made.to_pandas().to_string(index=False))
    print(f"directions: {path}")
    return 0


def _of_class(
    denoiser: Any, trajectory: Any, method: str, positive: int | None, negative: int | None, step: int | None
) -> "hspace.Directions":
    """Directions towards a class, by the denoiser's own classifier."""
    if positive is None:
        raise ConfigError(f"{method} needs --positive, the class to go to")
    labels = denoiser.classifier()(trajectory.samples).argmax(1)
    if method == "mean-difference":
        return hspace.mean_difference(trajectory, labels, positive, negative)
    if negative is not None:
        raise ConfigError("a boundary is of a class against all others: leave out --negative")
    return hspace.boundary(trajectory, (labels == positive).long(), step)


@command(hspace.edit, opening=opened, without="direction_or_list window mask record")
def edit(
    denoiser: Any, trajectory: Any, /, *, directions: str, out: str | None = None, index: int = 0, strength: float = 2.0,
    **how: Any,
) -> int:  # fmt: skip
    """Draw the samples of a trajectory again, with a direction added.

    Args:
        directions: a file that `saelab hspace directions` wrote
        out: the file to write
        index: which of the directions
        strength: in units of the direction's scale

    Examples:
        saelab hspace edit digits.safetensors --directions three.safetensors \\
                           --strength 1 --out edited.safetensors
    """
    several = hspace.Directions.load(directions, denoiser)
    if not 0 <= index < len(several):
        raise ConfigError(f"there is no direction {index}: the file has {len(several)}")
    path = try_file(out or f"{denoiser.name}.edited.safetensors")
    edited = hspace.edit(denoiser, trajectory, several[index], strength, **how)
    edited.save(path)
    change = float((edited.samples - trajectory.samples).square().mean().sqrt())
    print(f"{several[index]!r} at strength {strength:g}: the pixels changed by {change:.3f} (root mean square)")
    print(f"trajectory: {path}")
    return 0


@command(hspace.effects, opening=opened, without="strengths classifier classes targets data")
def report(
    denoiser: Any, trajectory: Any, /, *, directions: str, out: str | None = None, strength: Any = STRENGTHS,
    mode: Any = MODE, **how: Any,
) -> int:  # fmt: skip
    """Measure on a page what directions do, against random ones as large.

    Args:
        directions: a file that `saelab hspace directions` wrote
        out: the page to write

    Examples:
        saelab hspace report digits.safetensors --directions pca.safetensors \\
                             --strength -2 0 2 --out report.html
    """
    several = hspace.Directions.load(directions, denoiser)
    path = try_file(out or f"{denoiser.name}.report.html")
    effects = hspace.effects(denoiser, trajectory, several, strength, mode=mode, **how)
    effects.to_html(path, f"{denoiser.name}: {several.method}")
    most = max(effects.table.strength)
    print(f"change of each class's mean probability at strength {most:g}")
    print(effects.matrix(most).round(3).to_string())
    print(f"report: {path}")
    return 0


hspace_ = group("hspace", sample, directions, edit, report)
