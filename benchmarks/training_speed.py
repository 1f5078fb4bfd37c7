"""Steps per second of CycleGAN and pix2pix, ours beside the same step written out plainly.

    .venv/bin/python -m benchmarks.training_speed
    .venv/bin/python -m benchmarks.training_speed --side 256 --device cuda --repeats 20

The plain step is what a reader of the papers writes: eager, fp32, batch 1, ResNet-9 or U-Net-256,
PatchGAN, Adam, a pool of 50. Ours is training/recipes with the same networks, weights and batch,
in each precision. Both run in turn in this process; the figure is the median of the repeats, on a
CPU per second of processor time (one thread).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks import Generator, build_generator
from training.adversarial import ImagePool, PatchDiscriminator, initialise
from training.recipes.adversarial import Adversarial, Discriminator, Run
from training.recipes.batch import Batch
from training.recipes.cyclegan import CycleGan
from training.recipes.descent import Precision
from training.recipes.pix2pix import Pix2Pix

Step = Callable[[], object]


def generator_of(architecture: str) -> Generator:
    torch.manual_seed(1)
    return build_generator(architecture, {})


def batch_of(side: int, place: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(2)
    source, target = (torch.rand(1, 1, side, side, generator=draw) * 2 - 1 for _ in range(2))
    return Batch(source, target, torch.ones(1, 1, side, side)).to(place)


def plain_adam(*networks: nn.Module) -> torch.optim.Adam:
    weights = [weight for network in networks for weight in network.parameters()]
    return torch.optim.Adam(weights, lr=2e-4, betas=(0.5, 0.999))


def plain(network: nn.Module, place: torch.device) -> nn.Module:
    initialise(network, torch.Generator().manual_seed(3))
    return network.to(place).train()


def frozen(networks: tuple[nn.Module, ...], *, hold: bool) -> None:
    for network in networks:
        for weight in network.parameters():
            weight.requires_grad_(not hold)


def plain_cyclegan(batch: Batch, place: torch.device) -> Step:
    """G_AB, G_BA, D_A, D_B as in Zhu 2017: least squares, cycle 10, identity 5."""
    g, f = (plain(generator_of("resnet_9"), place) for _ in range(2))
    d_a, d_b = (plain(PatchDiscriminator(1), place) for _ in range(2))
    adam_g, adam_d = plain_adam(g, f), plain_adam(d_a, d_b)
    pools, draw = (ImagePool(50), ImagePool(50)), torch.Generator().manual_seed(4)
    a, b = batch.source, batch.target

    def real(judged: Tensor) -> Tensor:
        return F.mse_loss(judged, torch.ones_like(judged))

    def fake(judged: Tensor) -> Tensor:
        return F.mse_loss(judged, torch.zeros_like(judged))

    def step() -> None:
        fake_b, fake_a = g(a), f(b)
        frozen((d_a, d_b), hold=True)
        adam_g.zero_grad()
        loss = real(d_b(fake_b)) + real(d_a(fake_a))
        loss = loss + 10 * (F.l1_loss(f(fake_b), a) + F.l1_loss(g(fake_a), b))
        loss = loss + 5 * (F.l1_loss(g(b), b) + F.l1_loss(f(a), a))
        loss.backward()
        adam_g.step()
        frozen((d_a, d_b), hold=False)
        adam_d.zero_grad()
        for judge, truth, made, pool in ((d_a, a, fake_a, pools[0]), (d_b, b, fake_b, pools[1])):
            ((real(judge(truth)) + fake(judge(pool.exchange(made, draw)))) / 2).backward()
        adam_d.step()
        loss.item()

    return step


def plain_pix2pix(batch: Batch, place: torch.device) -> Step:
    """G, D as in Isola 2017: conditional, cross-entropy, L1 100."""
    g = plain(generator_of("unet_256"), place)
    d = plain(PatchDiscriminator(2, norm="batch"), place)
    adam_g, adam_d = plain_adam(g), plain_adam(d)
    x, y = batch.source, batch.target

    def entropy(judged: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(judged, torch.full_like(judged, label))

    def step() -> None:
        made = g(x)
        frozen((d,), hold=False)
        adam_d.zero_grad()
        fake, real = d(torch.cat([x, made.detach()], 1)), d(torch.cat([x, y], 1))
        ((entropy(fake, 0.0) + entropy(real, 1.0)) / 2).backward()
        adam_d.step()
        frozen((d,), hold=True)
        adam_g.zero_grad()
        loss = entropy(d(torch.cat([x, made], 1)), 1.0) + 100 * F.l1_loss(made, y)
        loss.backward()
        adam_g.step()
        loss.item()

    return step


def our_cyclegan(batch: Batch, place: torch.device, precision: Precision) -> Step:
    run = Run(1, residual=False, precision=precision)
    recipe = CycleGan(generator_of("resnet_9"), generator_of("resnet_9"), Adversarial(), run)
    recipe.to(place)
    return lambda: recipe.step(batch, 0)


def our_pix2pix(batch: Batch, place: torch.device, precision: Precision) -> Step:
    judge = Discriminator(norm="batch", conditional=True)
    settings = Adversarial(gan="vanilla", discriminator=judge, pool=0)
    run = Run(1, residual=False, precision=precision)
    recipe = Pix2Pix(generator_of("unet_256"), settings, run)
    recipe.to(place)
    return lambda: recipe.step(batch, 0)


OURS: dict[str, Callable[[Batch, torch.device, Precision], Step]] = {
    "cyclegan": our_cyclegan,
    "pix2pix": our_pix2pix,
}
PLAIN = {"cyclegan": plain_cyclegan, "pix2pix": plain_pix2pix}


def timed(step: Step, place: torch.device) -> float:
    """Seconds of one step; on a CPU of processor time, which other work does not lengthen."""
    if place.type == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(method: str, arguments: Any) -> None:
    """Print the median of each form, all in turn, after one step to warm up."""
    place = torch.device(arguments.device)
    batch = batch_of(max(256, arguments.side) if method == "pix2pix" else arguments.side, place)
    forms = {"plain": PLAIN[method](batch, place)}
    for precision in arguments.precision:
        forms[precision] = OURS[method](batch, place, cast(Precision, precision))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(arguments.repeats + 1):
        for name, step in forms.items():
            taken = timed(step, place)
            if repeat:
                seconds[name].append(taken)
    base = statistics.median(seconds["plain"])
    print(f"{method}, {batch.source.shape[-1]} x {batch.source.shape[-1]}, batch 1, {place}")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f} s"
        print(f"  {name:6} {1 / middle:8.3f} samples/s  {base / middle:5.2f} x  ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description="speed of a training step")
    parser.add_argument("--side", type=int, default=128, help="pixels; pix2pix: at least 256")
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for method in arguments.methods:
        measure(method, arguments)


if __name__ == "__main__":
    main()
