"""`saelab steer`: generate text under steering, find latents to steer with, or replay a receipt."""

from collections.abc import Sequence
from typing import Any

import saelab
from saelab import steering
from saelab.base.errors import ConfigError
from saelab.cli.commands import command
from saelab.cli.inputs import DEVICE, ITS_MODEL, known, load
from saelab.cli.values import File
from saelab.models.language import LanguageModel
from saelab.steering.operations import WITH_STRENGTH, Operation
from saelab.steering.replaying import read

DIFFERENT = 1


@command(LanguageModel.generate, without="self prompts use_cache")
def steer(
    *, sae: str | None = None, latent: Sequence[int] = (), operation: str = "add", strength: float = 4.0,
    unit: str | None = None, site: str | None = None, prompt: Sequence[str] = (), max_new_tokens: int = 40,
    model: Any = ITS_MODEL, device: Any = DEVICE, receipt: File | None = None, find: Sequence[str] = (),
    replay: str | None = None, **how: Any,
) -> int:  # fmt: skip
    """0 done, 1 when a replay gave another text.

    Args:
        sae: folder of a run or of a saved SAE
        latent: the latents to steer with
        operation: add, clamp, scale, ablate, project_out or cap
        strength: in units; a factor for scale, ignored by ablate and project_out
        unit: max_activation, activation, residual_norm or std (default: max_activation)
        site: where to steer (default: the site that the SAE was trained on)
        prompt: texts to continue
        prepend_bos: begin each text with the model's BOS (default: as in the training)
        receipt: write what was done to this JSON file
        find: texts about a concept: list latents that fire on them, and stop
        replay: a receipt: generate its texts again and compare

    Examples:
        saelab steer --sae runs/demo --find 'war and peace' 'the army'
        saelab steer --sae runs/demo --latent 123 --prompt 'The state of the union is'
        saelab steer --sae runs/demo --latent 9 --operation ablate \\
                     --prompt 'My fellow' --receipt receipt.json
        saelab steer --replay receipt.json
    """
    if replay:
        return _replay(replay, sae, model, device)
    if sae is None:
        raise ConfigError("whose latents? Give --sae, the folder of a run or of a saved SAE (or --replay a receipt)")
    trained = load(sae)
    lm = saelab.load_model(known(trained, "model", model), device=device)
    if find:
        print(steering.find(lm, trained, find).to_string(index=False))
        return 0
    if not latent or not prompt:
        raise ConfigError("give --latent (saelab steer --find 'some text' lists candidates) and --prompt")
    amount = strength if operation in WITH_STRENGTH else None
    made = [Operation(operation, trained, one, amount, unit, site) for one in latent]
    if how["prepend_bos"] is None:
        how["prepend_bos"] = trained.metadata.get("prepend_bos")
    plain = lm.generate(prompt, max_new_tokens, **how)
    with lm.steer(*made) as done:
        steered = lm.generate(prompt, max_new_tokens, **how)
    for text, before, after in zip(prompt, plain, steered, strict=True):
        print(f"prompt:  {text}\nplain:   {before}\nsteered: {after}\n")
    print(done.to_pandas().to_string(index=False))
    if receipt:
        done.save(receipt)
        print(f"receipt: {receipt}")
    return 0


def _replay(receipt: str, sae: str | None, model: str | None, device: str) -> int:
    content = read(receipt)
    lm = saelab.load_model(model or content["model"]["name"], device=device)
    again = steering.replay(content, lm, [load(sae)] if sae else [])
    same = True
    for generation, texts in zip(content["generations"], again, strict=True):
        for prompt, before, after in zip(generation["prompt_texts"], generation["texts"], texts, strict=True):
            same &= before == after
            print(f"prompt:   {prompt}\nreceipt:  {before}\nreplayed: {after}\n")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    print("the same text" if same else f"not the same text: another machine, or other versions (then: {versions})")
    return 0 if same else DIFFERENT
