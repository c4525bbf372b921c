"""Train a small causal transformer to write like Python's own documentation, character by character.

    python examples/char_gpt.py       with fastattn installed
    python -m examples.char_gpt       from a checkout's root, after `make build`

The text is what `help("topics")` reads from: about 460 000 characters that every Python ships. The last tenth is held
back. After about a minute of training, the model must predict it with a loss (mean negative log-likelihood, in nats a
character) below the bound, which no count of letters or of pairs of letters reaches; then it writes some of its own.
All attention is fastattn.attention(causal=True).

The picture shows the loss beside those of counting, and what one head looks back at while the model reads a heading.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

import fastattn

try:
    from examples import common
except ImportError:  # run as a file: its folder, not the root, is on the path
    import common  # type: ignore[import-not-found, no-redef]

DEPTH, HEADS, WIDTH, CONTEXT = 3, 4, 128, 128  # heads of 32
BATCH = 16
STEPS, SMOKE_STEPS = 750, 30
LEARNING_RATE = 3e-3
LOSS, SMOKE_LOSS = 1.6, 3.2  # nats a character
PROMPT = 'The "for" statement'


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, WIDTH) -> q, k and v, each (B, HEADS, L, WIDTH / HEADS)."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:  # (B, L, WIDTH)
        o = fastattn.attention(*self.heads(x), causal=True)  # (B, HEADS, L, WIDTH / HEADS)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class CharacterModel(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:  # (B, L) -> (B, L, characters): logits of the character that follows
        x = self.embed(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def weights(self, text: Tensor) -> Tensor:
        """(L,) -> (DEPTH, HEADS, L, L): how much each character attends to those before it."""
        x = self.embed(text[None]) + self.position[: len(text)]
        found = []
        block: Any
        for block in self.blocks:
            q, k, _ = block.heads(x)
            found.append(fastattn.attention_weights(q, k, causal=True)[0])
            x = block(x)
        return torch.stack(found)

    @torch.no_grad()
    def write(self, text: Tensor, length: int, temperature: float = 0.7) -> Tensor:
        """(L,) -> (L + length,): continues the text, one sampled character at a time."""
        for _ in range(length):
            logits = self(text[None, -CONTEXT:])[0, -1]
            text = torch.cat([text, torch.multinomial(torch.softmax(logits / temperature, -1), 1)])
        return text


@dataclass
class Text:
    """The text as numbers, and back."""

    characters: str  # all that occur
    train: Tensor  # (N,)
    held_back: Tensor

    @classmethod
    def load(cls) -> Text:
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics))
        characters = "".join(sorted(set(text)))
        number = {character: n for n, character in enumerate(characters)}
        encoded = torch.tensor([number[character] for character in text])
        train, held_back = encoded.tensor_split([len(text) * 9 // 10])
        return cls(characters, train, held_back)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.characters.index(character) for character in text])

    def decode(self, numbers: Tensor) -> str:
        return "".join(self.characters[n] for n in numbers.tolist())


def counting_losses(text: Text) -> dict[str, float]:
    """Loss on the text held back of a model that counts letters, and of one that counts pairs of letters."""
    n = len(text.characters)
    single = (torch.bincount(text.train, minlength=n) + 1).double()
    pairs = (torch.bincount(n * text.train[:-1] + text.train[1:], minlength=n * n) + 0.1).double().view(n, n)
    before, after = text.held_back[:-1], text.held_back[1:]
    return {
        "counting letters": -float((single / single.sum()).log()[after].mean()),
        "counting pairs of letters": -float((pairs / pairs.sum(1, keepdim=True)).log()[before, after].mean()),
    }


@torch.no_grad()
def held_back_loss(model: CharacterModel, text: Text) -> float:
    """Over windows of CONTEXT characters, one after the other."""
    windows = text.held_back[: (len(text.held_back) - 1) // CONTEXT * CONTEXT + 1]
    inputs, targets = windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    ]
    return sum(losses) / targets.numel()


def train(model: CharacterModel, text: Text, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    offsets = torch.arange(CONTEXT + 1)
    losses = []
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(steps):
            starts = torch.randint(len(text.train) - CONTEXT, (BATCH, 1))
            windows = text.train[starts + offsets]  # (BATCH, CONTEXT + 1)
            loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            bar.update()
    return losses


def write_plot(options: Any, result: dict[str, Any], model: CharacterModel, text: Text) -> None:
    figure = common.new_figure(12, 8.6)
    figure.suptitle("A causal transformer learns to write like Python's documentation", fontsize=13)
    curves, attention, sample, heads = figure.subplot_mosaic(
        [["curves", "attention"], ["sample", "heads"]], width_ratios=(1, 1), height_ratios=(1.7, 1)
    ).values()

    curves.plot(result["losses"], color=common.BLUE, linewidth=1, label="training")
    curves.axhline(result["held_back_loss"], color=common.ORANGE, label=f"held back: {result['held_back_loss']:.2f}")
    for (name, loss), style in zip(result["counting_losses"].items(), (":", "--"), strict=True):
        curves.axhline(loss, color=common.GREY, linestyle=style, label=f"{name}: {loss:.2f}")
    curves.set(xlabel="step", ylabel="loss, nats a character", ylim=(1, math.log(len(text.characters))))
    curves.set_title("Loss", loc="left")
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)

    # Some heads only look at the character before; the one that looks furthest back is worth seeing.
    weights = model.weights(text.encode(PROMPT))  # (DEPTH, HEADS, L, L)
    places = torch.arange(len(PROMPT))
    reach = (weights * (places[:, None] - places)).sum(-1).mean(-1)
    layer, head = divmod(int(reach.argmax()), HEADS)
    letters = PROMPT.replace(" ", "␣")
    fastattn.plot_attention(weights[layer, head], letters, letters, attention)
    attention.set_title(f"Layer {layer}, head {head}: each character (a row) looks back", loc="left")

    for n, of_layer in enumerate(reach.tolist()):
        bars = heads.bar([n + (h - (HEADS - 1) / 2) * 0.2 for h in range(HEADS)], of_layer, 0.16, color=common.BLUE)
        if n == layer:
            bars[head].set_color(common.ORANGE)
    heads.set_xticks(range(DEPTH), [f"layer {n}" for n in range(DEPTH)])
    heads.set(ylabel="characters")
    heads.set_title("How far each head looks back in that text, on average", loc="left")
    heads.spines[["top", "right"]].set_visible(False)

    sample.set_axis_off()
    sample.set_title("What it writes", loc="left")
    written = "\n".join(result["sample"].splitlines()[:14])
    sample.text(0.01, 0.97, written, va="top", family="monospace", fontsize=8.5, parse_math=False)
    common.save_figure(figure, options.plot)


def main() -> None:
    options = common.parse_options("char_gpt", __doc__.splitlines()[0], f"{SMOKE_STEPS} steps, a looser bound")
    text = Text.load()
    model = CharacterModel(len(text.characters))
    losses = train(model, text, SMOKE_STEPS if options.smoke else STEPS)
    model.eval()
    result: dict[str, Any] = {
        "characters": len(text.train) + len(text.held_back),
        "losses": losses,
        "counting_losses": counting_losses(text),
        "held_back_loss": held_back_loss(model, text),
        "sample": text.decode(model.write(text.encode(PROMPT), 60 if options.smoke else 600)),
    }
    print(result["sample"])
    print(f"\nLoss on the text held back: {result['held_back_loss']:.3f} nats a character")
    for name, loss in result["counting_losses"].items():
        print(f"  {name} alone: {loss:.3f}")
    if not options.no_plot:
        write_plot(options, result, model, text)
    bound = SMOKE_LOSS if options.smoke else LOSS
    common.finish(options, result, [common.Promise("loss", result["held_back_loss"], bound, at_most=True)])


if __name__ == "__main__":
    main()
