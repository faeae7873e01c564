"""One training step beside the prototype that re-encodes the text every turn.

The peer generates each turn anew from the whole text with transformers' ``generate`` and trains one
pass per turn with full logits, in float32: the obvious way to write multi-turn RL. Both do the same
work: 16 dialogues, the given turns, exactly 32 new tokens a turn, full fine-tuning of SmolLM2-135M.

    python benchmarks/update.py --turns 3 --repeats 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from normkit.rl.environment import Reply, Step
from normkit.rl.models import load_policy
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer, TrainerConfig

NEW_TOKENS = 32
MESSAGE = "I lost my job by phone yesterday and I have not told anybody at home yet."


class Session:
    """A dialogue that lasts a fixed number of turns."""

    task, system, message = "career-bench", "You are a kind friend.", MESSAGE

    def __init__(self) -> None:
        self.turns = 0


class FixedWorld:
    """A world whose cost is nothing, so that generation and update are what is timed."""

    def __init__(self, turns: int) -> None:
        self.max_turns = turns

    def tasks(self, split: str) -> list[str]:
        return [f"{split}-{i}" for i in range(4)]

    def start(self, task: str, seed: int) -> Session:
        return Session()

    def step(self, sessions: list[Session], replies: list[Reply]) -> list[Step]:
        steps = []
        for i, session in enumerate(sessions):
            session.turns += 1
            over = session.turns >= self.max_turns
            steps.append(Step(float(i % 5), None if over else MESSAGE, "end" if over else None))
        return steps

    def score(self, session: Session) -> dict[str, float]:
        return {"score": 0.0}


def ours(turns: int, dtype: str, repeats: int) -> list[tuple[float, float]]:
    """Seconds of generation and of update, per repeat."""
    model, tokenizer = load_policy("smollm2")
    rollout = RolloutConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, dtype=dtype)
    config = TrainerConfig(steps=repeats + 1, autocast=dtype, learning_rate=1e-6)
    trainer = Trainer(model, tokenizer, FixedWorld(turns), config, rollout)
    found = [trainer.train_step() for _ in range(repeats + 1)][1:]
    return [(n["rollout_seconds"], n["update_seconds"]) for n in found]


def prototype(turns: int, repeats: int) -> list[tuple[float, float]]:
    """The same work without a carried cache and with one pass per turn."""
    model, tokenizer = load_policy("smollm2")
    tokenizer.padding_side = "left"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    found = []
    for _ in range(repeats):
        chats = [
            [{"role": "system", "content": Session.system}, {"role": "user", "content": MESSAGE}]
            for _ in range(16)
        ]
        passes = []
        started = time.perf_counter()
        for turn in range(turns):
            prompt = tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                padding=True,
            )
            with torch.no_grad():
                out = model.generate(
                    **prompt,
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                )
            width = prompt["input_ids"].shape[1]
            passes.append((out, prompt["attention_mask"], width))
            for i, chat in enumerate(chats):
                chat.append({"role": "assistant", "content": tokenizer.decode(out[i, width:])})
                if turn + 1 < turns:
                    chat.append({"role": "user", "content": MESSAGE})
        generated = time.perf_counter()
        for out, mask, width in passes:
            for part in range(0, 16, 4):
                rows = slice(part, part + 4)
                whole = torch.nn.functional.pad(mask[rows], (0, NEW_TOKENS), value=1)
                logits = model(out[rows], attention_mask=whole).logits[:, width - 1 : -1]
                logprob = torch.log_softmax(logits, -1)
                chosen = logprob.gather(-1, out[rows, width:, None])
                (-(chosen.mean()) / (4 * turns)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((generated - started, time.perf_counter() - generated))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = {
        "prototype float32": prototype(options.turns, options.repeats),
        "normkit float32": ours(options.turns, "float32", options.repeats),
        "normkit auto": ours(options.turns, "auto", options.repeats),
    }
    if options.json:
        print(json.dumps(runs))
        return
    base = runs["prototype float32"]
    for name, times in runs.items():
        line = [f"{name:18}"]
        for label, pick in (("generation", 0), ("update", 1), ("whole", None)):
            values = [sum(t) if pick is None else t[pick] for t in times]
            peer = [sum(t) if pick is None else t[pick] for t in base]
            ratio = statistics.median(peer) / statistics.median(values)
            line.append(f"{label} {min(values):.1f}..{max(values):.1f} s ({ratio:.1f}x)")
        print("  ".join(line))


if __name__ == "__main__":
    main()
