"""Train a small vision transformer on scikit-learn's handwritten digits, with PyTorch's attention and with fastattn.

    python examples/train_vit_digits.py       with fastattn installed
    python -m examples.train_vit_digits       from a checkout's root, after `make build`

Two models start from the same weights and see the same batches, step by step in turns, so that a machine that drifts
slows both alike. One calls torch.nn.functional.scaled_dot_product_attention as it is, the other under
fastattn.replaced_sdpa(); nothing else differs, and the model knows nothing of it. The run fails unless both loss curves
agree to rounding, both models are right on at least 95% of the digits held back, and fastattn served every call.

The images are 8 x 8 pixels; each pixel with its eight neighbours is one token. A model this small spends much of its
step outside attention, and the table says how much: the rest is what no attention kernel can speed up.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

import fastattn

try:
    from examples import common
except ImportError:  # run as a file: its folder, not the root, is on the path
    import common  # type: ignore[import-not-found, no-redef]

IMAGE, CLASSES = 8, 10
TOKENS = IMAGE * IMAGE
DEPTH, HEADS, WIDTH = 4, 8, 64  # heads of 8
BATCH = 64
EPOCHS, SMOKE_EPOCHS = 12, 2
LEARNING_RATE = 2e-3

# Two ways to sum in float32 agree to about 1e-7 in a single step, and training magnifies what remains: by 12 epochs at
# this learning rate, SDPA's own two CPU backends are 3e-6 apart (at 3e-3 it would be 7e-4).
EARLY_STEPS, EARLY_BOUND = 20, 1e-5
LOSS_BOUND = 1e-3
ACCURACY, SMOKE_ACCURACY = 0.95, 0.30


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, WIDTH)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v)  # (B, HEADS, L, WIDTH / HEADS)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:  # (B, 8, 8) -> (B, CLASSES)
        neighbourhoods = F.unfold(images[:, None], 3, padding=1).transpose(1, 2)  # (B, L, 9)
        x = self.blocks(self.embed(neighbourhoods) + self.position)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@dataclass
class Trainee:
    """One of the two models, with everything that its training changes."""

    name: str
    attention: Callable[[], AbstractContextManager[Any]]  # in force during its steps
    seed: int
    steps: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = VisionTransformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=self.steps, pct_start=0.2
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        with self.attention():
            start = time.perf_counter()
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss.item())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with self.attention(), torch.no_grad():
            return float((self.model(images).argmax(1) == labels).float().mean())


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 8, 8) in 0..1 and labels to train on, then those to test on: one digit in five."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.as_tensor(x) for x in split)
    return train_x.float().view(-1, IMAGE, IMAGE), train_y, test_x.float().view(-1, IMAGE, IMAGE), test_y


def attention_ms(trainee: Trainee, repeats: int = 15) -> float:
    """Median time of the attention in one training step: forward and backward at the model's shape, in every block."""
    q, k, v = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    d_o = torch.randn(BATCH, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)
    times = []
    with trainee.attention():
        for _ in range(repeats + 2):
            start = time.perf_counter()
            o = F.scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(o, (q, k, v), d_o)
            times.append(1e3 * DEPTH * (time.perf_counter() - start))
    return statistics.median(times[2:])


def train(epochs: int, seed: int) -> dict[str, Any]:
    train_x, train_y, test_x, test_y = load_data(seed)
    steps_per_epoch = len(train_x) // BATCH
    steps = epochs * steps_per_epoch
    pytorch = Trainee("PyTorch SDPA", contextlib.nullcontext, seed, steps)
    ours = Trainee("fastattn", fastattn.replaced_sdpa, seed, steps)
    order = torch.Generator().manual_seed(seed)

    fastattn.sdpa_calls(reset=True)
    with tqdm(total=steps, unit="step", desc="training both", leave=False, disable=None) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(train_x), generator=order)[: steps_per_epoch * BATCH].view(-1, BATCH):
                for trainee in (pytorch, ours):
                    trainee.step(train_x[batch], train_y[batch])
                bar.set_postfix_str(f"loss {pytorch.losses[-1]:.4f}, difference {differences(pytorch, ours)[-1]:.1e}")
                bar.update()
    calls = fastattn.sdpa_calls()

    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "epochs": epochs,
        "steps": steps,
        "parameters": sum(p.numel() for p in pytorch.model.parameters()),
        "calls_served": calls.served,
        "calls_handed_back": dict(calls.handed_back),
        "early_difference": max(differences(pytorch, ours)[:EARLY_STEPS]),
        "loss_difference": max(differences(pytorch, ours)),
        "models": {},
    }
    for trainee in (pytorch, ours):
        step_ms = statistics.median(trainee.step_ms)
        result["models"][trainee.name] = {
            "accuracy": trainee.accuracy(test_x, test_y),
            "final_loss": trainee.losses[-1],
            "step_ms": step_ms,
            "attention_ms": attention_ms(trainee),
            "losses": trainee.losses,
        }
    return result


def differences(a: Trainee, b: Trainee) -> list[float]:
    return [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]


def promises(result: dict[str, Any], accuracy: float) -> list[common.Promise]:
    """That the two trainings are one and the same, and good."""
    handed_back = sum(result["calls_handed_back"].values())
    return [
        common.Promise(f"difference of the losses, {EARLY_STEPS} steps", result["early_difference"], EARLY_BOUND, True),
        common.Promise("difference of the losses, all steps", result["loss_difference"], LOSS_BOUND, True),
        common.Promise("calls that fastattn served", result["calls_served"], DEPTH * result["steps"]),
        common.Promise("calls handed back to PyTorch", handed_back, 0, True),
        *(common.Promise(f"{name}: digits right", m["accuracy"], accuracy) for name, m in result["models"].items()),
    ]


def print_table(result: dict[str, Any]) -> None:
    pytorch, ours = result["models"].values()
    print(
        f"A vision transformer of {result['parameters']} parameters ({DEPTH} blocks, {HEADS} heads of "
        f"{WIDTH // HEADS}, {TOKENS} tokens) on handwritten digits, {result['steps']} steps of {BATCH} images"
    )
    print(f"{'':14}{'accuracy':>10}{'ms per step':>13}{'attention ms':>14}{'share':>8}")
    for name, model in result["models"].items():
        share = model["attention_ms"] / model["step_ms"]
        print(
            f"{name:14}{model['accuracy']:>10.1%}{model['step_ms']:>13.1f}{model['attention_ms']:>14.1f}{share:>8.0%}"
        )
    print(
        f"{'speed-up':14}{'':>10}{pytorch['step_ms'] / ours['step_ms']:>12.2f}x"
        f"{pytorch['attention_ms'] / ours['attention_ms']:>13.2f}x"
    )
    print(
        f"Largest difference of the loss curves: {result['loss_difference']:.1e} "
        f"({result['early_difference']:.1e} in the first {EARLY_STEPS} steps)"
    )


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """Loss curves of both, one drawn over the other, and their time per step."""
    colors = (common.GREY, common.ORANGE)
    figure = common.new_figure(11, 4.3)
    curves, bars = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for (name, model), color, width in zip(result["models"].items(), colors, (4.5, 1.3), strict=True):
        curves.plot(model["losses"], color=color, linewidth=width, label=f"{name}: {model['accuracy']:.1%} right")
    curves.set(yscale="log", xlabel="step", ylabel="training loss")
    curves.set_title(f"Same curve: at most {result['loss_difference']:.0e} apart", loc="left", fontsize=11)
    curves.legend(frameon=False)

    names = list(result["models"])
    attention = [model["attention_ms"] for model in result["models"].values()]
    steps = [model["step_ms"] for model in result["models"].values()]
    rest = [max(0.0, step - part) for step, part in zip(steps, attention, strict=True)]
    bars.bar(names, rest, color="#dfe3e8", width=0.6, label="everything else")
    bars.bar(names, attention, bottom=rest, color=colors, width=0.6, label="attention")
    for position, step in enumerate(steps):
        bars.annotate(f"{step:.1f} ms", (position, step), (0, 4), textcoords="offset points", ha="center")
    bars.set_ylabel("ms per step")
    bars.set_title(f"{steps[0] / steps[1]:.2f} times faster (attention in colour)", loc="left", fontsize=11)
    for ax in (curves, bars):
        ax.spines[["top", "right"]].set_visible(False)
    common.save_figure(figure, path)


def main() -> None:
    smoke = f"{SMOKE_EPOCHS} epochs, and less accuracy asked for"
    options = common.parse_options(
        "train_vit_digits", "A vision transformer on handwritten digits, trained twice.", smoke
    )
    result = train(SMOKE_EPOCHS if options.smoke else EPOCHS, options.seed)
    print_table(result)
    if not options.no_plot:
        write_plot(options.plot, result)
    common.finish(options, result, promises(result, SMOKE_ACCURACY if options.smoke else ACCURACY))


if __name__ == "__main__":
    main()
