"""EMPA-format files with invented content, worked out here without normkit's model."""

from __future__ import annotations

import json
import math

FORM = {"C.1": 1, "C.2": 1, "C.3": 1, "A.1": 1, "A.2": 1, "A.3": 1, "P.1": 1, "P.2": 1, "P.3": 1}
"""A small deficit: P_0 = (-7, -9, -9)."""
_UNITS = {"C": (2, 2, 3), "A": (2, 4, 3), "P": (2, 4, 3)}
_PROGRESS = {0: 0, 1: 1, 2: 3}
_SETBACK = {"C": {0: 0, -1: -2, -2: -4}, "A": {0: 0, -1: -2, -2: -5}, "P": {0: 0, -1: -2, -2: -5}}

GOOD, FLAT, BAD = (1, 0, 1, 0, 1, 0), (0, 0, 0, 0, 0, 0), (0, -1, 0, -1, 0, -1)
"""Levels of a turn: progress and setback of C, of A, of P."""


def result(turns, reason, form=FORM, script_id="script_900", every=1, **changes):
    """A result file in the published layout, its numbers rounded as there.

    ``turns`` has the levels of each judged turn, None for a failed judgement.
    """
    start = [-sum(form[f"{a}.{i + 1}"] * u for i, u in enumerate(_UNITS[a])) for a in "CAP"]
    size = math.hypot(*start)
    best = [round(-x / size, 4) for x in start]
    state, energy = start, 0.0
    points = [_point(0, start, [0, 0, 0]) | {"epm": {"P_norm": round(size, 2), "E_total": 0.0}}]
    for number, levels in enumerate(turns, start=1):
        c_up, c_down, a_up, a_down, p_up, p_down = levels or FLAT
        pairs = {"C": (c_up, c_down), "A": (a_up, a_down), "P": (p_up, p_down)}
        v = [_PROGRESS[up] + _SETBACK[axis][down] for axis, (up, down) in pairs.items()]
        state = [x + y for x, y in zip(state, v, strict=True)]
        work = sum(x * y for x, y in zip(v, best, strict=True))
        energy += work
        point = _point(number * every, state, v)
        point["epm"] = {
            "P_norm": round(math.hypot(*state), 2),
            "projection": round(sum(x * y for x, y in zip(state, best, strict=True)), 2),
            "delta_E": round(work, 2),
            "E_total": round(energy, 2),
            "alignment": round(work / math.hypot(*v), 4) if any(v) else 0.0,
        }
        if levels:
            point["mdep_analysis"] = {
                f"{axis}_{part}_{kind}": value
                for axis, (up, down) in pairs.items()
                for part, level in (("Prog", up), ("Neg", down))
                for kind, value in (("level", level), ("evidence", f"{axis} {part}"))
            }
        points.append(point)
    said = [(role, f"{role} {i}") for i in range(len(turns) * every) for role in ROLES]
    data = {
        "total_turns": len(turns) * every,
        "termination_reason": reason,
        "script_id": script_id,
        "history": [{"role": role, "content": content} for role, content in said],
        "test_model_name": "some/model",
        "epj": {
            "P_0_initial_deficit": start,
            "P_final_position": state,
            "trajectory": points,
            "K": every,
            "epsilon": 1.0,
            "iedr_details": {"filled_iedr": dict(form)},
            "epm_params": {"alpha": 0.1, "E_total_final": energy},
        },
        "status": "success",
    }
    return data | changes


ROLES = ("actor", "test_model")


def _point(turn, state, v):
    distance = math.hypot(*(max(0, -1 - x) for x in state))
    return {"turn": turn, "P_t": list(state), "v_t": v, "distance": distance}


def write(folder, data, name="script_900_result.json"):
    """Write a JSON file; a text is written as it is."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


SHEET = """\
<character_info>
# 角色信息
  - 姓名：小禾
  - 性别：女
  - 年龄：31岁
# 角色特征
  - 社交性格：爱说笑
  - 内核性格：谨慎
</character_info>
<empathy_threshold>
# 角色基础共情阈值
共情阈值【高】，要求多。
</empathy_threshold>
<psychological_profile>
# 聊天话题
    我的自行车
    又坏了。

# 共情需求
想要找人倾诉的想法与内容：她修了三次车。
倾诉中想要获得的共情点：想有人听。想有人懂！
人物共情阈值：怕被催。
当下共情需求优先级：
PRIORITIES
</psychological_profile>
<experience>
# 角色过往经历
童年经历：骑车上学。
# 角色现状
现在的情况（工作、生活）：在书店上班。
现在的人生主线目标：攒钱。
</experience>
<scenario># 角色故事
    故事的起因：链条断在路上。
</scenario>"""

PRIORITIES = """\
    情感共情：[优先级：高] 想有人陪她生气。也想有人笑。
    动机共情：低优先级 + 不想被催着买新车。
    认知共情：【中】想有人懂她为什么不换车。"""


def sheet(priorities=PRIORITIES):
    return SHEET.replace("PRIORITIES", priorities)


def story(script_id="script_900"):
    phases = {f"阶段{i}": {"标题": "题", "内容": f"第{i}段。"} for i in range(1, 5)}
    return {
        "剧本编号": script_id,
        "故事的经过": phases,
        "故事的结果": "完。",
        "故事的插曲": "远行。",
    }


def metadata(*script_ids, category="休闲娱乐"):
    return {"sampled_cases": [{"script_id": name, "category": category} for name in script_ids]}
