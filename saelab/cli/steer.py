"""`saelab steer`: generate text under steering, find latents to steer with, or replay a receipt."""

from typing import Any

import saelab
from saelab.base.errors import ConfigError
from saelab.cli.evaluate import load
from saelab.cli.options import DEVICE, ITS_PREPEND_BOS, Command, Of, Option, natural, positive

DIFFERENT = 1

GENERATE = "saelab.models.language:LanguageModel.generate"
OPTIONS = (
    Option("sae", str, None, "folder of a run or of a saved SAE"),
    Option("latent", natural, (), "the latents to steer with", many=True),
    Option("operation", str, "add", "add, clamp, scale, ablate, project_out or cap"),
    Option("strength", float, 4.0, "in units; a factor for scale, ignored by ablate and project_out"),
    Option("unit", str, None, "max_activation, activation, residual_norm or std (default: max_activation)"),
    Option("site", str, None, "where to steer (default: the site that the SAE was trained on)"),
    Option("prompt", str, (), "texts to continue", many=True),
    ITS_PREPEND_BOS,
    Option("max-new-tokens", positive, 40, "tokens to generate"),
    Option("temperature", float, Of(GENERATE, "temperature"), "0 is greedy"),
    Option("seed", natural, Of(GENERATE, "seed"), "seed of the draws"),
    Option("model", str, None, "the model (default: the one that the SAE was trained on)"),
    DEVICE,
    Option("receipt", str, None, "write what was done to this JSON file", written=True),
    Option("find", str, (), "texts about a concept: list latents that fire on them, and stop", many=True),
    Option("replay", str, None, "a receipt: generate its texts again and compare"),
)


def run(values: dict[str, Any]) -> int:
    """0 done, 1 when a replay gave another text."""
    if values["replay"]:
        return _replay(values)
    if values["sae"] is None:
        raise ConfigError("whose latents? Give --sae, the folder of a run or of a saved SAE (or --replay a receipt)")
    sae = load(values["sae"])
    lm = saelab.load_model(_model(values, sae), device=values["device"])
    if values["find"]:
        from saelab import steering

        print(steering.find(lm, sae, values["find"]).to_string(index=False))
        return 0
    return _generate(values, lm, sae)


def _generate(values: dict[str, Any], lm: Any, sae: Any) -> int:
    """Print the plain and the steered text of each prompt, and the receipt."""
    from saelab.steering.operations import WITH_STRENGTH, Operation

    if not values["latent"] or not values["prompt"]:
        raise ConfigError("give --latent (saelab steer --find 'some text' lists candidates) and --prompt")
    kind = values["operation"]
    strength = values["strength"] if kind in WITH_STRENGTH else None
    made = [Operation(kind, sae, latent, strength, values["unit"], values["site"]) for latent in values["latent"]]
    how = {name: values[name] for name in ("max_new_tokens", "temperature", "seed")}
    how["prepend_bos"] = sae.metadata.get("prepend_bos") if values["prepend_bos"] is None else values["prepend_bos"]
    plain = lm.generate(list(values["prompt"]), **how)
    with lm.steer(*made) as receipt:
        steered = lm.generate(list(values["prompt"]), **how)
    for prompt, before, after in zip(values["prompt"], plain, steered, strict=True):
        print(f"prompt:  {prompt}\nplain:   {before}\nsteered: {after}\n")
    print(receipt.to_pandas().to_string(index=False))
    if values["receipt"]:
        receipt.save(values["receipt"])
        print(f"receipt: {values['receipt']}")
    return 0


def _replay(values: dict[str, Any]) -> int:
    from saelab import steering
    from saelab.steering.replaying import read

    content = read(values["replay"])
    lm = saelab.load_model(values["model"] or content["model"]["name"], device=values["device"])
    again = steering.replay(content, lm, [load(values["sae"])] if values["sae"] else [])
    same = True
    for generation, texts in zip(content["generations"], again, strict=True):
        for prompt, before, after in zip(generation["prompt_texts"], generation["texts"], texts, strict=True):
            same &= before == after
            print(f"prompt:   {prompt}\nreceipt:  {before}\nreplayed: {after}\n")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    print("the same text" if same else f"not the same text: another machine, or other versions (then: {versions})")
    return 0 if same else DIFFERENT


def _model(values: dict[str, Any], sae: Any) -> str:
    name = values["model"] or sae.metadata.get("model")
    if name is None:
        raise ConfigError("this SAE does not say which model it was trained on: give --model")
    return str(name)


COMMAND = Command(
    name="steer",
    summary="Generate text under steering, find latents to steer with, or replay a receipt.",
    examples=(
        "saelab steer --sae runs/demo --find 'war and peace' 'the army'",
        "saelab steer --sae runs/demo --latent 123 --strength 4 --prompt 'The state of the union is'",
        "saelab steer --sae runs/demo --latent 9 --operation ablate --prompt 'My fellow' --receipt receipt.json",
        "saelab steer --replay receipt.json",
    ),
    options=OPTIONS,
    run=run,
)
