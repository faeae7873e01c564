"""Rollouts: what was sampled, with which probability, from which row of tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from normkit.errors import InputError, NormkitError
from normkit.rl.dialogue import Dialogue, pack, turn_table
from normkit.rl.environment import Reply, Step
from normkit.rl.inference import RaggedDecoder, ReencodingDecoder
from normkit.rl.rollout import Rollout, RolloutConfig, turn_uniforms
from tests.rl.talk import LateWorld, ScriptedWorld, check_dialogue, plain_logprobs, said, tasks
from tests.rl.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": len(TOKENIZER),
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": END,
}
ROTARY = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def build(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    # Replies end now and then: here and there the end token is likelier than all others together.
    with torch.no_grad():
        model.get_output_embeddings().weight[END].normal_(std=1.0)
    return model


@pytest.fixture(scope="module")
def model():
    return build(tiny_model(TOKENIZER).config)


def play(model, count=6, world=None, tokenizer=TOKENIZER, chosen=None, **config):
    settings = {"max_new_tokens": 10, "dtype": "float32", **config}
    rollout = Rollout(model, tokenizer, RolloutConfig(**settings))
    return rollout.run(world or ScriptedWorld(3), chosen or tasks(count))


ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**ROTARY, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**ROTARY, use_sliding_window=False),
    "qwen3": transformers.Qwen3Config(**ROTARY, head_dim=16),
    "sliding": transformers.MistralConfig(**ROTARY, sliding_window=24),
    "mixed": transformers.Qwen2Config(
        **ROTARY, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "gpt2": transformers.GPT2Config(**SIZES),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "phi": transformers.PhiConfig(**ROTARY),
    "mixtral": transformers.MixtralConfig(**ROTARY, num_local_experts=4),
}
OTHERS = {
    "softcap": transformers.Gemma2Config(**ROTARY, head_dim=8, attn_logit_softcapping=0.05),
    "alibi": transformers.BloomConfig(
        **{k: v for k, v in SIZES.items() if "heads" not in k and "layers" not in k},
        n_head=4,
        n_layer=2,
    ),
    "recurrent": transformers.MambaConfig(
        **{k: v for k, v in SIZES.items() if "heads" not in k}, state_size=4
    ),
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_logprobs_are_those_of_one_full_forward_pass(name):
    model = build({**ARCHITECTURES, **OTHERS}[name])
    rollout = Rollout(model, TOKENIZER, RolloutConfig(max_new_tokens=10, dtype="float32"))
    kind = RaggedDecoder if name in ARCHITECTURES else ReencodingDecoder
    assert isinstance(rollout._decoder, kind)
    dialogues = rollout.run(ScriptedWorld(3, turns=lambda seed: 1 + seed % 3), tasks(6))
    for dialogue in dialogues:
        check_dialogue(dialogue, model)
    lengths = {len(turn.token_ids) for dialogue in dialogues for turn in dialogue.turns}
    assert len(lengths) > 2
    assert [len(dialogue.turns) for dialogue in dialogues] == [1, 2, 3, 1, 2, 3]


def test_rows_are_what_the_template_writes(model):
    rollout = Rollout(model, TOKENIZER, RolloutConfig(max_new_tokens=10, dtype="float32"))
    for dialogue in rollout.run(ScriptedWorld(4), tasks(4)):
        row, known = dialogue.segments[0].token_ids, 0
        turns = dialogue.turns
        form = rollout.format
        for i, (turn, (number, start, stop)) in enumerate(
            zip(turns, dialogue.segments[0].spans, strict=True)
        ):
            assert number == i
            if i == 0:
                assert row[:start] == form.opening("Be kind.", turn.message)
            else:
                closed = turns[i - 1].token_ids[-1] == END
                assert row[known:start] == form.following(turn.message, closed)
            assert turn.reply == form.decode(turn.token_ids)
            known = stop


def test_a_dialogue_does_not_depend_on_its_batch(model):
    world = {"turns": lambda seed: 2 + seed % 3, "max_turns": 4}
    chosen = tasks(7, group_size=3)
    together = play(model, world=ScriptedWorld(**world), chosen=chosen)
    for options in ({"batch_size": 2}, {"batch_size": 5}, {"max_tokens": 40}, {"max_tokens": 1}):
        again = play(model, world=ScriptedWorld(**world), chosen=chosen, **options)
        assert said(again) == said(together)
        assert [d.index for d in again] == list(range(7))
    for task, dialogue in zip(chosen, together, strict=True):
        alone = play(model, world=ScriptedWorld(**world), chosen=[task])
        assert said(alone) == said([dialogue])
        assert np.allclose(
            [p for t in alone[0].turns for p in t.logprobs],
            [p for t in dialogue.turns for p in t.logprobs],
            atol=1e-5,
        )


def test_dialogues_of_one_turn_and_of_twelve_go_together(model):
    world = ScriptedWorld(12, turns=lambda seed: 12 if seed == 3 else 1)
    dialogues = play(model, count=5, world=world, max_new_tokens=6)
    assert [len(d.turns) for d in dialogues] == [1, 1, 1, 12, 1]
    assert [d.scores for d in dialogues] == [{"score": float(n)} for n in (1, 1, 1, 12, 1)]
    assert {d.end_reason for d in dialogues} == {"done"}
    for dialogue in dialogues:
        check_dialogue(dialogue, model)
        assert [turn.reward for turn in dialogue.turns] == [
            1.0 + i for i in range(len(dialogue.turns))
        ]


def test_no_token_is_encoded_twice_and_equal_openings_once(model):
    rollout = Rollout(model, TOKENIZER, RolloutConfig(max_new_tokens=8, dtype="float32"))
    encoded = []
    rollout._copy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: encoded.append(args[0].numel())
    )
    world = ScriptedWorld(4, say=lambda task, seed, turn: f"{task} {turn}")
    dialogues = rollout.run(world, tasks(6, group_size=3))
    rows = [d.segments[0].token_ids for d in dialogues]
    opening = dialogues[0].segments[0].spans[0][1]
    # The last token of a dialogue is never an input; four of six openings are copies.
    assert sum(encoded) == sum(len(row) - 1 for row in rows) - 4 * opening


def test_context_overflow_begins_a_new_segment_with_the_latest_turns(model):
    world = ScriptedWorld(12, say=lambda task, seed, turn: f"{turn} " + "word " * (seed % 3 + 2))
    dialogues = play(model, count=4, world=world, max_context=160, max_new_tokens=12)
    for dialogue in dialogues:
        check_dialogue(dialogue, model)
        assert len(dialogue.turns) == 12
        assert len(dialogue.segments) > 1
        for segment in dialogue.segments:
            assert len(segment.token_ids) <= 160
            text = TOKENIZER.decode(segment.token_ids)
            assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
        for segment in dialogue.segments[1:]:
            turn, start, _ = segment.spans[0]
            assert f"user\n{turn} word" in TOKENIZER.decode(segment.token_ids[:start])
            older = TOKENIZER.decode(segment.token_ids[:start]).count("<|im_start|>user")
            # One more turn would have filled more than half.
            assert older == 1 or start <= 80
            dropped = turn - older
            assert f"user\n{dropped} word" not in TOKENIZER.decode(segment.token_ids)


def test_overflow_rule_keeps_as_many_turns_as_fit_into_half(model):
    config = RolloutConfig(max_new_tokens=5, max_context=200, dtype="float32")
    rollout = Rollout(model, TOKENIZER, config)
    world = ScriptedWorld(12, say=lambda task, seed, turn: f"message {turn}")
    for dialogue in rollout.run(world, tasks(3)):
        for segment in dialogue.segments[1:]:
            turn, start, _ = segment.spans[0]
            kept = TOKENIZER.decode(segment.token_ids[:start]).count("<|im_start|>user") - 1

            def row_from(first, turn=turn, turns=dialogue.turns):
                row = rollout.format.opening("Be kind.", f"message {first}")
                for i in range(first, turn):
                    ids = turns[i].token_ids
                    following = rollout.format.following(f"message {i + 1}", ids[-1] == END)
                    row = row + ids + following
                return row

            assert segment.token_ids[:start] == row_from(turn - kept)
            assert start <= 100 < len(row_from(turn - kept - 1))


def test_messages_that_leave_no_room(model):
    def long_later(task, seed, turn):
        return "x" * 300 if turn == 2 else "hi"

    dialogues = play(model, count=2, world=ScriptedWorld(5, say=long_later), max_context=200)
    assert {d.end_reason for d in dialogues} == {"context"}
    assert [len(d.turns) for d in dialogues] == [2, 2]
    assert [d.scores for d in dialogues] == [{"score": 2.0}] * 2
    with pytest.raises(InputError, match=r"opening of 'task0' has \d+ tokens.*max_context 200"):
        play(model, count=1, world=ScriptedWorld(5, say=lambda *_: "y" * 300), max_context=200)


def test_greedy_takes_the_likeliest_token(model):
    dialogues = play(model, count=4, greedy=True, temperature=0.7)
    for dialogue in dialogues:
        check_dialogue(dialogue, model, temperature=0.7)
        for _, start, stop in dialogue.segments[0].spans:
            for at in range(start, stop):
                with torch.no_grad():
                    row = torch.tensor([dialogue.segments[0].token_ids[:at]])
                    logits = model(row).logits[0, -1]
                assert int(logits.argmax()) == dialogue.segments[0].token_ids[at]
    other_seeds = [(task, group, seed + 100) for task, group, seed in tasks(4)]
    world = ScriptedWorld(3, say=lambda task, seed, turn: task)
    same = ScriptedWorld(3, say=lambda task, seed, turn: task)
    assert said(play(model, world=world, greedy=True, chosen=other_seeds)) == said(
        play(model, count=4, world=same, greedy=True)
    )


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature_is_part_of_the_logprobs(model, temperature):
    for dialogue in play(model, temperature=temperature):
        check_dialogue(dialogue, model, temperature=temperature)


def test_top_p_narrows_the_choice_and_leaves_the_logprobs(model):
    narrow = play(model, count=6, top_p=0.4, max_new_tokens=12)
    for dialogue in narrow:
        check_dialogue(dialogue, model)
        for _, start, stop in dialogue.segments[0].spans:
            with torch.no_grad():
                row = torch.tensor([dialogue.segments[0].token_ids])
                probabilities = torch.softmax(model(row).logits[0], -1)
            for at in range(start, stop):
                p = probabilities[at - 1]
                likelier = p[p > p[row[0, at]] + 1e-6].sum()
                assert float(likelier) < 0.4 + 1e-5
    assert said(narrow) != said(play(model, count=6, max_new_tokens=12))


def test_empty_replies_and_length_limits(model):
    only_end = copy.deepcopy(model)
    with torch.no_grad():
        only_end.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        only_end.lm_head.weight[END] = 0.0
    never = play(only_end, count=2, max_new_tokens=3, top_p=1.0)
    for dialogue in never:
        for turn in dialogue.turns:
            assert turn.truncated == (turn.token_ids[-1] != END)
            assert len(turn.token_ids) <= 3

    class Always(torch.nn.Module):
        """A head that knows one token."""

        def forward(self, x):
            logits = x.new_zeros(*x.shape[:-1], len(TOKENIZER))
            logits[..., END] = 50.0
            return logits

    only_end.lm_head = Always()
    world = ScriptedWorld(3)
    for dialogue in play(only_end, count=3, world=world):
        assert [turn.token_ids for turn in dialogue.turns] == [[END]] * 3
        assert [turn.reply for turn in dialogue.turns] == [""] * 3
        assert not any(turn.truncated for turn in dialogue.turns)
        assert [turn.logprobs for turn in dialogue.turns] == [[pytest.approx(0.0, abs=1e-6)]] * 3
        assert len(dialogue.segments) == 1
    assert world.sessions[0].replies == [Reply("", False, 1)] * 3


def test_truncated_replies_are_closed_in_the_row(model):
    dialogues = play(model, max_new_tokens=2, count=8)
    cut = [
        (dialogue, turn) for dialogue in dialogues for turn in dialogue.turns[:-1] if turn.truncated
    ]
    assert cut
    for dialogue, turn in cut:
        assert len(turn.token_ids) == 2
        assert END not in turn.token_ids
        at = dialogue.turns.index(turn)
        stop = dialogue.segments[0].spans[at][2]
        assert dialogue.segments[0].token_ids[stop] == END


def test_min_new_tokens_keeps_replies_going_and_leaves_the_logprobs(model):
    dialogues = play(model, min_new_tokens=10, max_new_tokens=10)
    assert {len(t.token_ids) for d in dialogues for t in d.turns} == {10}
    assert all(END not in t.token_ids for d in dialogues for t in d.turns)
    for dialogue in dialogues:
        check_dialogue(dialogue, model)


def test_the_uniforms_of_a_turn_are_a_function_of_seed_and_turn():
    assert np.array_equal(turn_uniforms(5, 2, 4), turn_uniforms(5, 2, 9)[:4])
    many = np.concatenate([turn_uniforms(s, t, 50) for s in range(20) for t in range(20)])
    assert len(np.unique(many)) == many.size
    assert ((many >= 0) & (many < 1)).all()
    assert abs(many.mean() - 0.5) < 5 / math.sqrt(12 * many.size)


def test_tokens_are_where_the_uniforms_fall_in_the_models_distribution(model):
    for dialogue in play(model, count=4, temperature=1.3):
        row = dialogue.segments[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].double() / 1.3
        cumulative = torch.softmax(logits, -1).cumsum(-1)
        for turn, start, stop in dialogue.segments[0].spans:
            uniforms = turn_uniforms(dialogue.seed, turn, 10)
            for at, uniform in zip(range(start, stop), uniforms, strict=False):
                running, token = cumulative[at - 1], row[at]
                below = running[token - 1] if token else 0.0
                assert below - 1e-5 <= uniform <= running[token] + 1e-5


def test_equal_seeds_draw_equal_replies_and_others_do_not(model):
    world = ScriptedWorld(2, say=lambda task, seed, turn: "hello")
    dialogues = play(model, world=world, chosen=[("a", 0, 7), ("a", 0, 7), ("a", 0, 8)])
    first, twin, other = said(dialogues)
    assert first == twin
    assert first != other


def test_sync_takes_over_new_weights(model):
    trained = copy.deepcopy(model)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.3)):
        rollout = Rollout(trained, TOKENIZER, RolloutConfig(max_new_tokens=8, dtype=dtype))
        rollout.run(ScriptedWorld(2), tasks(2))
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        rollout.sync(trained)
        for dialogue in rollout.run(ScriptedWorld(2), tasks(4)):
            check_dialogue(dialogue, trained, tolerance=tolerance)
        assert (
            trained.config._attn_implementation != rollout._copy.model.config._attn_implementation
        )
        assert all(p.requires_grad for p in trained.parameters())


def test_the_model_in_training_is_left_alone(model):
    trained = copy.deepcopy(model).train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    play(trained)
    assert trained.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    loss = trained(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_a_world_that_fails_leaves_a_rollout_that_works(model):
    class Failing(ScriptedWorld):
        def step(self, sessions, replies):
            if len(self.sessions[0].replies) == 1:
                raise NormkitError("the judge is down")
            return super().step(sessions, replies)

    rollout = Rollout(model, TOKENIZER, RolloutConfig(max_new_tokens=6, dtype="float32"))
    with pytest.raises(NormkitError, match="judge is down"):
        rollout.run(Failing(3), tasks(4))
    assert said(rollout.run(ScriptedWorld(3), tasks(4))) == said(
        play(model, count=4, max_new_tokens=6)
    )


def test_progress_counts_turns_up_to_all_of_them(model):
    seen = []
    rollout = Rollout(model, TOKENIZER, RolloutConfig(max_new_tokens=3, batch_size=2))
    rollout.run(
        ScriptedWorld(4, turns=lambda seed: 1 + seed),
        tasks(3),
        progress=lambda done, most: seen.append((done, most)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (6, 6)
    assert all(done <= most <= 12 for done, most in seen)


def test_a_world_may_pay_earlier_turns_anew(model):
    rollout = Rollout(model, TOKENIZER, RolloutConfig(max_new_tokens=4, dtype="float32"))
    dialogues = rollout.run(LateWorld(4, turns=lambda seed: 1 + seed % 3), tasks(3))
    paid = [[turn.reward for turn in dialogue.turns] for dialogue in dialogues]
    assert paid == [[10], [20, 21], [30, 31, 32]]


def test_another_config_replies_from_the_same_copy(model):
    sampled = RolloutConfig(max_new_tokens=10, dtype="float32")
    rollout = Rollout(model, TOKENIZER, sampled)
    greedy = rollout.with_config(replace(sampled, greedy=True, max_new_tokens=5))
    told = said(greedy.run(ScriptedWorld(2), tasks(3)))
    assert told == said(play(model, 3, ScriptedWorld(2), greedy=True, max_new_tokens=5))
    assert rollout.config == sampled
    assert said(rollout.run(ScriptedWorld(2), tasks(3))) == said(play(model, 3, ScriptedWorld(2)))
    for name, value in {"dtype": "bfloat16", "max_tokens": 9, "max_context": 64}.items():
        with pytest.raises(InputError, match=f"{name} must stay"):
            rollout.with_config(replace(sampled, **{name: value}))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "must answer with a Step, got NoneType"),
        (Step(None, "on"), "reward must be a number, got None"),
        (Step(torch.tensor(1.0), "on"), "reward must be a number, got tensor"),
        (Step(1.0, 3), "message must be text or None, got 3"),
        (Step(1.0, "on"), "must end .* after max_turns = 2 turns"),
    ],
)
def test_a_world_that_breaks_its_contract_is_named(model, answer, words):
    class Broken(ScriptedWorld):
        def step(self, sessions, replies):
            return [answer for _ in sessions]

    with pytest.raises(InputError, match=words):
        play(model, count=2, world=Broken(max_turns=2))


def test_a_world_answers_every_reply_and_has_a_score(model):
    class Silent(ScriptedWorld):
        def step(self, sessions, replies):
            return super().step(sessions, replies)[1:]

    class Scoreless(ScriptedWorld):
        def score(self, session):
            return {"points": 1.0}

    with pytest.raises(InputError, match="each of 2 replies, got 1 answers"):
        play(model, count=2, world=Silent())
    with pytest.raises(InputError, match=r"key .score."):
        play(model, count=2, world=Scoreless())


def test_no_tasks_no_dialogues(model):
    assert Rollout(model, TOKENIZER, RolloutConfig()).run(ScriptedWorld(2), []) == []


def test_diverged_weights_are_an_error_that_says_so(model):
    broken = copy.deepcopy(model)
    rollout = Rollout(broken, TOKENIZER, RolloutConfig(dtype="float32"))
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NormkitError, match=r"not finite.*diverged"):
        rollout.run(ScriptedWorld(2), tasks(2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 65),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("batch_size", 0),
        ("max_context", 100),
        ("max_tokens", 0),
    ],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(InputError, match=field):
        RolloutConfig(**{field: value})


def test_bad_context_dtype_and_seed_are_named(model):
    with pytest.raises(InputError, match="max_context must be at most 1024"):
        Rollout(model, TOKENIZER, RolloutConfig(max_context=2000))
    with pytest.raises(InputError, match="dtype"):
        Rollout(model, TOKENIZER, RolloutConfig(dtype="float8"))
    with pytest.raises(InputError, match="seed"):
        play(model, chosen=[("a", 0, -1)])


def test_sampled_frequencies_follow_the_model(model):
    world = ScriptedWorld(1, say=lambda task, seed, turn: "hello")
    chosen = [("a", 0, seed) for seed in range(600)]
    dialogues = play(model, world=world, chosen=chosen, max_new_tokens=1, batch_size=200)
    row = dialogues[0].segments[0].token_ids[:-1]
    logprob = plain_logprobs(model, [*row, END])[-1]
    p = math.exp(float(logprob))
    ended = sum(d.turns[0].token_ids == [END] for d in dialogues)
    assert abs(ended / 600 - p) < 4 * math.sqrt(p * (1 - p) / 600) + 1e-3


def test_the_world_is_asked_outside_of_inference_mode(model):
    class Learning(ScriptedWorld):
        def step(self, sessions, replies):
            weight = torch.ones(1, requires_grad=True)
            (weight * 2).backward()
            assert weight.grad.item() == 2
            return super().step(sessions, replies)

    assert len(play(model, count=2, world=Learning(2))) == 2


class Baton:
    """One seat's sight of a game in which the seats speak one after another."""

    system = "Pass it on."
    message = ""

    def __init__(self, task, seat, game):
        self.task, self.seat, self.game, self.replies = task, seat, game, []


class Relay:
    """A game of ``length(seed)`` replies; reply number k earns its seat 1 and all seats 10 ** k."""

    def __init__(self, seats=2, length=lambda seed: 5):
        self.seats, self.length, self.max_turns = seats, length, 9
        self.polled, self.together = 0, []

    def start_seats(self, task, seed):
        game = {"seed": seed, "log": [], "earned": [0.0] * self.seats, "over": False}
        return [Baton(task, seat, game) for seat in range(self.seats)]

    def seat(self, session):
        return session.seat

    def act(self, sessions, replies):
        self.together.append(len(sessions))
        for session, reply in zip(sessions, replies, strict=True):
            game = session.game
            assert not game["over"]
            assert len(game["log"]) % self.seats == session.seat
            session.replies.append(reply)
            earned = game["earned"]
            earned[session.seat] = 1.0
            for seat in range(self.seats):
                earned[seat] += 10.0 ** len(game["log"])
            if reply == Reply("", truncated=True):
                earned[session.seat], game["over"] = -5.0, True
            game["log"].append(f"{session.seat} said {len(reply.text)}")
            game["over"] |= len(game["log"]) >= self.length(game["seed"])

    def poll(self, sessions):
        self.polled += 1
        return [self._told(session, session.game) for session in sessions]

    def _told(self, session, game):
        if game["over"]:
            return Step(game["earned"][session.seat], None, "over", {"moves": len(game["log"])})
        if len(game["log"]) % self.seats != session.seat:
            return None
        return Step(game["earned"][session.seat], f"{session.seat}: {game['log'][-1:]}")

    def start(self, task, seed):
        raise InputError("opponent: one session for every seat")

    step = start

    def tasks(self, split):
        return ["relay"]

    def score(self, session):
        return {"score": float(len(session.replies))}


def test_seats_of_a_game_have_a_dialogue_each_and_rewards_wait_for_the_others(model):
    world = Relay(seats=2, length=lambda seed: 5)
    dialogues = play(model, world=world, chosen=[("a", 0, 3), ("b", 1, 4)])
    assert [(d.task, d.group, d.index, d.seed, d.agent) for d in dialogues] == [
        ("a", 0, 0, 3, 0),
        ("a", 0, 1, 3, 1),
        ("b", 1, 2, 4, 0),
        ("b", 1, 3, 4, 1),
    ]
    for first, second in (dialogues[:2], dialogues[2:]):
        check_dialogue(first, model)
        check_dialogue(second, model)
        # Reply k pays 10 ** k to both; the first seat's 1 of before the second's turn is dropped.
        assert [t.reward for t in first.turns] == [1 + 1 + 10, 1 + 100 + 1000, 1 + 10_000]
        assert [t.reward for t in second.turns] == [1 + 10 + 100, 1 + 1000 + 10_000]
        assert first.turns[-1].info == second.turns[-1].info == {"moves": 5}
        assert {first.end_reason, second.end_reason} == {"over"}
        assert (first.scores, second.scores) == ({"score": 3.0}, {"score": 2.0})
    # Both games moved side by side, and a seat that waits holds nobody up.
    assert world.together == [2] * 5
    assert said(dialogues)[0] != said(dialogues)[1]


@pytest.mark.parametrize("seats", [1, 2, 3])
def test_games_do_not_depend_on_their_batch(model, seats):
    def lengths(seed):
        return 1 + seed % 6

    def world():
        return Relay(seats, lengths)

    chosen = tasks(6)
    together = play(model, world=world(), chosen=chosen)
    assert len(together) == 6 * seats
    for size in (1, 3, 4):
        assert said(play(model, world=world(), chosen=chosen, batch_size=size)) == said(together)
    for i, task in enumerate(chosen):
        alone = play(model, world=world(), chosen=[task])
        assert said(alone) == said(together[i * seats : (i + 1) * seats])


def test_a_seat_without_a_turn_has_an_empty_dialogue_that_trains_nothing(model):
    dialogues = play(model, world=Relay(3, lambda seed: 1), chosen=tasks(2))
    assert [len(d.turns) for d in dialogues] == [1, 0, 0] * 2
    assert [d.segments == [] for d in dialogues] == [False, True, True] * 2
    assert {d.end_reason for d in dialogues} == {"over"}
    table, rows = turn_table(dialogues), pack(dialogues)
    assert table.reward.tolist() == [2.0, 2.0]
    assert (table.dialogue.tolist(), table.agent.tolist()) == ([0, 3], [0, 0])
    assert [int(row.turn_row.max()) for row in rows] == [0, 1]
    assert Dialogue.from_json(dialogues[1].to_json()) == dialogues[1]


def test_a_game_that_is_over_before_it_began_has_no_turns(model):
    class Over(Relay):
        def start_seats(self, task, seed):
            sessions = super().start_seats(task, seed)
            sessions[0].game["over"] = seed % 2 == 0
            return sessions

    dialogues = play(model, world=Over(), chosen=tasks(4), batch_size=2)
    assert [len(d.turns) for d in dialogues] == [0, 0, 3, 2] * 2
    assert play(model, world=Over(), chosen=[("a", 0, 0)])[1].end_reason == "over"


def test_a_seat_whose_context_is_full_is_given_up(model):
    class Wordy(Relay):
        def _told(self, session, game):
            step = super()._told(session, game)
            if step is not None and step.message and len(game["log"]) == 3:
                return replace(step, message="x" * 300)
            return step

    dialogues = play(model, world=Wordy(), chosen=[("a", 0, 3)], max_context=200)
    other, given_up = dialogues
    assert (other.end_reason, given_up.end_reason) == ("over", "context")
    # The last turn keeps what it had (replies 1 and 2) and bears what giving up costs.
    assert [t.reward for t in given_up.turns] == [1 + 10 + 100 - 5]
    assert given_up.scores == {"score": 2.0}
    assert [t.reward for t in other.turns] == [1 + 1 + 10, 1 + 100 + 1000]


def test_a_world_in_which_everyone_waits_is_an_error(model):
    class Stuck(Relay):
        def poll(self, sessions):
            return [None] * len(sessions)

    with pytest.raises(NormkitError, match="wait for one another"):
        play(model, world=Stuck(), chosen=tasks(2))


def test_seats_draw_numbers_of_their_own():
    assert np.array_equal(turn_uniforms(5, 2, 4, 0), turn_uniforms(5, 2, 4))
    many = np.concatenate(
        [turn_uniforms(s, t, 20, a) for s in range(9) for t in range(9) for a in range(3)]
    )
    assert len(np.unique(many)) == many.size
