"""Caption a row of handwritten digits with their names, one look for each word: soft against hard attention.

    python examples/caption_digits.py       with fastattn installed
    python -m examples.caption_digits       from a checkout's root, after `make build`

"Show, attend and tell" (Xu et al., 2015) in small. One to four of scikit-learn's digits stand in a row, with or without
gaps; the caption is "seven three one". A convolutional network makes features of the image's patches, and a
GRU writes the caption. All that it learns of the image goes through attention, in one of two ways:

    soft   the mean of all patches, weighted by attention                        trained by back-propagation
    hard   one patch, drawn with the probability that attention gives to it      trained by REINFORCE

REINFORCE is the paper's (section 4.1): the baseline of the reward is a moving average, entropy is rewarded too, and
half of the looks are soft. Two things differ, for less noise: every image is looked at once in each way, and a
place is rewarded with what the word said there gained in log-likelihood over the soft look's.

The run fails unless both name enough of the words of images made of digits that they were never trained on. The
picture lays attention over the image at each word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
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

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "end")
END, START, NOTHING = 10, 11, -100  # NOTHING: padding of the targets, which no loss counts
MIN_DIGITS, MAX_DIGITS = 1, 4
DIGIT, GAP, PATCH = 8, 2, 4  # pixels: a digit's side, the largest gap before it, a patch's side
HEIGHT, IMAGE_WIDTH = DIGIT, MAX_DIGITS * (DIGIT + GAP)
ROWS, COLUMNS = HEIGHT // PATCH, IMAGE_WIDTH // PATCH

WIDTH = 64
BATCH = 64
STEPS, SMOKE_STEPS = {"soft": 400, "hard": 800}, {"soft": 15, "hard": 15}
LEARNING_RATE = 4e-3
ENTROPY_REWARD, BASELINE_DECAY = 0.2, 0.9  # the first falls to 0 in the course of the training
# Rows begin with one digit, where every look at it tells something, and grow when the mean loss falls below this.
GROWTH_LOSS = 0.4
# The mean of many patches, most of them of other digits, is small. Unscaled, 400 steps of hard attention were not
# enough to tell digits apart, and until then there is no telling where to look; scaled, 100 are.
SEEN_SCALE = 4.0
TESTED = 500
ACCURACY, SMOKE_ACCURACY = {"soft": 0.95, "hard": 0.92}, {"soft": 0.1, "hard": 0.1}


@dataclass
class Batch:
    images: Tensor  # (B, 1, HEIGHT, IMAGE_WIDTH), in 0..1
    targets: Tensor  # (B, MAX_DIGITS + 1): words, then END, then NOTHING
    places: Tensor  # (B, MAX_DIGITS): the left edge of each digit

    @property
    def inputs(self) -> Tensor:
        """(B, MAX_DIGITS + 1): what the decoder reads, START and the words so far."""
        return F.pad(self.targets[:, :-1].clamp(min=0), (1, 0), value=START)

    def twice(self) -> Batch:
        return Batch(*(torch.cat([x, x]) for x in (self.images, self.targets, self.places)))


@dataclass
class Digits:
    images: Tensor  # (N, DIGIT, DIGIT), in 0..1
    labels: Tensor  # (N,)

    def make_batch(self, size: int, most: int = MAX_DIGITS) -> Batch:
        """Rows of MIN_DIGITS to most digits, at random."""
        images = torch.zeros(size, 1, HEIGHT, IMAGE_WIDTH)
        targets = torch.full((size, MAX_DIGITS + 1), NOTHING)
        places = torch.zeros(size, MAX_DIGITS, dtype=torch.long)
        counts = torch.randint(MIN_DIGITS, most + 1, (size,)).tolist()
        chosen = torch.randint(len(self.labels), (size, MAX_DIGITS)).tolist()
        gaps = torch.randint(GAP + 1, (size, MAX_DIGITS)).tolist()
        for n in range(size):
            left = 0
            for place in range(counts[n]):
                left += gaps[n][place]
                images[n, 0, :, left : left + DIGIT] = self.images[chosen[n][place]]
                targets[n, place] = self.labels[chosen[n][place]]
                places[n, place] = left
                left += DIGIT
            targets[n, counts[n]] = END
        return Batch(images, targets, places)


def load_data(seed: int) -> tuple[Digits, Digits]:
    """Digits to train on, and those to test on: one in five."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.as_tensor(x) for x in split)
    sides = (-1, DIGIT, DIGIT)
    return Digits(train_x.float().view(sides), train_y), Digits(test_x.float().view(sides), test_y)


class Captioner(nn.Module):
    """s_t attends to the patches and sees z_t;  s_t+1 = GRU([y_t; z_t], s_t);  the next word from [s_t+1; z_t]."""

    def __init__(self, is_hard: bool) -> None:
        super().__init__()
        self.is_hard = is_hard
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, WIDTH // 2, 3, padding=1), nn.BatchNorm2d(WIDTH // 2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(WIDTH // 2, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        )
        self.position = nn.Parameter(0.3 * torch.randn(ROWS * COLUMNS, WIDTH))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.first = nn.Parameter(torch.zeros(WIDTH))
        self.embed = nn.Embedding(START + 1, WIDTH)
        self.gru = nn.GRUCell(2 * WIDTH, WIDTH)
        self.out = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, END + 1))

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is seen (B, 1, 1, WIDTH), and the log-probability of having looked there (B, 1, 1); 0 if softly.

        In training, hard attention is soft for the first half of the batch.
        """
        if not self.is_hard:
            return fastattn.attention(q, k, v), torch.zeros(q.shape[:3])
        if not self.training:
            hard = fastattn.hard_attention(q, k, v, mode="argmax")
            return hard.output, hard.log_prob
        (q, hard_q), (k, hard_k), (v, hard_v) = q.chunk(2), k.chunk(2), v.chunk(2)
        soft = fastattn.attention(q, k, v)
        hard = fastattn.hard_attention(hard_q, hard_k, hard_v, mode="sample")
        return torch.cat([soft, hard.output]), torch.cat([torch.zeros_like(hard.log_prob), hard.log_prob])

    def forward(self, images: Tensor, inputs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, words), log-probabilities of the places (B, T), attention weights (B, T, patches).

        Without inputs (B, T) to read, it reads what it wrote itself.
        """
        features = self.convolutions(images).flatten(2).transpose(1, 2) + self.position  # (B, patches, WIDTH)
        k, v = self.k(features)[:, None], self.v(features)[:, None]  # one head
        state = self.first.expand(len(images), -1)
        read = torch.full((len(images),), START)
        logits, log_probs, weights = [], [], []
        for t in range(MAX_DIGITS + 1):
            q = self.q(state)[:, None, None]  # (B, 1, 1, WIDTH)
            seen, log_prob = self.look(q, k, v)
            z = SEEN_SCALE * seen[:, 0, 0]
            state = self.gru(torch.cat([self.embed(read if inputs is None else inputs[:, t]), z], 1), state)
            logits.append(self.out(torch.cat([state, z], 1)))
            log_probs.append(log_prob[:, 0, 0])
            if not self.training:
                weights.append(fastattn.attention_weights(q, k)[:, 0, 0])
            read = logits[-1].argmax(1)
        looked = torch.stack(weights, 1) if weights else images.new_zeros(0)
        return torch.stack(logits, 1), torch.stack(log_probs, 1), looked


class Rewards:
    """The part of the loss whose gradient is REINFORCE's: makes places likelier that led to good words."""

    def __init__(self) -> None:
        self.baseline = torch.zeros(MAX_DIGITS + 1)  # one for each word of the caption

    def loss(self, nll: Tensor, log_probs: Tensor, counts: Tensor, entropy_reward: float) -> Tensor:
        """nll, log_probs and counts (whether the word counts) are (B, T), first the soft looks, then the hard ones."""
        soft, hard = nll.detach().chunk(2)
        log_probs, counts = log_probs.chunk(2)[1], counts.chunk(2)[1]
        reward = soft - hard  # how much more likely the word was than after the soft look at the same image
        reward = reward - entropy_reward * log_probs.detach()  # whose gradient is that of the entropy
        mean = (reward * counts).sum(0) / counts.sum(0).clamp(min=1)
        self.baseline = BASELINE_DECAY * self.baseline + (1 - BASELINE_DECAY) * mean
        advantage = reward - self.baseline
        return -(advantage * log_probs * counts).sum() / counts.sum()


def train(model: Captioner, digits: Digits, steps: int, name: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    rewards = Rewards()
    losses = []
    most, mean_loss = MIN_DIGITS, math.inf
    model.train()
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for step in range(steps):
            batch = digits.make_batch(BATCH // 2 if model.is_hard else BATCH, most)
            if model.is_hard:
                batch = batch.twice()
            logits, log_probs, _ = model(batch.images, batch.inputs)
            counts = batch.targets != NOTHING
            nll = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=NOTHING, reduction="none")
            mean_nll = nll.sum() / counts.sum()
            optimizer.zero_grad()
            loss = mean_nll
            if model.is_hard:  # which is to try many places first, and to settle in the end
                loss = loss + rewards.loss(nll, log_probs, counts, ENTROPY_REWARD * (1 - step / steps))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(mean_nll.item())
            mean_loss = losses[-1] if mean_loss == math.inf else 0.9 * mean_loss + 0.1 * losses[-1]
            if mean_loss < GROWTH_LOSS and most < MAX_DIGITS:
                most, mean_loss = most + 1, math.inf
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
            bar.update()
    model.eval()
    return losses


@torch.no_grad()
def evaluate(model: Captioner, test: Batch) -> dict[str, float]:
    logits, _, weights = model(test.images)
    counts = test.targets != NOTHING
    right = logits.argmax(2) == test.targets
    # Where attention is strongest: does that patch belong to the digit that is named?
    patch = weights.argmax(2)[:, :MAX_DIGITS]
    left = PATCH * (patch % COLUMNS)
    overlaps = (left + PATCH > test.places) & (left < test.places + DIGIT)
    is_digit = counts[:, :MAX_DIGITS] & (test.targets[:, :MAX_DIGITS] != END)
    return {
        "accuracy": float(right[counts].float().mean()),
        "captions": float((right | ~counts).all(1).float().mean()),
        "on_digit": float(overlaps[is_digit].float().mean()),
    }


def write_plot(options: Any, result: dict[str, Any], models: dict[str, Captioner], test: Batch) -> None:
    figure = common.new_figure(13, 6.6)
    figure.suptitle("Show, attend and tell: where each model looks when it says each word", fontsize=13)
    parts = np.asarray(figure.subfigures(3, 1, height_ratios=(1, 1, 2)))
    longest = int((test.targets != NOTHING).sum(1).argmax())
    image = test.images[longest : longest + 1]
    for part, (name, model) in zip(parts, models.items(), strict=False):
        with torch.no_grad():
            logits, _, weights = model(image)
        words = [WORDS[n] for n in logits[0].argmax(1).tolist()]
        if model.is_hard:
            weights = F.one_hot(weights.argmax(2), ROWS * COLUMNS)  # what it uses: one patch
        axes = part.subplots(1, len(words))
        fastattn.plot_attention(weights[0], None, words, axes, image=image[0, 0], vmax=1.0, smooth=not model.is_hard)
        part.suptitle(f"{name} attention", fontsize=11)
    curves = parts[-1].subplots()
    for (name, found), color in zip(result["models"].items(), (common.BLUE, common.ORANGE), strict=True):
        label = (
            f"{name}: {found['accuracy']:.1%} of the words right, {found['on_digit']:.0%} while looking at the digit"
        )
        curves.plot(found["losses"], color=color, linewidth=1, label=label)
    curves.set(yscale="log", xlabel="step", ylabel="training loss, nats a word")
    curves.set_title("Where the loss jumps, rows have grown by one digit", loc="left", fontsize=11)
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)
    common.save_figure(figure, options.plot)


def main() -> None:
    options = common.parse_options("caption_digits", __doc__.splitlines()[0], "a few steps, and accuracy above chance")
    train_digits, test_digits = load_data(options.seed)
    test = test_digits.make_batch(TESTED)
    models = {"soft": Captioner(is_hard=False), "hard": Captioner(is_hard=True)}
    result: dict[str, Any] = {"models": {}}
    promises = []
    for name, model in models.items():
        steps, accuracy = (SMOKE_STEPS, SMOKE_ACCURACY) if options.smoke else (STEPS, ACCURACY)
        losses = train(model, train_digits, steps[name], name)
        found: dict[str, Any] = {"losses": losses, **evaluate(model, test)}
        result["models"][name] = found
        print(
            f"{name}: {found['captions']:.1%} of the captions right as a whole, {found['on_digit']:.1%} of the digits"
        )
        print("  named while attention was strongest on them")
        promises.append(common.Promise(f"{name}: words right", found["accuracy"], accuracy[name]))
    if not options.no_plot:
        write_plot(options, result, models, test)
    common.finish(options, result, promises)


if __name__ == "__main__":
    main()
