"""The three kinds of objects that `LanguageModel` wraps: transformers, TransformerLens 4, older TransformerLens.

Each says how it runs, which sites it names and which module a site is. None is changed, and TransformerLens is never
imported: its objects are known by what they have.
"""

import contextlib
import inspect
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from saelab.base.errors import ConfigError, DataError, SiteError
from saelab.models.adapters import adapter_words
from saelab.models.blocks import Found, block_lists, ends, measured
from saelab.models.hooks import aside, first_runs, interventions_silent
from saelab.models.identity import dropout_rate
from saelab.models.offloading import device_of
from saelab.models.site_names import EMBEDDING, KINDS, MLP, NORM, PROJECTION, Side, classic_name
from saelab.models.sites import Site, flat, unknown_site
from saelab.models.tasks import OTHERWISE, refuse_other_tasks
from saelab.models.where import locator
from saelab.models.wrappers import call_names, eager, looked_through

if TYPE_CHECKING:
    from pandas import DataFrame


def backend_of(model: Any) -> "Transformers":
    """The backend of an object, by what it has; `ConfigError` for one that is no language model."""
    inner = looked_through(model) if isinstance(model, nn.Module) else model
    if hasattr(inner, "hook_dict"):
        return Bridge(inner) if hasattr(inner, "original_model") else Hooked(inner)
    if not isinstance(inner, nn.Module) or not hasattr(getattr(inner, "config", None), "model_type"):
        raise ConfigError(f"{type(model).__name__} is not a language model that can be wrapped: give a name, a folder, a "
                          f"transformers model or a TransformerLens model{OTHERWISE}")  # fmt: skip
    refuse_other_tasks(inner)
    return Transformers(model, inner)


class Transformers:
    """A causal language model of the transformers library, run with the attention it came with."""

    def __init__(self, runner: nn.Module, inner: nn.Module) -> None:
        self.runner, self.inner = runner, inner
        self.roots = {root: locator(call_names(root, inner)) for root in (runner, inner)}
        self.known = set(inspect.signature(inner.forward).parameters)
        outer = inspect.signature(runner.forward).parameters
        if runner is not inner and not any(p.kind is p.VAR_KEYWORD for p in outer.values()):
            if "input_ids" not in outer:
                raise ConfigError(f"{type(runner).__name__}.forward takes {list(outer)}, not input_ids, by which a language "
                                  "model is called here: name it so, or give the model inside")  # fmt: skip
            self.known &= set(outer)  # a wrapper may hand on only some of them
        self._by_path: dict[str, Site] = {}
        self.attention_ways: dict[int, int] = {}  # see `saelab.models.attention`

    @property
    def config(self) -> Any:
        """The configuration of the text model."""
        config: Any = self.inner.config
        return config.get_text_config()

    @property
    def d_vocab(self) -> int:
        return int(self.config.vocab_size)

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def max_context(self) -> int | None:
        length = getattr(self.config, "max_position_embeddings", None)
        return None if length is None else int(length)

    @property
    def eos_ids(self) -> set[int]:
        """Ids that end a text, as the model's own generation settings say."""
        ids = getattr(getattr(self.inner, "generation_config", None), "eos_token_id", None)
        return set() if ids is None else set(ids) if isinstance(ids, list | tuple) else {int(ids)}

    def logits(
        self,
        ids: Int[Tensor, "batch new"],
        mask: Bool[Tensor, "batch position"],
        *,
        last_only: bool = False,
        cache: Any = None,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "batch kept vocabulary"], Any]:
        """Logits [batch, position, vocabulary] and the cache, None without one: also where the model keeps something else
        than keys and values, of which nobody can tell how long it is.

        `mask` covers the cache too. Raises `DataError` for padding before a text where the model would read it.
        """
        if not mask[:, 0].all() and not self.pads_left:
            raise DataError(
                f"{type(self.inner).__name__} reads what stands before a text, padding too: pad on the right"
            )
        with eager(self.runner):
            return self._pass(ids, mask, last_only, cache, use_cache)

    def _pass(self, ids: Tensor, mask: Tensor, last_only: bool, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        use_cache = use_cache and "past_key_values" in self.known
        kwargs: dict[str, Any] = {"use_cache": use_cache} if "use_cache" in self.known else {}
        if cache is not None:
            kwargs["past_key_values"] = cache
        if last_only and "logits_to_keep" in self.known:
            kwargs["logits_to_keep"] = 1
        # the mask is left out when everything is real: that is the attention's fast path
        if not mask.all() and "attention_mask" in self.known:
            kwargs["attention_mask"] = mask.long()
        # a model whose first layer keeps states does not know how long its cache is
        if (cache is not None or not mask[:, 0].all()) and "position_ids" in self.known:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.runner(input_ids=ids, **kwargs)
        if not hasattr(output, "logits"):
            raise ConfigError(f"{type(self.runner).__name__} gives {type(output).__name__}, not the output of a transformers "
                              "model, with its logits: hand on what the model inside gives, or give that model")  # fmt: skip
        return output.logits, getattr(output, "past_key_values", None) if use_cache else None

    @cached_property
    def pads_left(self) -> bool:
        """Whether padding before a text leaves the text alone, with and without cache.

        Measured: models that go from state to state have no place for a mask, and some that take one ignore it.
        """
        if dropout_rate(self.inner):
            return True  # no two passes are the same: nothing to compare
        ids = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]], device=device_of(self.runner)) % self.d_vocab
        mask = torch.tensor([[False, False, True, True, True], [True] * 5], device=ids.device)

        def last(ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
            return self._pass(ids, mask, False, cache, cache is not None)[0][:, -1].float()

        with aside(), torch.no_grad(), eager(self.runner):
            alone = torch.cat([last(ids[:1, 2:], mask[:1, 2:]), last(ids[1:], mask[1:])])
            found = [
                last(ids, mask) - alone,
                last(ids[:1], mask[:1]) - alone[:1],
            ]  # some look at masks of several rows only
            _, cache = self._pass(ids[:, :-1], mask[:, :-1], False, None, True)
            if cache is not None:
                found.append(last(ids[:, -1:], mask, cache) - alone)
        rounding = torch.finfo(next(self.runner.parameters()).dtype).eps ** 0.5  # of half the digits
        return all(bool(change.std() <= rounding * alone.std()) for change in found)

    def place(self, site: Site) -> tuple[nn.Module, Side]:
        """The module of a site, and the side meant."""
        return self.inner.get_submodule(site.path), site.side

    def table(self) -> "DataFrame":
        """See `LanguageModel.sites`."""
        import pandas as pd

        rows = [
            (s.name, s.path + (".input" if s.side == "input" else ""), s.width, s.kind, s.heads)
            for s in self.named.values()
        ]
        table = pd.DataFrame(rows, columns=["name", "module", "width", "kind", "heads"])
        return table.astype({"width": "int64", "heads": "Int64"})

    def site(self, name: str) -> Site:
        """See `LanguageModel.site`."""
        found = self.named.get(classic_name(name)) or self._by_path.get(name)
        if found is None:
            path, side = self.path_of(name)
            found = Site(name, path, side, self._probed_width(name, Site(name, path, side, 0)))
            self._by_path[name] = found
        return found

    def _why_unknown(self, name: str) -> str:
        lists = [path for path, _ in block_lists(self.inner)]
        if not self.named:
            where = f"its lists of modules are {', '.join(lists)}" if lists else "it has no list of blocks"
            return (f" Names of TransformerLens are for blocks that pass one stream on; {type(self.inner).__name__} has none "
                    f"({where}); a module path is a site, `path.input` its input.")  # fmt: skip
        hook = classic_name(name).partition(".")[2].partition(".")[2]
        if not name.startswith("blocks.") or hook not in KINDS:
            return ""
        return (f" No module in that block of {type(self.inner).__name__} has what {hook} means (attention and MLP may run "
                "beside each other, be scaled or of another kind); module paths are sites, `path.input` an input.")  # fmt: skip

    @cached_property
    def named(self) -> dict[str, Site]:
        """The sites that have a name: measured when first asked for."""
        return self._named_sites()

    def _probed_width(self, name: str, site: Site) -> int:
        x = flat(self.few_tokens({name: self.place(site)}, False)[name])
        if x.ndim != 3 or x.shape[:2] != (2, 3):
            raise SiteError(f"{name!r} holds {list(x.shape)} for 2 texts of 3 tokens, not one vector a token: "
                            "read it with saelab.models.sites.record")  # fmt: skip
        return int(x.shape[2])

    def few_tokens(
        self, targets: Mapping[Any, tuple[nn.Module, Side]], partly: bool = True
    ) -> dict[Any, Shaped[Tensor, "..."]]:
        """What passes at some modules when the model reads 2 texts of 3 tokens; those that do not run are left out."""
        device = device_of(self.runner)
        ids = torch.tensor([[1, 2, 3], [6, 5, 4]], device=device) % self.d_vocab
        mask = torch.ones_like(ids, dtype=torch.bool)
        with interventions_silent(), torch.no_grad(), _NothingDropped(), warnings.catch_warnings():
            # reentrant checkpointing says so in every pass without a gradient, and this one is not the user's
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            return first_runs(targets, lambda: self.logits(ids, mask), stop=not partly, partly=partly)

    def path_of(self, name: str) -> tuple[str, Side]:
        """Path and side of a name that is in no table: a module path, also below the headless model, `.input` allowed.

        Raises `SiteError` with near names.
        """
        modules = {path for path, _ in self.inner.named_modules() if path}
        below = getattr(self.inner, "base_model_prefix", "")
        for path in (name, f"{below}.{name}"):
            if path in modules:
                return path, "output"
            stem, _, side = path.rpartition(".")
            if stem in modules and side in ("input", "output"):
                return stem, side  # type: ignore[return-value]
        hint = self._why_unknown(name)
        raise unknown_site(name, [*self.named, *sorted(modules)], hint)

    def _named_sites(self) -> dict[str, Site]:
        heads = int(getattr(self.config, "num_attention_heads", 1) or 1)

        def places_of_blocks() -> tuple[str, dict[str, Found]]:
            return measured(self.inner, self.n_layers, heads, self.few_tokens, lambda: adapter_words(self.inner))

        path, places = places_of_blocks()
        hooked = [module for module in self.inner.modules() if module._forward_hooks or module._forward_pre_hooks]
        if hooked and len({*Counter(name.split(".")[1] for name in places).values()}) != 1:
            with _set_aside(hooked):  # one that changes a block hides what the block adds up to
                there, unhooked = places_of_blocks()
            path, places = path or there, unhooked | places
        if places:
            places |= ends(self.inner, path, next(iter(places.values())).width)
        return {name: Site(name, *place) for name, place in places.items()}


@contextlib.contextmanager
def _set_aside(modules: list[nn.Module]) -> Iterator[None]:
    """Within, the forward hooks of these modules are not there."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in modules]
    try:
        for module in modules:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


class _NothingDropped(TorchFunctionMode):
    """Within it dropout is the identity, so that what is measured holds in training mode too, and no number is drawn."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is dropout:
            return kwargs.get("input", args[0] if args else None)
        if func is scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class Hooked(Transformers):
    """A TransformerLens model of before version 4 (`HookedTransformer`), by duck type: hook_dict, cfg, forward."""

    def __init__(self, model: Any) -> None:
        self.driven, self.cfg = model, model.cfg
        super().__init__(model, model)

    @property
    def hooks(self) -> dict[str, nn.Module]:
        """The hook points by name, as they are now: SAELens puts others in their places when it takes its SAEs away."""
        found: dict[str, nn.Module] = self.driven.hook_dict
        return found

    @property
    def d_vocab(self) -> int:
        return int(self.cfg.d_vocab)

    @property
    def n_layers(self) -> int:
        return int(self.cfg.n_layers)

    @property
    def max_context(self) -> int | None:
        return int(self.cfg.n_ctx)

    def _pass(self, ids: Tensor, mask: Tensor, last_only: bool, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        """These models run without a key-value cache here."""
        attention = None if mask.all() else mask.long()
        return self.runner(ids, return_type="logits", attention_mask=attention), None

    def place(self, site: Site) -> tuple[nn.Module, Side]:
        hook = self.hooks.get(site.path)
        return (hook, "output") if hook is not None else super().place(site)

    def path_of(self, name: str) -> tuple[str, Side]:
        return (name, "output") if name in self.hooks else super().path_of(name)

    def _named_sites(self) -> dict[str, Site]:
        cfg = self.cfg
        sites = {}
        for layer in range(cfg.n_layers):
            for hook, kind in KINDS.items():
                name = f"blocks.{layer}.{hook}"
                if name not in self.hooks:
                    continue
                heads = int(cfg.n_heads) if hook == "attn.hook_z" else None
                inside = kind == MLP and hook != "hook_mlp_out"
                width = heads * cfg.d_head if heads else cfg.d_mlp if inside else cfg.d_model
                if kind == PROJECTION:
                    few = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
                    width = (cfg.n_heads if hook == "attn.hook_q" else few) * cfg.d_head
                sites[name] = Site(name, name, "output", int(width), kind, heads)
        for name, hook, kind in (("hook_embed", "hook_embed", EMBEDDING), ("ln_final", "ln_final.hook_out", NORM)):
            if hook in self.hooks:
                sites[name] = Site(name, hook, "output", int(cfg.d_model), kind)
        return sites


class Bridge(Hooked):
    """A TransformerLens 4 `TransformerBridge`: its hook points lie in the transformers model that it drives."""

    def __init__(self, model: Any) -> None:
        self.driven, self.cfg = model, model.cfg
        Transformers.__init__(self, model.original_model, model.original_model)

    def _pass(self, ids: Tensor, mask: Tensor, last_only: bool, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        """As the transformers model that it drives."""
        return Transformers._pass(self, ids, mask, last_only, cache, use_cache)
