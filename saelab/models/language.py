"""A language model whose activations can be read, replaced and traced to tokens."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError, InterventionError, SiteError
from saelab.base.lazy import provided
from saelab.base.protocols import Dictionary, Receipt
from saelab.models import generation, identity, loading
from saelab.models.backends import backend_of
from saelab.models.hooks import editing
from saelab.models.offloading import device_of
from saelab.models.reach import reached
from saelab.models.site_names import Side
from saelab.models.sites import Site, flat, run_recording
from saelab.models.texts import UNFILLED, given
from saelab.models.tokens import Tokens, adds_bos, checked, encode, padded, real_places, separator_id, special_ids
from saelab.models.where import Where
from saelab.models.wrappers import looked_through

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.splice import Splice


def load_model(
    name_or_object: Any,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    backend: Literal["transformers", "transformer-lens"] = "transformers",
) -> "LanguageModel":
    """A language model by name, from a folder, or around an object of transformers or TransformerLens.

    "smollm2-135m" needs no network. Any other string is a name on the Hugging Face hub (or in its cache) or a local
    folder; these load in evaluation mode, in fp32 unless `dtype`, on the GPU where there is one. Objects
    (transformers' causal models, `TransformerBridge`, `HookedTransformer`) are wrapped as they are, on their device,
    in their dtype and mode, and never changed; a transformers model takes `tokenizer=` (object, name or folder) or
    reads token ids only. With `backend="transformer-lens"` what was loaded is driven by a `TransformerBridge` (`lm.model`),
    with eager attention: the same verbs and sites, and its own hook points too; the digest is the plain model's.

    Args:
        device: as "cpu", "cuda:0" or "mps", or "auto": the GPU where there is one.

    Raises `ConfigError`, with the way out, when nothing can be loaded, the object is no language model, or no bridge can
    be built (never around an object, whose modules it would replace). Warns when an object is in training mode with dropout.

    >>> lm = load_model("smollm2-135m")  # doctest: +SKIP
    >>> lm.record("The state of the union", "blocks.3.hook_resid_post").shape  # doctest: +SKIP
    torch.Size([1, 5, 576])
    """
    dtype = checks.dtype_of(dtype)
    bridged = checks.choice("backend", backend, ("transformers", "transformer-lens")) == "transformer-lens"
    if not isinstance(name_or_object, str | os.PathLike):
        own = isinstance(name_or_object, LanguageModel)
        lm = name_or_object if own else _around(name_or_object, tokenizer, device, dtype)
        if bridged and not hasattr(lm.backend, "hooks"):
            raise ConfigError(f"a bridge would replace the modules of your {type(lm.model).__name__}: give a name or a folder, "
                              "or a TransformerBridge that you built yourself")  # fmt: skip
        return lm
    name, place = os.fspath(name_or_object), checks.device_of(device)
    digest = None
    if name == loading.BUNDLED:
        from saelab.models.bundled import load_smollm2

        model, own_tokenizer, digest = load_smollm2(place, dtype)
        tokenizer = own_tokenizer if tokenizer is None else loading.pretrained_tokenizer(tokenizer)
    else:
        model, tokenizer = loading.pretrained(name, place, dtype, tokenizer)
    if bridged:
        from saelab.models.adapters import bridge_around

        digest = digest or identity.weights_digest(model)
        model = bridge_around(model, tokenizer, name)
    return LanguageModel(model, tokenizer, name, digest)


def _around(model: Any, tokenizer: Any, device: str | torch.device, dtype: torch.dtype | None) -> "LanguageModel":
    own = getattr(model, "tokenizer", None) if tokenizer is None else loading.pretrained_tokenizer(tokenizer)
    lm = LanguageModel(model, own)
    asked = lm.device if device == "auto" else checks.device_of(device)
    if asked.type != lm.device.type or asked.index not in (None, lm.device.index) or dtype not in (None, lm.dtype):
        raise ConfigError(
            f"the model is on {lm.device} in {lm.dtype}, and objects are wrapped as they are: "
            f"move it yourself (model.to({str(asked)!r}, {dtype or lm.dtype})) before load_model"
        )
    identity.warn_of_dropout(lm.inner)
    return lm


class LanguageModel:
    """A causal language model with named sites; made by `load_model`.

    `model` and `tokenizer` are the wrapped objects, untouched. `special_ids` are the tokenizer's special tokens,
    `separator_id` goes between packed documents. Texts begin with BOS where the tokenizer puts it there itself, or
    `prepend_bos` says so.

    >>> lm = load_model("smollm2-135m")  # doctest: +SKIP
    >>> with lm.intervene("blocks.3.hook_mlp_out", lambda x, where: 0 * x):  # doctest: +SKIP
    ...     lm.generate("The state of the union is", max_new_tokens=20)
    """

    def __init__(self, model: Any, tokenizer: Any = None, name: str | None = None, digest: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend_of(model)
        self.runner: nn.Module = self.backend.runner
        self.inner: nn.Module = self.backend.inner
        config = getattr(self.inner, "config", None)
        self.name = name or getattr(config, "name_or_path", "") or type(looked_through(model)).__name__
        self.d_vocab = self.backend.d_vocab
        self.n_layers = self.backend.n_layers
        self.max_context = self.backend.max_context
        self.special_ids = special_ids(tokenizer)
        self.separator_id = separator_id(tokenizer)
        self.bos_id: int | None = getattr(tokenizer, "bos_token_id", None)
        self._digests = {identity.fingerprint(self.inner): digest} if digest else {}
        self.compared: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # see `identity.warn_of_other_weights`

    @property
    def receipts(self) -> list[Receipt]:
        """Of the steering contexts that are open for the caller, outermost first."""
        return [item for item in reached() if getattr(item, "lm", None) is self]

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens: where the first parameter is, also of a model that accelerate has put off."""
        return device_of(self.runner)

    @property
    def dtype(self) -> torch.dtype:
        """The first parameter's."""
        return next(self.runner.parameters()).dtype

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights, active adapters and dropout as they are now; of the bundled file while unchanged.

        Looked at anew each time, which costs a sum over the weights: fine-tuning in place gives another one.
        """
        now = identity.fingerprint(self.inner)
        if now not in self._digests:
            self._digests[now] = identity.state_digest(self.inner)
        return self._digests[now]

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 (hex) of the tokenizer's serialisation."""
        return identity.tokenizer_digest(self.tokenizer)

    @property
    def eos_ids(self) -> set[int]:
        """Ids that end a text: the tokenizer's and those of the model's generation settings."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return self.backend.eos_ids | (set() if eos is None else {int(eos)})

    # sites

    def sites(self) -> "DataFrame":
        """Table of the named sites, in the order of the forward pass: name, module, width, kind, heads.

        Module paths of the wrapped model are sites too (`path` its output, `path.input` its input).
        """
        return self.backend.table()

    def site(self, name: str | Site) -> Site:
        """The site of a TransformerLens name (classic or 4's) or of a module path.

        Raises `SiteError` with near names for one the model does not have. The width of a module path is found by
        running a few tokens through the model, once.
        """
        if not isinstance(name, str | Site):
            raise SiteError(f"a site is named by a string, not by {name!r}: lm.sites() lists them")
        return name if isinstance(name, Site) else self.backend.site(name)

    def place(self, site: Site) -> tuple[nn.Module, Side]:
        """The module that a site belongs to, and the side meant."""
        return self.backend.place(site)

    def record(
        self, text_or_tokens: Any, sites: str | Site | Sequence[str | Site], prepend_bos: bool | None = None
    ) -> Any:
        """Activations [batch, position, width], heads flattened; for several sites a dict by the names given.

        All positions are there, special tokens and padding included (see `to_tokens` for which are real). The pass
        stops after the last site. No gradients; values in the model's dtype. `prepend_bos`: see `prepends_bos`. Raises
        `SiteError` and `DataError`.
        """
        asked = [sites] if isinstance(sites, str | Site) or not isinstance(sites, Iterable) else list(sites)
        if not asked:
            raise SiteError("no site was asked for: give one, as lm.sites() names them")
        resolved = [self.site(name) for name in asked]
        found = run_recording(self, self.to_tokens(text_or_tokens, prepend_bos), resolved)
        if isinstance(sites, str | Site):
            return found[resolved[0].name]
        return {
            name if isinstance(name, str) else name.name: found[site.name]
            for name, site in zip(asked, resolved, strict=True)
        }

    @contextlib.contextmanager
    def intervene(
        self,
        site: str | Site,
        fn: Callable[[Float[Tensor, "batch position width"], Where], Float[Tensor, "batch position width"]],
    ) -> Iterator[None]:
        """Within it, every forward pass of the wrapped model uses `fn(activation, where)` at the site.

        `activation` is [batch, position, width] (heads flattened) of the positions computed in this call; `where` is a
        `Where`: `.positions`, `.ids`, `.mask`, `.generated`, `.phase`, right with and without a cache and for padding on
        either side, in `generate` and in that of transformers; `.known` is False where a loop of one's own does not show
        which tokens are the prompt's. Contexts nest, the outer acts first; hooks are gone afterwards, whatever happens.
        Returning the activation itself changes nothing.

        It acts for the thread (or asyncio task) that opened it; what the main thread opens also in threads that start
        within; elsewhere through `contextvars.copy_context().run`. Derivatives are those of `fn` in its place. Gradient
        checkpointing calls `fn` again in the backward pass, which then has to come within the context and in the thread of
        the forward pass.

        Raises `SiteError`; `InterventionError` when `fn` gives no tensor of the same shape, a submodule is called alone, the
        places of a call are unknown (a state-space model's state), or the backward pass of checkpoints comes too late.
        """
        if not callable(fn):
            raise InterventionError(
                f"fn is {type(fn).__name__}: it has to be a function of an activation and where it is"
            )
        resolved = self.site(site)
        target, side = self.place(resolved)

        def edit(x: Tensor, where: Where) -> Tensor:
            view = flat(x)
            new = fn(view, where)
            if new is view or not isinstance(new, Tensor) or new.shape != view.shape:
                return x if new is view else new
            return new.reshape(x.shape)

        with editing(self.backend.roots, target, side, edit, shared=resolved.shared):
            yield

    def splice(
        self,
        sae: Dictionary,
        error_term: bool = False,
        edit: Callable[[Any], Any] | None = None,
        site: str | None = None,
    ) -> "contextlib.AbstractContextManager[Splice]":
        """Context manager: the autoencoder's reconstruction stands in for the activation at its site.

        `edit(SparseCodes) -> SparseCodes` changes the codes on the way; they are its own to write into. With `error_term` the
        activation becomes x + (decode(edited) - decode(codes)), bitwise x where the edit changes nothing. Derivatives are
        those of this sum; the gradient of the codes that `edit` gets is that of decode(edited). Skipped positions
        (`sae.metadata["skip_positions"]`), high-norm ones (`sae.replaceable`), special tokens and padding keep the
        model's own activation. A transcoder reads at `site` and writes at `sae.metadata["target_site"]`. Gives a
        `Splice` that counts `.replaced` of `.positions`. Threads and gradient checkpointing: as `intervene`.

        Raises `ConfigError` without a site, `SiteError` for another width, and at the end `InterventionError` when
        the model never ran.
        """
        from saelab.models.splice import splice

        return splice(self, sae, error_term, edit, site)

    def steer(self, *operations: Any) -> contextlib.AbstractContextManager[Receipt]:
        """Context manager: every forward pass of the wrapped model is steered by the operations of `saelab.steering`.

        Gives a `Receipt` (calls, positions touched, relative size of the change, latent before and after). Operations at
        one site read the same unsteered vector; contexts nest, the inner ones acting on what the outer ones leave.
        Hooks are gone afterwards, whatever happens. Threads and gradient checkpointing: as `intervene`; derivatives are
        those of the operations' formulas, also for vectors and strengths that are learned.

        Raises `ConfigError` for operations that cannot work or disagree, `SiteError` for an unknown site or another
        width, `InterventionError` where a `Scope` needs to know the prompt and a call does not show it, and at the end,
        unless the body raised, when an operation touched nothing.

        >>> from saelab import steering
        >>> with lm.steer(steering.add(sae, 123, strength=4.0)) as receipt:  # doctest: +SKIP
        ...     text = lm.generate("The state of the union is", max_new_tokens=40, seed=0)
        >>> receipt.to_pandas()  # doctest: +SKIP
        """
        return provided("steer")(self, *operations)

    # text

    def tokenize(self, texts: Any, chat: bool = False, prepend_bos: bool | None = None) -> Tokens:
        """Texts as one right-padded batch.

        A conversation (list of {"role", "content"}) goes through the model's chat template, also within a list; with
        `chat` a plain string is what the user says. `prepend_bos`: see `prepends_bos`; a BOS that the template or the
        text begins with is not doubled. Ids are taken as by `to_tokens`. Raises `ConfigError` without tokenizer or
        template, `DataError` for a text without tokens.
        """
        return self.to_tokens(texts, prepend_bos, chat)

    def to_tokens(self, x: Any, prepend_bos: bool | None = None, chat: bool = False) -> Tokens:
        """Texts, conversations, `Tokens`, ids or a tokenizer's batch as `Tokens`; `saelab.models.texts.given` lists all.

        Ids come [position] or [batch, position] and are read as they are; padding is what their attention mask says,
        else what the tokenizer's pad id and padding side say (`saelab.models.tokens.real_places`). Raises `DataError` for
        ids outside the vocabulary or another shape, padding that cannot be told, and anything that is no text, by name;
        `ConfigError` for ids that do not begin with a BOS that is asked for.
        """
        found = given(x)
        if found.texts is not None:
            bos = self.bos_id if self.prepends_bos(prepend_bos) else None
            tokens = padded(encode(self.tokenizer, found.texts, chat=chat, bos=bos), self.pad_id)
        else:
            assert found.ids is not None
            ids = found.ids.reshape(1, -1) if found.ids.ndim == 1 else found.ids
            mask = real_places(ids, self.tokenizer, self.eos_ids) if found.mask is None else found.mask.view_as(ids)
            tokens = self.filled(ids, mask)
        tokens = checked(tokens, self.d_vocab)
        if found.ids is not None and prepend_bos:
            self.check_bos(tokens)
        return tokens.to(self.device)

    @property
    def pad_id(self) -> int:
        """What padded places hold: the tokenizer's padding, else an end of text, else 0."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return int(pad) if pad is not None else min(self.eos_ids, default=0)

    def filled(self, ids: Int[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Tokens:
        """Ids with the padding that `given` left open."""
        return Tokens(ids.masked_fill(~mask & (ids == UNFILLED), self.pad_id), mask)

    def tokens_for(self, sae: Dictionary, x: Any, prepend_bos: bool | None = None) -> Tokens:
        """What `to_tokens` gives, with texts begun as the autoencoder was trained to read them, unless `prepend_bos`.

        Warns, once, when the autoencoder was trained on other weights.
        """
        identity.warn_of_other_weights(self, sae, stacklevel=4)
        found = given(x)
        if prepend_bos is None and found.texts is not None:
            prepend_bos = sae.metadata.get("prepend_bos")
        return self.to_tokens(found, prepend_bos)

    def prepends_bos(self, asked: bool | None) -> bool:
        """Whether texts begin with BOS: as asked, with None where the tokenizer puts it there itself.

        Raises `ConfigError` when it is asked for and the tokenizer has none.
        """
        if asked is None:
            return adds_bos(self.tokenizer)
        if not isinstance(asked, bool):
            raise ConfigError(f"prepend_bos is {asked!r}: None follows the tokenizer, True and False decide")
        if asked and self.bos_id is None:
            raise ConfigError("prepend_bos=True, and the model's tokenizer has no BOS token")
        return asked

    def check_bos(self, tokens: Tokens) -> None:
        """Raise `ConfigError` unless every row of ids begins with BOS, which is never put before ids."""
        self.prepends_bos(True)
        without = self.begins_with_bos(tokens).logical_not().nonzero()
        if len(without):
            raise ConfigError(f"token ids are read as they are, and row {int(without[0])} does not begin with the BOS "
                              f"{self.bos_id}: put it there, or leave prepend_bos=True out")  # fmt: skip

    def begins_with_bos(self, tokens: Tokens) -> Bool[Tensor, "batch"]:
        """Of each row whether its first real token is the BOS: bool [batch]."""
        first = tokens.ids.gather(1, tokens.mask.int().argmax(1, keepdim=True))[:, 0]
        return first == (-1 if self.bos_id is None else self.bos_id)

    def token_text(self, token: int) -> str:
        """One token as text (its number where there is no tokenizer)."""
        token = checks.count("token", token, least=0, most=self.d_vocab - 1, of="the vocabulary")
        return str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch position vocabulary"]:
        """Logits [batch, position, vocabulary], in the caller's gradient mode; `DataError` past the model's context."""
        length = tokens.ids.shape[1]
        if self.max_context is not None and length > self.max_context:
            raise DataError(f"{length} tokens do not fit into the model's context of {self.max_context}: cut them")
        return self.backend.logits(tokens.ids, tokens.mask)[0]

    def token_losses(self, tokens: Tokens, label_seeds: Sequence[int] | None = None) -> Float[Tensor, "batch next"]:
        """Next-token cross-entropy in nats, at least fp32: [batch, position - 1], zero where no real target is.

        With `label_seeds`, one a row, it is that of labels drawn from the model's own distribution, each row by a generator
        of its own, whatever the batch.
        """
        logits = self.forward(tokens)
        # a copy: autograd keeps no tensor that was made in inference mode
        labels = tokens.ids[:, 1:].clone() if label_seeds is None else generation.drawn(logits[:, :-1], label_seeds)
        real = tokens.mask[:, 1:] & tokens.mask[:, :-1]
        exact = torch.promote_types(logits.dtype, torch.float32)
        # a row at a time: the log-probabilities of a whole batch are its largest tensor
        losses = [
            cross_entropy(row[:-1].to(exact), ids, reduction="none") for row, ids in zip(logits, labels, strict=True)
        ]
        return torch.where(real, torch.stack(losses), 0.0)

    def logits(self, tokens: Any, prepend_bos: bool | None = None) -> Float[Tensor, "batch position vocabulary"]:
        """Logits [batch, position, vocabulary] in the model's dtype, without gradients."""
        with torch.no_grad():
            return self.forward(self.to_tokens(tokens, prepend_bos))

    def loss(
        self, tokens: Any, reduction: Literal["mean", "sum", "none"] = "mean", prepend_bos: bool | None = None
    ) -> Float[Tensor, "*rows"]:
        """Next-token cross-entropy in nats over real targets.

        A target counts unless it or the token before it is padding: special tokens count, as the model predicts them
        too. "mean" is over all targets of the batch; "none" gives [batch, position - 1] with 0 where no target is.
        Raises `DataError` when there is none at all.
        """
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
        batch = self.to_tokens(tokens, prepend_bos)
        real = batch.mask[:, 1:] & batch.mask[:, :-1]
        if not real.any():
            raise DataError(f"no text here has a next token (the longest has {max(batch.lengths)}): give at least two")
        with torch.no_grad():
            losses = self.token_losses(batch)
        return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / real.sum()

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        use_cache: bool = True,
        prepend_bos: bool | None = None,
    ) -> Any:
        """The continuation: a string for a string or one conversation, a list for a list or for tokens.

        Ends at the end-of-text token. Padding is on the left inside.

        Args:
            max_new_tokens: tokens to generate.
            temperature: at 0 the likeliest token is taken, else one is drawn.
            seed: row i draws from a generator seeded by (seed, i), whatever the batch.
            use_cache: use the key-value cache; models of TransformerLens 3 and before run without.
            prepend_bos: see `prepends_bos`.

        Raises `DataError` when prompt and continuation do not fit into the context, `ConfigError` for arguments that cannot
        work.
        """
        return generation.generate_text(self, prompts, max_new_tokens, temperature, seed, use_cache, prepend_bos)

    def top_latents(self, text: Any, sae: Dictionary, k: int = 10) -> "DataFrame":
        """The `k` strongest firings on one text: position, token, latent, activation, label; strongest first.

        Positions the autoencoder is not for (see `splice`) are left out. Labels come from
        `sae.metadata["labels"]`, a dict by latent number as a string, where there are any.
        """
        from saelab.models.latents import top_latents

        return top_latents(self, text, sae, k)

    def __repr__(self) -> str:
        context = "any length" if self.max_context is None else f"context {self.max_context:,}"
        return (
            f"LanguageModel({self.name}: {type(self.model).__name__}, {self.n_layers} blocks, {context}, "
            f"vocabulary {self.d_vocab:,}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )
