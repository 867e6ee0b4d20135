"""`saelab hspace`: sample a denoiser, find directions of its bottleneck, edit with them, report what they do."""

from collections.abc import Callable
from typing import Any

import saelab
from saelab.base.errors import ConfigError
from saelab.base.files import try_file
from saelab.cli.options import DEVICE, REQUIRED, Command, Of, Option, natural, near, positive

METHODS = ("pca", "joint-pca", "jacobian", "mean-difference", "boundary")

OPTIONS = (
    Option("action", str, REQUIRED, "what to do: sample, directions, edit or report", positional=True),
    Option("trajectory", str, None, "a file that `saelab hspace sample` wrote", positional=True),
    Option("denoiser", str, "digits-unet", "digits-unet, mnist-unet, a folder or a name on the hub"),
    DEVICE,
    Option("out", str, None, "the file to write"),
    Option("n", positive, 64, "sample: how many"),
    Option("steps", positive, Of("saelab.hspace.sampling:sample", "steps"), "sample: of denoising"),
    Option("eta", float, 1.0, "sample: 0 deterministic (DDIM) to 1 (DDPM), which has more to find directions in"),
    Option("seed", natural, Of("saelab.hspace.sampling:sample", "seed"), "of the samples, and of random controls"),
    Option("method", str, "pca", f"directions: {', '.join(METHODS)}"),
    Option("components", positive, 8, "directions: how many (pca, joint-pca, jacobian)"),
    Option("step", int, None, "directions: which step (jacobian: default the middle; boundary: default searched)"),
    Option("sample", natural, 0, "directions: the sample whose Jacobian it is"),
    Option("positive", natural, None, "directions: the class to go to (mean-difference, boundary)"),
    Option("negative", natural, None, "directions: the class to come from (default: all others)"),
    Option("directions", str, None, "edit, report: a file that `saelab hspace directions` wrote"),
    Option("index", natural, 0, "edit: which of the directions"),
    Option(
        "strength",
        float,
        Of("saelab.hspace.reporting:effects", "strengths"),
        "edit (one), report: in units of the direction's scale",
        many=True,
    ),
    Option("mode", str, Of("saelab.hspace.editing:edit", "mode"), "edit, report: symmetric or asymmetric"),
)


def run(values: dict[str, Any]) -> int:
    """Do the action that is named."""
    if values["action"] not in ACTIONS:
        raise ConfigError(f"there is no action {values['action']!r}; {near(values['action'], ACTIONS)}")
    return ACTIONS[values["action"]](values)


def _sample(values: dict[str, Any]) -> int:
    from saelab import hspace

    denoiser = saelab.load_denoiser(values["denoiser"], device=values["device"])
    path = try_file(values["out"] or f"{denoiser.name}.trajectory.safetensors")
    trajectory = hspace.sample(denoiser, n=values["n"], steps=values["steps"], eta=values["eta"], seed=values["seed"])
    trajectory.save(path)
    print(repr(trajectory))
    print(f"trajectory: {path}")
    return 0


def _directions(values: dict[str, Any]) -> int:
    denoiser, trajectory = _loaded(values)
    if values["method"] not in METHODS:
        raise ConfigError(f"there is no method {values['method']!r}; {near(values['method'], METHODS)}")
    path = try_file(values["out"] or f"{denoiser.name}.{values['method']}.safetensors")
    made = _made(values, denoiser, trajectory)
    made.save(path)
    print(made.to_pandas().to_string(index=False))
    print(f"directions: {path}")
    return 0


def _made(values: dict[str, Any], denoiser: Any, trajectory: Any) -> Any:
    from saelab import hspace

    method, k = values["method"], values["components"]
    if method in ("pca", "joint-pca"):
        return hspace.pca(trajectory, k, joint=method == "joint-pca")
    if method == "jacobian":
        step = len(trajectory.timesteps) // 2 if values["step"] is None else values["step"]
        one = trajectory[values["sample"] : values["sample"] + 1]
        if not len(one):
            raise ConfigError(f"there is no sample {values['sample']}: the trajectory has {len(trajectory)}")
        return hspace.jacobian(denoiser, one, step, k)
    if values["positive"] is None:
        raise ConfigError(f"{method} needs --positive, the class to go to")
    labels = denoiser.classifier()(trajectory.samples).argmax(1)
    if method == "mean-difference":
        return hspace.mean_difference(trajectory, labels, values["positive"], values["negative"])
    if values["negative"] is not None:
        raise ConfigError("a boundary is of a class against all others: leave out --negative")
    return hspace.boundary(trajectory, (labels == values["positive"]).long(), values["step"])


def _edit(values: dict[str, Any]) -> int:
    from saelab import hspace

    denoiser, trajectory = _loaded(values)
    directions = _read_directions(values, denoiser)
    if values["index"] >= len(directions):
        raise ConfigError(f"there is no direction {values['index']}: the file has {len(directions)}")
    direction = directions[values["index"]]
    strength = float(values["strength"][-1])
    path = try_file(values["out"] or f"{denoiser.name}.edited.safetensors")
    edited = hspace.edit(denoiser, trajectory, direction, strength, mode=values["mode"])
    edited.save(path)
    change = float((edited.samples - trajectory.samples).square().mean().sqrt())
    print(f"{direction!r} at strength {strength:g}: the pixels changed by {change:.3f} (root mean square)")
    print(f"trajectory: {path}")
    return 0


def _report(values: dict[str, Any]) -> int:
    from saelab import hspace

    denoiser, trajectory = _loaded(values)
    directions = _read_directions(values, denoiser)
    path = try_file(values["out"] or f"{denoiser.name}.report.html")
    found = hspace.effects(
        denoiser,
        trajectory,
        directions,
        [float(s) for s in values["strength"]],
        seed=values["seed"],
        mode=values["mode"],
    )
    found.to_html(path, f"{denoiser.name}: {directions.method}")
    most = max(found.table.strength)
    print(f"change of each class's mean probability at strength {most:g}")
    print(found.matrix(most).round(3).to_string())
    print(f"report: {path}")
    return 0


def _loaded(values: dict[str, Any]) -> tuple[Any, Any]:
    from saelab import hspace

    if values["trajectory"] is None:
        raise ConfigError(f"saelab hspace {values['action']} needs a trajectory: make one with saelab hspace sample")
    trajectory = hspace.Trajectory.load(values["trajectory"])
    denoiser = saelab.load_denoiser(values["denoiser"], device=values["device"])
    if not denoiser.made(trajectory.denoiser):
        raise ConfigError(f"{values['trajectory']} is of another denoiser than {denoiser.name}: give --denoiser")
    return denoiser, trajectory


def _read_directions(values: dict[str, Any], denoiser: Any) -> Any:
    from saelab import hspace

    if values["directions"] is None:
        raise ConfigError(f"saelab hspace {values['action']} needs --directions, a file of saelab hspace directions")
    return hspace.Directions.load(values["directions"], denoiser)


ACTIONS: dict[str, Callable[[dict[str, Any]], int]] = {
    "sample": _sample,
    "directions": _directions,
    "edit": _edit,
    "report": _report,
}

COMMAND = Command(
    name="hspace",
    summary="Sample a diffusion denoiser, find directions of its bottleneck, edit with them, report what they do.",
    examples=(
        "saelab hspace sample --denoiser digits-unet --n 64 --out digits.safetensors",
        "saelab hspace directions digits.safetensors --method pca --components 8 --out pca.safetensors",
        "saelab hspace directions digits.safetensors --method mean-difference --positive 3 --out three.safetensors",
        "saelab hspace edit digits.safetensors --directions three.safetensors --strength 1 --out edited.safetensors",
        "saelab hspace report digits.safetensors --directions pca.safetensors --strength -2 0 2 --out report.html",
    ),
    options=OPTIONS,
    run=run,
)
