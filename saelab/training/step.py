"""One optimisation step. Shapes: N tokens, D inputs, F latents."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.autoencoders.architecture import Architecture, Batch, Lists
from saelab.autoencoders.sae import SAE
from saelab.autoencoders.serialization import unit_rows
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.base.errors import DataError
from saelab.kernels import sparse
from saelab.training.schedule import Schedule

_PART = 512  # decoder rows that stay in a CPU's cache between two passes over them
_RENEWED = 32  # steps after which a device looks up again which latents are dead


class Trainer:
    """Adam on an SAE, with unit decoder rows and the gradient parallel to them removed (Gao et al. 2024, appendix A).

    An SAE to go on with whose rows have other lengths keeps them free.

    Args:
        sae: trained in place.
        schedule: length of the run and what follows from it.
        lr: peak learning rate; None is the architecture's own times the schedule's `short_run_boost`.
        dtype: of the SAE in the end, by default its own. Weights and moments are in fp32 (or fp64) until `finish` rounds them.

    >>> import torch, saelab
    >>> from saelab.training.schedule import Schedule
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=8)
    >>> trainer = Trainer(sae, Schedule(tokens=64, batch_size=32))
    >>> sorted(trainer.step({"x": torch.randn(32, 8)}))
    ['aux', 'explained_variance', 'fvu', 'l0', 'loss', 'lr']
    """

    def __init__(self, sae: SAE, schedule: Schedule, lr: float | None = None, dtype: torch.dtype | None = None) -> None:
        self.sae, self.schedule, self.dtype = sae, schedule, dtype or sae.dtype
        # rows of other lengths, of an SAE that others trained, stay free: at length 1 it would be another SAE
        self.unit_rows = sae.cfg.recipe.unit_decoder and unit_rows(sae)
        sae.to(torch.promote_types(self.dtype, torch.float32))
        self.lr = self.rate(sae.cfg, schedule, lr)
        self.parameters = list(sae.requires_grad_(True).parameters())
        self.recipe = sae.cfg.recipe
        rates = {id(sae.extra[name]): rate for name, rate in self.recipe.rates.items()}
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in self.parameters:
            by_rate.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
        groups = [{"params": of, "factor": rate} for rate, of in by_rate.items()]
        self.optimizer = torch.optim.Adam(groups, lr=self.lr, betas=self.recipe.betas, fused=True)
        self.done = 0
        sae.state.dead_after.fill_(schedule.dead_after)
        for statistic in (sae.state.fires, sae.state.act_sum, sae.state.act_max, sae.state.stat_tokens):
            statistic.zero_()
        self.lists = Lists()
        self.awaits = sae.device.type != "cpu"  # whether to read a number of it is to wait
        self.failure = torch.zeros((), device=sae.device)  # the first loss that was not finite
        self.failed = torch.zeros((), device=sae.device)  # 1 from then on
        if self.awaits:
            self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]  # of fused Adam, which leaves all as it is
        self.covariance = torch.zeros(sae.d_out, sae.d_out, dtype=torch.float64, device=sae.device)
        self.target_sum = torch.zeros(sae.d_out, dtype=torch.float64, device=sae.device)
        self.target_rows = torch.zeros((), dtype=torch.int64)

    @staticmethod
    def rate(cfg: Architecture, schedule: Schedule, lr: float | None) -> float:
        """The peak learning rate: as given, or the architecture's own for a run of that length."""
        return cfg.recipe.learning_rate * schedule.short_run_boost if lr is None else lr

    def initialise(self, rows: dict[str, Float[Tensor, "n _"]], fresh: bool = True) -> None:
        """Set the scales of input and target and, for a fresh SAE, what depends on data, from a sample of rows.

        A scale brings the mean square near 1 (of a transcoder's target: the variance, for b_dec takes its mean), so that
        one learning rate fits every site; it is a power of two, which makes folding it exact. b_dec starts at the geometric
        median of the target (Gao et al. 2024, A.1), a transcoder's at its mean.
        """
        state, cfg = self.sae.state, self.sae.cfg
        rows = {name: distributed.gathered(column)[0] for name, column in self._wide(rows).items()}
        x_ND, target_ND = rows["x"], rows.get("target", rows["x"])
        if cfg.input_scale is not None:
            with torch.no_grad():
                scale = 1.0 if cfg.per_token else _unit_scale(x_ND, state.scale)
                centred_ND = target_ND - target_ND.mean(0)
                target_scale = scale if cfg.centres_input else _unit_scale(centred_ND, state.target_scale)
                if not fresh:
                    self._rescale(scale, target_scale)
                state.scale.fill_(scale)
                state.target_scale.fill_(target_scale)
        if not fresh:
            return
        batch = self._batch(rows)
        with torch.no_grad():
            start = geometric_median(batch.target) if cfg.centres_input else batch.target.mean(0)
            self.sae.decoder_bias.copy_(start)
            params = self.sae.params()
            self.sae.cfg.prepare(params, batch, state)
            for tensor in self.sae.state_dict().values():
                distributed.same_everywhere(tensor)

    def _rescale(self, scale: float, target_scale: float) -> None:
        """Let the SAE be the same map of raw vectors when these scales stand in for its own."""
        sae, state = self.sae, self.sae.state
        ratio = target_scale / float(state.target_scale)
        gain = ratio / (scale / float(state.scale))
        sae.encoder_bias.data.mul_(ratio)
        sae.decoder_bias.data.mul_(ratio)
        if gain != 1:
            for weight in (sae.encoder_weight, *(sae.extra[name] for name in sae.extra if name == "W_skip")):
                weight.data.mul_(gain)
        state.scale.fill_(scale)
        state.target_scale.fill_(target_scale)
        sae.cfg.rescale(sae.params(), state, ratio)

    def step(self, rows: dict[str, Float[Tensor, "n _"]], log: bool = True) -> dict[str, Float[Tensor, ""] | float]:
        """One step on raw rows {"x": [n, d_in], "target", "gradient"}: its figures, still tensors.

        With `log=False` only the loss is computed. Raises `DataError` when the loss is not finite; the weights are then
        as they were. On a device the next step with `log=True` raises it, or `check`; the weights are those before it still.
        """
        sae, cfg, state = self.sae, self.sae.cfg, self.sae.state
        batch = self._batch(rows)
        batch.progress = progress = self.schedule.progress(self.done)
        x_ND, target_ND = batch.x, batch.target

        params = sae.params()
        batch.scores = cfg.scores(params, batch)
        codes = cfg.allocate(batch.scores, state, progress)
        decoded_ND = sparse.decode(codes, params.W_dec) if isinstance(codes, SparseCodes) else codes @ params.W_dec
        x_hat_ND = decoded_ND + params.base(x_ND)
        terms = cfg.losses(batch, codes, x_hat_ND, params, state)
        loss = torch.stack(list(terms.values())).sum()
        self._note_failure(distributed.mean(loss.detach()), rows, x_hat_ND.detach())

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.mean_gradients(self.parameters)
        lr = self.lr * self.recipe.lr_factor(progress, self.schedule.lr_factor(self.done))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        with torch.no_grad():
            if self.unit_rows:
                remove_parallel_gradient(sae.W_dec)
            self.optimizer.step()
            if self.unit_rows:
                normalise_rows(sae.W_dec, self.failed if self.awaits else None)
            params = sae.params()
            renewed = cfg.observe(batch, codes, params, state)
            if renewed is not None:
                self._renew(renewed)
            sparsely = codes if isinstance(codes, SparseCodes) else SparseCodes.from_dense(codes)
            fires_F = self._count(sparsely, target_ND)
        self.done += 1

        figures: dict[str, Tensor | float] = {"loss": distributed.mean(loss.detach()), "lr": lr}
        if log:
            self.check()
            error = distributed.mean((target_ND - x_hat_ND.detach()).square().sum())
            variance = distributed.mean((target_ND - distributed.mean(target_ND.mean(0))).square().sum())
            figures |= {name: distributed.mean(term.detach()) for name, term in terms.items()}
            l0 = int(fires_F.sum()) / distributed.total(len(x_ND))
            figures |= {"l0": l0, "explained_variance": 1 - error / variance}
        return figures

    def finish(self) -> None:
        """Turn the covariance into the standard deviation along each decoder direction, let go of the gradients and round.

        The SAE is frozen then: its codes of plain vectors have no graph.
        """
        self.check()
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.requires_grad_(False)
        n = int(self.target_rows)
        if n > 1:
            mean = self.target_sum / n
            covariance = self.covariance / n - torch.outer(mean, mean)
            W_dec = self.sae.W_dec.detach().double()
            variance = (((W_dec @ covariance) * W_dec).sum(1) / W_dec.square().sum(1)).clamp_min(0).nan_to_num(0)
            self.sae.state.direction_std.copy_(variance.sqrt())
        self.sae.to(self.dtype)

    def _note_failure(self, loss: Tensor, rows: dict[str, Tensor], x_hat_ND: Tensor) -> None:
        """Raise where the loss is not finite, on a device only note it: from then on no weight moves."""
        if not self.awaits:
            if not math.isfinite(float(loss)):
                raise DataError(self._why_not_finite(float(loss), rows, x_hat_ND))
            return
        self.failure.copy_(torch.where(self.failed > 0, self.failure, loss))
        self.failed.copy_(self.failure - self.failure != 0)

    def check(self) -> None:
        """Raise `DataError` when the loss of a step was not finite."""
        if self.awaits and bool(self.failed):
            step = int(self.optimizer.state[self.sae.W_dec]["step"])
            raise DataError(
                f"the loss of step {step:,} is {float(self.failure)}, and the weights are those before it: leave rows out that "
                f"hold NaN or infinity, or lower the learning rate (it is {self.lr:.3g}); with device='cpu' the error says "
                "which it was"
            )

    def _why_not_finite(self, loss: float, rows: dict[str, Tensor], x_hat_ND: Tensor) -> str:
        bad = {name: int((~torch.isfinite(column)).any(1).sum()) for name, column in rows.items()}
        what = f"the loss of step {self.done:,} is {loss}, and the weights are those before it: "
        if any(bad.values()):
            found = ", ".join(f"{n:,} rows of {name}" for name, n in bad.items() if n)
            return f"{what}of its batch of {len(x_hat_ND):,}, {found} hold NaN or infinity; leave such rows out"
        largest = max(float(column.abs().amax()) for column in rows.values())
        return (
            f"{what}its batch of {len(x_hat_ND):,} rows is finite (largest entry {largest:.3g}), the reconstruction reaches "
            f"{float(x_hat_ND.abs().amax()):.3g} in the SAE's units: lower the learning rate (it is {self.lr:.3g})"
            + (", or set max_norm, for rows much larger than the others" if largest > 1e18 else "")
        )

    def _renew(self, latents: Tensor) -> None:
        """The weights of these latents were set anew: they start without a past."""
        self.sae.state.tokens_since_fired[latents] = 0
        for parameter in (self.sae.encoder_weight, self.sae.encoder_bias, self.sae.W_dec):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][moment][latents] = 0

    def _batch(self, rows: dict[str, Tensor]) -> Batch:
        state, rows = self.sae.state, self._wide(rows)
        x_ND = self.sae.scaled(rows["x"])
        target_ND = rows["target"] * state.target_scale if "target" in rows else x_ND
        gradient_ND = rows["gradient"] / state.scale if "gradient" in rows else None
        self.lists.renews = not self.awaits or self.done % _RENEWED == 0
        return Batch(x_ND, target_ND, gradient_ND, lists=self.lists)

    def _wide(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows in the SAE's precision."""
        return {name: column.to(self.sae.dtype) for name, column in rows.items()}

    def _count(self, codes: SparseCodes, target_ND: Tensor) -> Tensor:
        """Add a batch to the statistics; how often each latent fired in it."""
        state, n = self.sae.state, distributed.total(len(codes))
        fired = (codes.values > 0).long()
        fires_F = distributed.sum_(torch.zeros_like(state.fires).index_add_(0, codes.indices, fired))
        state.tokens_since_fired.add_(n).masked_fill_(fires_F > 0, 0)
        if self.done < self.schedule.statistics_from:
            return fires_F
        values = codes.values.detach().float()
        zeros_F = torch.zeros_like(state.act_sum)
        state.fires += fires_F
        state.stat_tokens += n
        state.act_sum += distributed.sum_(zeros_F.index_add_(0, codes.indices, values.double()))
        state.act_max.scatter_reduce_(0, codes.indices, values, "amax")
        distributed.max_(state.act_max)
        if (self.done - self.schedule.statistics_from) % self.schedule.covariance_every == 0:
            self.covariance += distributed.sum_((target_ND.T @ target_ND).double())
            self.target_sum += distributed.sum_(target_ND.sum(0, dtype=torch.float64))
            self.target_rows += n
        return fires_F

    def state_dict(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Everything that the next step depends on, as tensors."""
        self.check()
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for name, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{name}"] = tensor
        tensors |= {"covariance": self.covariance, "target_sum": self.target_sum, "target_rows": self.target_rows}
        if self.awaits:
            tensors |= {f"list.{name}": latents for name, latents in self.lists.kept.items()}
        return tensors | {"done": torch.tensor(self.done)}

    def load_state_dict(self, tensors: dict[str, Shaped[Tensor, "..."]]) -> None:
        """Continue where `state_dict` was taken, on the device that the SAE is on now."""
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        for i, parameter in enumerate(self.parameters):
            prefix = f"optimizer.{i}."
            for name in (name for name in tensors if name.startswith(prefix)):
                dtype = parameter.dtype if tensors[name].ndim else None  # the count of steps keeps its own
                kept = tensors[name].to(parameter.device, dtype)
                self.optimizer.state[parameter][name.removeprefix(prefix)] = kept
        for name in ("covariance", "target_sum", "target_rows"):
            getattr(self, name).copy_(tensors[name])
        lists = {name: latents for name, latents in tensors.items() if name.startswith("list.")}
        self.lists.kept = {name.removeprefix("list."): latents.to(self.sae.device) for name, latents in lists.items()}
        self.done = int(tensors["done"])


def _unit_scale(x_ND: Tensor, current: Tensor) -> float:
    """The power of two that brings the root mean square nearest to 1; the current one where all is zero."""
    rms = float(x_ND.square().mean().sqrt())
    if not math.isfinite(rms):
        raise DataError(
            f"the rows hold numbers up to {float(x_ND.abs().amax()):.1e}, whose squares fp32 cannot add up: divide the "
            "activations by a constant, or look for an overflow"
        )
    return 2.0 ** -round(math.log2(rms)) if rms > 0 else float(current)


def geometric_median(x_ND: Float[Tensor, "n d"], iterations: int = 50, tolerance: float = 1e-5) -> Float[Tensor, " d"]:
    """The point [d] with the least summed distance to the rows, by Weiszfeld's iteration.

    >>> import torch
    >>> geometric_median(torch.tensor([[0.0], [1.0], [100.0]])).round()
    tensor([1.])
    """
    median = x_ND.mean(0)
    for _ in range(iterations):
        weights = 1 / torch.linalg.vector_norm(x_ND - median, dim=1).clamp_min(1e-6)
        moved = (weights[:, None] * x_ND).sum(0) / weights.sum()
        if float(torch.linalg.vector_norm(moved - median)) <= tolerance * float(
            torch.linalg.vector_norm(median) + 1e-12
        ):
            return moved
        median = moved
    return median


def remove_parallel_gradient(W_FD: torch.nn.Parameter) -> None:
    """Take from the gradient what would only change the length of a (unit) row."""
    if W_FD.grad is None:
        return
    part = _part(W_FD)
    for grad, row in zip(W_FD.grad.split(part), W_FD.data.split(part), strict=True):
        grad.addcmul_((grad * row).sum(1, keepdim=True), row, value=-1)


def normalise_rows(W_FD: Float[Tensor, "latents d"], unless: Float[Tensor, ""] | None = None) -> None:
    """Bring every row back to length 1, unless that flag of a device is up."""
    for row in W_FD.data.split(_part(W_FD)):
        length = torch.linalg.vector_norm(row, dim=1, keepdim=True)
        row.div_(length if unless is None else length.masked_fill_(unless > 0, 1))


def _part(W_FD: Tensor) -> int:
    return _PART if W_FD.device.type == "cpu" else len(W_FD)
