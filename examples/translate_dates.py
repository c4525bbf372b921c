"""Translate dates as people write them into ISO's form with a recurrent encoder-decoder: Bahdanau, then Luong.

    python examples/translate_dates.py       with fastattn installed
    python -m examples.translate_dates       from a checkout's root, after `make build`

"Saturday, 3 March 2018", "3/3/18" (day first) and "MAR 3RD, 2018" all become "2018-03-03". A bidirectional GRU reads
the characters; a GRU writes the ten characters of the answer, each with a look back at what was read. How it looks is
where the two models differ:

    Bahdanau et al. (2015)   additive scores of the state *before* the step; what was seen is an input of the step
    Luong et al. (2015)      multiplicative scores ("general") of the state *after* it; what was seen joins the output

The run fails unless both get at least 99% of the dates right to the last character, on days they were never trained on.
The picture shows where each looked while it wrote.
"""

from __future__ import annotations

import datetime
import random
import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm  # type: ignore[import-untyped]

import fastattn

try:
    from examples import common
except ImportError:  # run as a file: its folder, not the root, is on the path
    import common  # type: ignore[import-not-found, no-redef]

FIRST_DAY, DAYS = datetime.date(1950, 1, 1), 36524  # to the end of 2049: two digits of a year are enough
EMBEDDING, WIDTH = 32, 128
BATCH = 64
STEPS, SMOKE_STEPS = 300, 25
LEARNING_RATE = 4e-3
TESTED = 2000
EXACT, SMOKE_CHARACTERS = 0.99, 0.25

OUTPUTS = "0123456789-"
LENGTH = len("2018-03-03")
START = len(OUTPUTS)  # what the decoder reads before its first character


def ordinal(day: int) -> str:
    return f"{day}{'th' if day in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


FORMATS: tuple[Callable[[datetime.date], str], ...] = (
    lambda d: f"{d:%A}, {d.day} {d:%B} {d.year}",
    lambda d: f"{d:%a} {d.day} {d:%b} {d.year}",
    lambda d: f"{d.day} {d:%B} {d.year}",
    lambda d: f"{d:%B} {d.day}, {d.year}",
    lambda d: f"{d:%b} {d.day} {d.year}",
    lambda d: f"{d:%b} {ordinal(d.day)}, {d.year}",
    lambda d: f"{ordinal(d.day)} of {d:%B} '{d:%y}",
    lambda d: f"{d.day}/{d.month}/{d:%y}",
    lambda d: f"{d:%d.%m.%Y}",
)


INPUTS = string.ascii_letters + string.digits + " ,./'"
PADDING = len(INPUTS)


class Batch:
    """Days, each as somebody wrote it, as numbers."""

    def __init__(self, days: list[datetime.date], texts: list[str]) -> None:
        self.texts = texts
        self.lengths = torch.tensor([len(text) for text in self.texts], dtype=torch.int32)  # (B,)
        self.inputs = torch.full((len(days), int(self.lengths.max())), PADDING)  # (B, L)
        for row, text in zip(self.inputs, self.texts, strict=True):
            row[: len(text)] = torch.tensor([INPUTS.index(c) for c in text])
        self.targets = torch.tensor([[OUTPUTS.index(c) for c in day.isoformat()] for day in days])  # (B, LENGTH)

    def right_so_far(self) -> Tensor:
        """(B, LENGTH): what a decoder reads before each character if all it has written is right."""
        return F.pad(self.targets[:, :-1], (1, 0), value=START)


def write_batch(days: list[datetime.date], chance: random.Random) -> Batch:
    return Batch(days, [chance.choice((str, str.lower, str.upper))(chance.choice(FORMATS)(day)) for day in days])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(INPUTS) + 1, EMBEDDING)
        self.gru = nn.GRU(EMBEDDING, WIDTH // 2, batch_first=True, bidirectional=True)
        self.start = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) characters -> what was read (B, L, WIDTH), and the decoder's first state (B, WIDTH)."""
        packed = pack_padded_sequence(self.embed(inputs), lengths.long(), batch_first=True, enforce_sorted=False)
        packed, last = self.gru(packed)
        memory, _ = pad_packed_sequence(packed, batch_first=True)
        return memory, torch.tanh(self.start(last.transpose(0, 1).flatten(1)))


class Bahdanau(nn.Module):
    """c_t = attention(s_t-1);  s_t = GRU([y_t-1; c_t], s_t-1);  y_t from [s_t; c_t]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.attention = fastattn.nn.AdditiveAttention(query_dim=WIDTH, key_dim=WIDTH, attn_dim=WIDTH)
        self.embed = nn.Embedding(len(OUTPUTS) + 1, EMBEDDING)
        self.gru = nn.GRUCell(EMBEDDING + WIDTH, WIDTH)
        self.out = nn.Linear(2 * WIDTH, len(OUTPUTS))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, LENGTH, characters), with a teacher: what it reads are the right characters so far."""
        memory, state = self.encoder(batch.inputs, batch.lengths)
        keys = self.attention.project_keys(memory)  # once for all steps
        logits = []
        for read in batch.right_so_far().unbind(1):
            seen = self.attention(state, keys, kv_lengths=batch.lengths)  # (B, WIDTH)
            state = self.gru(torch.cat([self.embed(read), seen], 1), state)
            logits.append(self.out(torch.cat([state, seen], 1)))
        return torch.stack(logits, 1)

    @torch.no_grad()
    def write(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The characters that it writes (B, LENGTH), and where it looks (B, LENGTH, L)."""
        memory, state = self.encoder(batch.inputs, batch.lengths)
        keys = self.attention.project_keys(memory)
        written, weights = [torch.full((len(memory),), START)], []
        for _ in range(LENGTH):
            seen, p = self.attention(state, keys, kv_lengths=batch.lengths, need_weights=True)
            state = self.gru(torch.cat([self.embed(written[-1]), seen], 1), state)
            written.append(self.out(torch.cat([state, seen], 1)).argmax(1))
            weights.append(p)
        return torch.stack(written[1:], 1), torch.stack(weights, 1)


class Luong(nn.Module):
    """s_t = GRU(y_t-1, s_t-1);  c_t = attention(s_t);  y_t from tanh(W [c_t; s_t])."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.attention = fastattn.nn.LuongAttention("general", query_dim=WIDTH, key_dim=WIDTH)
        self.embed = nn.Embedding(len(OUTPUTS) + 1, EMBEDDING)
        self.gru = nn.GRU(EMBEDDING, WIDTH, batch_first=True)
        self.join = nn.Linear(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, len(OUTPUTS))

    def forward(self, batch: Batch) -> Tensor:
        """As Bahdanau's. No state depends on what was seen, so all steps are taken at once."""
        memory, state = self.encoder(batch.inputs, batch.lengths)
        states, _ = self.gru(self.embed(batch.right_so_far()), state[None])  # (B, LENGTH, WIDTH)
        seen = self.attention(states, memory, kv_lengths=batch.lengths)
        logits: Tensor = self.out(torch.tanh(self.join(torch.cat([seen, states], 2))))
        return logits

    @torch.no_grad()
    def write(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As Bahdanau's."""
        memory, state = self.encoder(batch.inputs, batch.lengths)
        state = state[None]
        written, weights = [torch.full((len(memory), 1), START)], []
        for _ in range(LENGTH):
            states, state = self.gru(self.embed(written[-1]), state)  # one step: (B, 1, WIDTH)
            seen, p = self.attention(states, memory, kv_lengths=batch.lengths, need_weights=True)
            written.append(self.out(torch.tanh(self.join(torch.cat([seen, states], 2)))).argmax(2))
            weights.append(p)
        return torch.cat(written[1:], 1), torch.cat(weights, 1)


Translator = Bahdanau | Luong


def train(model: Translator, days: list[datetime.date], steps: int, chance: random.Random, name: str) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    losses = []
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for _ in range(steps):
            batch = write_batch(chance.sample(days, BATCH), chance)
            loss = F.cross_entropy(model(batch).flatten(0, 1), batch.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
            bar.update()
    return losses


def write_plot(options: Any, result: dict[str, Any], models: dict[str, Translator]) -> None:
    figure = common.new_figure(13.5, 7.6)
    figure.suptitle("Dates as people write them, into ISO's form: where each model looks while it writes", fontsize=13)
    day = datetime.date(2018, 3, 3)
    curves, *rows = figure.subplot_mosaic(
        [["curves", "0", "1"], ["curves", "2", "3"]], width_ratios=(0.8, 1.4, 1)
    ).values()
    for (name, model), color in zip(result["models"].items(), (common.BLUE, common.ORANGE), strict=True):
        curves.plot(model["losses"], color=color, linewidth=1, label=f"{name}: {model['exact']:.1%} exact")
    curves.set(yscale="log", xlabel="step", ylabel="training loss, nats a character")
    curves.set_title(f"Exact: of {TESTED} dates never trained on", loc="left", fontsize=11)
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)
    for n, ax in enumerate(rows):
        name, style = list(models)[n // 2], (0, 5)[n % 2]
        batch = Batch([day], [FORMATS[style](day)])
        written, weights = models[name].write(batch)
        answer = "".join(OUTPUTS[c] for c in written[0].tolist())
        fastattn.plot_attention(weights[0], batch.texts[0].replace(" ", "␣"), answer, ax, colorbar=n % 2 == 1)
        ax.set_title(name, loc="left", fontsize=11)
        ax.set_ylabel("written, from top to bottom")
        ax.set_xlabel("read")
    common.save_figure(figure, options.plot)


def main() -> None:
    smoke = f"{SMOKE_STEPS} steps, and some of the characters right"
    options = common.parse_options("translate_dates", __doc__.splitlines()[0], smoke)
    chance = random.Random(options.seed)
    days = [FIRST_DAY + datetime.timedelta(n) for n in range(DAYS)]
    chance.shuffle(days)
    held_back, days = days[:TESTED], days[TESTED:]
    test = write_batch(held_back, chance)

    models: dict[str, Translator] = {"Bahdanau": Bahdanau(), "Luong": Luong()}
    result: dict[str, Any] = {"models": {}}
    promises = []
    for name, model in models.items():
        losses = train(model, days, SMOKE_STEPS if options.smoke else STEPS, chance, name)
        right = model.write(test)[0] == test.targets  # (TESTED, LENGTH)
        characters, exact = float(right.float().mean()), float(right.all(1).float().mean())
        result["models"][name] = {"losses": losses, "characters": characters, "exact": exact}
        if options.smoke:
            promises.append(common.Promise(f"{name}: characters right", characters, SMOKE_CHARACTERS))
        else:
            promises.append(common.Promise(f"{name}: dates right", exact, EXACT))
    if not options.no_plot:
        write_plot(options, result, models)
    common.finish(options, result, promises)


if __name__ == "__main__":
    main()
