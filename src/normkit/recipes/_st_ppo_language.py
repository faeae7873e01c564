"""A chat model that learns to search: ``normkit run st-ppo --world language``.

SmolLM2-135M never writes a readable search of its own accord, so that no reward would ever tell its
dialogues apart. It is first shown reference dialogues of training questions (``warm_start`` updates
of supervised learning); what is measured of the methods begins after that.

Fields of ``recipes.st_ppo.Config`` that this file reads, with their defaults:

    model: str = "smollm2"            any chat model of transformers
    method: str = "st-ppo"            ppo, turn-ppo, s-ppo, st-ppo, grpo or so-grpo (rl.presets)
    corpus: str = "land"              what is searched: "land", "wordnet" or a file of passages
    questions: Path | None = None     questions about a file; the last third is held out
    hops: tuple[int, ...] = (1, 2)    questions of so many hops; empty for all
    reward: Literal["em", "f1"] = "em"   what an answer earns
    bonus: float = 0.0                for finding all needed passages, in sum
    warm_start: int = 40              updates of supervised learning first; 0 for none
    steps: int = 12                   rollout-and-update rounds
    groups: int = 4                   questions per step
    group_size: int = 4               dialogues per question
    mini_batches: int = 4             updates that a batch of dialogues is split into
    epochs: int = 1                   passes over a batch
    max_turns: int = 4                a dialogue ends here
    max_new_tokens: int = 40          length limit of a reply
    learning_rate: float = 1e-5       of AdamW
    lora_rank: int = 0                rank of LoRA adapters; 0 trains all weights
    heldout: int = 40                 held-out questions to score before and after
    seed: int = 0                     of everything
"""
