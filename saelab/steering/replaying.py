"""Do again what a receipt says: the same model, autoencoders, operations, prompts and seeds."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.base.errors import ConfigError, FormatError
from saelab.base.files import user_path
from saelab.base.manifests import (
    COUNT,
    FIGURE,
    FLAG,
    INTEGER,
    NUMBER,
    SIZE,
    TABLE,
    TEXT,
    Kind,
    Schema,
    check,
    exactly,
    read_json,
)  # fmt: skip
from saelab.base.protocols import Dictionary
from saelab.models.generation import generate_text
from saelab.models.identity import weights_digest
from saelab.models.tokens import padded
from saelab.steering.apply import steer, steer_rows
from saelab.steering.operations import Operation
from saelab.steering.receipt import FORMAT
from saelab.steering.scope import Scope
from saelab.steering.vectors import Direction

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


_SEED = Kind(
    "a whole number, or one and a row for each prompt",
    lambda value: INTEGER.holds(value) or isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(INTEGER.holds, pair)) for pair in value),
)  # fmt: skip
_PROMPTS = Kind(
    "a list of prompts, each of one token id or more",
    lambda value: isinstance(value, list) and bool(value) and all(
        isinstance(row, list) and bool(row) and all(map(COUNT.holds, row)) for row in value),
)  # fmt: skip
OPERATION: Schema = {
    "kind": TEXT, "source": TABLE, "latent": COUNT.or_null(), "strength": FIGURE.or_null(), "unit": TEXT.or_null(),
    "site": TEXT.or_null(), "scope": TABLE, "to": TEXT,
}  # fmt: skip
RECEIPT: Schema = {
    "format": exactly(FORMAT), "versions": {"*": TEXT}, "model": {"name": TEXT, "digest": TEXT},
    "autoencoders": [{"path": TEXT.or_null(), "digest": TEXT, "description": TEXT}],
    "generations": [{
        "prompts": _PROMPTS, "texts": [TEXT], "prompt_texts": [TEXT], "max_new_tokens": SIZE, "temperature": NUMBER,
        "seed": _SEED,
        "use_cache": FLAG, "contexts": [{"rows?": [[OPERATION]], "every_row?": [OPERATION]}],
    }],
}  # fmt: skip


def replay(
    receipt: str | os.PathLike[str] | Mapping[str, Any],
    lm: "LanguageModel | None" = None,
    saes: Sequence[Dictionary] = (),
) -> list[list[str]]:
    """Generate again what a receipt (its file, or `Receipt.to_dict()`) has generated: the texts of each `generate`.

    The texts are the same on the same machine with the same versions; on another, sums in another order may in the end
    choose another token. Everything is checked by digest: model and autoencoders must be those of the receipt.

    Args:
        lm: the model; by default it is loaded by the name in the receipt.
        saes: autoencoders; those missing are loaded from the folders in the receipt.

    Raises `FormatError` for a file that is no receipt, `ConfigError` when nothing was generated under it, or the model
    or an autoencoder is another one or nowhere.

    >>> steering.replay("receipt.json")  # doctest: +SKIP
    [[' strong and free']]
    """
    from saelab.models.language import load_model

    content = receipt if isinstance(receipt, Mapping) else read(receipt)
    check(content, RECEIPT, "the receipt")
    if not content["generations"]:
        raise ConfigError("nothing was generated in this steering context (lm.generate), so there is no text to replay")
    lm = load_model(content["model"]["name"]) if lm is None else lm
    if lm.digest != content["model"]["digest"]:
        raise ConfigError(f"the receipt is of {content['model']['name']!r} with weights {content['model']['digest'][:12]}, "
                          f"not of {lm.name!r} with {lm.digest[:12]}: give the model that it was made with")  # fmt: skip
    found = _autoencoders(content["autoencoders"], saes)
    return [_again(lm, generation, found) for generation in content["generations"]]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a receipt's file; `FormatError` when it is none, or of another version."""
    file = user_path(path)
    try:
        return dict(read_json(file, RECEIPT))
    except FormatError as error:
        raise FormatError(f"{file} is no receipt that this version's Receipt.save wrote: {error}") from error


def _autoencoders(entries: Sequence[Mapping[str, Any]], given: Sequence[Any]) -> list[Any]:
    """The autoencoders of the receipt, in its order: those given, by digest, else from their folders."""
    from saelab.autoencoders.sae import SAE

    known = {weights_digest(sae): sae for sae in given}
    found = []
    for entry in entries:
        sae = known.get(entry["digest"])
        if sae is None and entry["path"] is not None and Path(entry["path"]).is_dir():
            sae = SAE.load(entry["path"])
        if sae is None:
            raise ConfigError(f"the receipt needs {entry['description']} with weights {entry['digest'][:12]}, which was "
                              f"saved at {entry['path']} when it was written: give it (saes=, --sae)")  # fmt: skip
        if weights_digest(sae) != entry["digest"]:
            raise ConfigError(f"the autoencoder in {entry['path']} is another one than the receipt's: it had weights "
                              f"{entry['digest'][:12]}. Give the old one (saes=, --sae)")  # fmt: skip
        found.append(sae)
    return found


def _again(lm: "LanguageModel", generation: Mapping[str, Any], saes: list[Dictionary]) -> list[str]:
    seed = generation["seed"]
    with contextlib.ExitStack() as contexts:
        for context in generation["contexts"]:
            if "rows" in context:
                made: dict[str, Operation] = {}
                rows = [[_once(values, saes, made) for values in row] for row in context["rows"]]
                contexts.enter_context(steer_rows(lm, rows))
            else:
                check(context, {"every_row": [OPERATION]}, "the receipt")
                contexts.enter_context(steer(lm, *(_operation(values, saes) for values in context["every_row"])))
        texts = generate_text(
            lm,
            padded(generation["prompts"], 0),
            generation["max_new_tokens"],
            generation["temperature"],
            seed if isinstance(seed, int) else [(int(first), int(row)) for first, row in seed],
            generation["use_cache"],
        )
    return list(texts)


def _once(values: Mapping[str, Any], saes: list[Dictionary], made: dict[str, Operation]) -> Operation:
    """The operation; the same object for the same description, so that its rows go together as they did."""
    return made.setdefault(json.dumps(values, sort_keys=True), _operation(values, saes))


def _operation(values: Mapping[str, Any], saes: list[Dictionary]) -> Operation:
    source = values["source"]
    try:
        of = saes[source["sae"]] if values["latent"] is not None else Direction.from_dict(source)
        return Operation(**{**values, "source": of, "scope": Scope(**values["scope"])})
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(f"the receipt describes no operation ({error!r}): {values}") from error
