"""SmolLM2-135M learns to call tools: warmed up by normkit, then trained in TRL with credit by turn.

    python examples/trl_tools.py --folder runs/trl-tools

It asks one kind of question, which takes three of the eight tools, so that two processors can do
it. The warm model is kept in the folder; a second run goes on from there. docs/guides/cluster.md
says what came of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from trl import GRPOConfig
from trl.chat_template_utils import qwen2_5_chat_template

from normkit.integrations.trl import TurnAdvantageTrainer
from normkit.integrations.trl_tools import reference_dialogues, tool_calling
from normkit.rl.environment import Split
from normkit.rl.environments.tools import ToolWorld, ToolWorldConfig
from normkit.rl.imitation import imitate
from normkit.rl.models import load_policy

TOOLS = ("calculator", "convert", "lookup")


class Freight(ToolWorld):
    """How many pounds do 44 pieces of the clay bench weigh? Look up, multiply, convert, answer."""

    def __init__(self) -> None:
        super().__init__(ToolWorldConfig(max_turns=5))
        self.box.tools = {name: self.box.tools[name] for name in TOOLS}

    def tasks(self, split: Split) -> list[str]:
        """Names of the questions of a split (all are for training)."""
        return [task for task in super().tasks(split) if task.startswith("freight")]


def warm_up(
    world: ToolWorld, folder: Path, updates: int, lessons: int, learning_rate: float
) -> None:
    """Show the model solved questions, and save it."""
    model, tokenizer = load_policy("smollm2")
    # SmolLM2's own template writes no tools. Qwen's does, in the form SmolLM2 was trained with, and
    # TRL knows how to read its calls; for a template that it does not know, set
    # tokenizer.response_template.
    tokenizer.chat_template = qwen2_5_chat_template
    imitate(
        model,
        reference_dialogues(world, world.tasks("train"), tokenizer),
        updates,
        batch=lessons,
        learning_rate=learning_rate,
        report=lambda update, loss: print(f"update {update}: {loss:.3f} nats a token", flush=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(
    folder: Path,
    updates: int = 10,
    lessons: int = 4,
    warm_rate: float = 1e-4,
    steps: int = 4,
    group_size: int = 4,
    learning_rate: float = 1e-5,
) -> None:
    """Warm SmolLM2 up, and train it.

    Args:
        folder: for the warm model and the trained one.
        updates: of the warm-up.
        lessons: solved questions of an update.
        warm_rate: its learning rate.
        steps: of TRL, one group each.
        group_size: dialogues of a group.
        learning_rate: of TRL.
    """
    world = Freight()
    if not (folder / "warm" / "config.json").exists():
        warm_up(world, folder / "warm", updates, lessons, warm_rate)
    model, tokenizer = load_policy(str(folder / "warm"))
    args = GRPOConfig(
        output_dir=str(folder / "trained"),
        per_device_train_batch_size=group_size,
        num_generations=group_size,
        max_completion_length=400,  # of a whole dialogue, results of tools included
        max_tool_calling_iterations=world.max_turns - 1,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        loss_type="dapo",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = TurnAdvantageTrainer(
        model, args=args, estimator="matchtir", processing_class=tokenizer, **tool_calling(world)
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    tyro.cli(main)
