"""EMPA's benchmark cases, in a user's own copy, as scenarios of the emotional-support world.

A case is a character sheet in Chinese (``script_*.md``), a story in phases
(``character_stories.json``) and a filled initial-deficit form, which stands in the precomputed
forms (``iedr_batch_results.json``) or in any result file of the case. Nothing of EMPA (arXiv
2603.00552, CC BY-NC 4.0) is part of normkit; the Chinese words here are the labels that its files
are read by.

An EMPA user has no canned lines: ``lines``, ``hurt`` and ``relief`` of the scenarios are empty, and
a chat model must speak for the person, from persona and situation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from normkit.errors import InputError
from normkit.rl.environment import Split
from normkit.rl.environments.empa_results import read_levels
from normkit.rl.environments.scenario import Persona, Scenario
from normkit.rl.json_fields import Field, read_json, read_text
from normkit.rl.rubric import AXES, Axis

_CATEGORIES = {
    "生活状况": "living",
    "身心健康": "health",
    "休闲娱乐": "leisure",
    "观念认同": "beliefs",
    "人际关系": "relationships",
    "生涯发展": "career",
}
_THRESHOLDS = {"低": "low", "中": "medium", "高": "high"}
_AXES: Mapping[str, Axis] = {"认知": "cognitive", "情感": "affective", "动机": "proactive"}
_LABELS = (
    "姓名",
    "年龄",
    "社交性格",
    "内核性格",
    "想要找人倾诉的想法与内容",
    "倾诉中想要获得的共情点",
    "人物共情阈值",
    "当下共情需求优先级",
    "现在的情况",
    "现在的人生主线目标",
    "故事的起因",
    # Not used, but they end what stands before them.
    "性别",
    "童年经历",
    "少年经历",
    "青年经历",
    "隐形成长主线脉络",
    "现在的人生愿景与动力",
)
_ONE_LINE = ("姓名", "年龄")
"""Said once; what stands below, or under the same label later, is an example of a dialogue."""
_LABEL = re.compile(rf"\s*(?:[-*]\s*)?({'|'.join(_LABELS)})(?:[（(][^）)]*[）)])?\s*[:：](.*)")
_HEADING = re.compile(r"\s*#+\s*(.*?)\s*")
_TAG = re.compile(r"</?[a-z_]+>")
_AXIS = re.compile(rf"(?:^|[\n>＞；;])[\s\-*]*(?:\d+[.、．]\s*)?({'|'.join(_AXES)})共-?情")
_PRIORITY = re.compile(
    r"[\s：:（(\[【]*(?:优先级)?[\s：:【\[]*(最高|最优先|高|其次|中|最低|低)等?\s*(?:优先级)?[\s，,+＋\]】]*"
)
_PRIORITIES = {"最高": 3, "最优先": 3, "高": 3, "其次": 2, "中": 2, "最低": 1, "低": 1}
_TYPICAL = {"C.1": 3, "C.2": 3, "A.1": 2, "A.2": 2, "P.1": 1, "P.2": 3}
"""Rounded means over the forms of the official cases."""


def load_empa(path: str | Path, split: Split = "train") -> list[Scenario]:
    """Read EMPA's cases as scenarios: the official ones are held out, the others are for training.

    A case without a filled initial-deficit form gets an estimate: the priorities that its sheet
    states as the indicators of priority, and typical levels for the other indicators. (On the
    official cases the estimate is off by 2 points an axis and 3 of 32 in ``|P_0|``, on average.)

    Args:
        path: a folder that holds the known files anywhere below it: EMPA's repository, its
            ``empa/data``, or a part of either.
        split: "train" or "heldout".

    Returns:
        The scenarios, ordered by case. A case that no metadata names has the category "unknown".

    Raises:
        InputError: names the file and the line or field that is missing or malformed, or the
            folder and what it must hold.
    """
    if split not in ("train", "heldout"):
        raise InputError(f"split must be train or heldout, got {split!r}")
    root = Path(path)
    official = set(official_cases(root))
    if not official:
        raise InputError(f"{root} must hold official_cases.txt or case_metadata.json, got neither")
    sheets: dict[str, Path] = {}
    for file in sorted(root.rglob("script_*.md")):
        if (file.stem in official) == (split == "heldout"):
            sheets.setdefault(file.stem, file)
    if not sheets:
        kind = "official" if split == "heldout" else "other than official"
        raise InputError(f"{root} must hold EMPA cases (script_*.md) that are {kind}, got none")
    stories, categories, forms = _stories(root), _categories(root), _forms(root)
    scenarios = []
    for script_id, file in sorted(sheets.items()):
        sheet = _sheet(file)
        story = stories.get(script_id, ())
        levels = forms.get(script_id) or sheet.estimated_levels()
        category = categories.get(script_id, "unknown")
        scenarios.append(_scenario(scenario_id(script_id), category, sheet, story, levels))
    return scenarios


def scenario_id(script_id: str) -> str:
    """Id of a case's scenario: ``script-003`` for the case ``script_003``."""
    return script_id.lower().replace("_", "-")


def official_cases(path: str | Path) -> list[str]:
    """Names (``script_003``) of the official cases, from ``official_cases.txt`` or the metadata.

    Empty where the folder has neither.
    """
    for file in sorted(Path(path).rglob("official_cases.txt")):
        return read_text(file).split()
    return [case["script_id"].text() for case in _metadata(Path(path))]


# ------------------------------------------------------------------ the character sheet


@dataclass(frozen=True)
class _Sheet:
    """What a case's markdown says; ``priorities`` has axis to (level 1..3, what is hoped for)."""

    path: Path
    sections: Mapping[str, str]
    priorities: Mapping[Axis, tuple[int, str]]

    def section(self, name: str, needed: bool = True) -> str:
        text = " ".join(self.sections.get(name, "").split())
        if needed and not text:
            raise InputError(f"{self.path}: {name} must be given, got nothing")
        return text

    def estimated_levels(self) -> dict[str, int]:
        stated = {a[0].upper(): self.priorities.get(a, (2, ""))[0] for a in AXES}
        return _TYPICAL | {f"{letter}.3": level for letter, level in stated.items()}


def _sheet(path: Path) -> _Sheet:
    sections: dict[str, list[str]] = {}
    current = ""
    for raw in read_text(path).splitlines():
        line = _TAG.sub("", raw)
        current = current if line == raw else ""
        if heading := _HEADING.fullmatch(line):
            current = heading[1]
        elif label := _LABEL.fullmatch(line):
            current = label[1]
            if current in _ONE_LINE:
                sections.setdefault(current, [label[2]])
                current = ""
            else:
                sections.setdefault(current, []).append(label[2])
        elif current:
            sections.setdefault(current, []).append(line)
    joined = {name: "\n".join(lines).strip() for name, lines in sections.items()}
    return _Sheet(path, joined, _priorities(joined.get("当下共情需求优先级", "")))


def _priorities(text: str) -> dict[Axis, tuple[int, str]]:
    """Axis to level 1..3 and what is hoped for; an unstated level follows from the order."""
    marks = list(_AXIS.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    priorities: dict[Axis, tuple[int, str]] = {}
    for rank, (mark, end) in enumerate(zip(marks, ends, strict=True)):
        said = text[mark.end() : end]
        stated = _PRIORITY.match(said)
        level = _PRIORITIES[stated[1]] if stated else max(1, 3 - rank)
        hope = said[stated.end() :] if stated else said
        priorities.setdefault(_AXES[mark[1]], (level, hope.strip(" \n：:（(）)[]【】>＞；;+。，,")))
    if not all(hope for _, hope in priorities.values()):
        # Only the order is given; what follows it speaks of all axes.
        return {axis: (level, "") for axis, (level, _) in priorities.items()}
    return priorities


# ------------------------------------------------------------------ stories, metadata, forms


def _stories(root: Path) -> dict[str, tuple[str, ...]]:
    """The phases of each case's story, in order."""
    stories: dict[str, tuple[str, ...]] = {}
    for file in sorted(root.rglob("character_stories.json")):
        for entry in read_json(file):
            phases = entry.first("故事的经过", "story_progression")
            texts = [phases[key].first("内容", "content").text() for key in phases.mapping()]
            stories.setdefault(entry.first("剧本编号", "script_id").text(), tuple(texts))
    return stories


def _metadata(root: Path) -> Iterator[Field]:
    for file in sorted(root.rglob("case_metadata.json")):
        yield from read_json(file).first("sampled_cases", "selected_cases")


def _categories(root: Path) -> dict[str, str]:
    categories: dict[str, str] = {}
    for case in _metadata(root):
        category = case["category"].text()
        if category not in _CATEGORIES:
            raise case["category"].wrong(f"one of {', '.join(_CATEGORIES)}")
        categories[case["script_id"].text()] = _CATEGORIES[category]
    return categories


def _forms(root: Path) -> dict[str, dict[str, int]]:
    """Filled initial-deficit forms: the precomputed ones, then those of result files."""
    forms: dict[str, dict[str, int]] = {}
    for file in sorted(root.rglob("iedr_batch_results.json")):
        entries = read_json(file)
        named = isinstance(entries.value, dict)
        cases = [entries[key] for key in entries.mapping()] if named else list(entries)
        for case, key in zip(cases, entries.value, strict=True):
            script_id = str(key) if named else case["script_id"].text()
            form = case.first("iedr", "filled_iedr")
            if form:
                forms.setdefault(script_id, read_levels(form))
    for file in sorted(root.rglob("script_*.json")):
        script_id = file.stem.removesuffix("_result")
        if script_id not in forms:
            form = read_json(file)["epj"].get("iedr_details").get("filled_iedr")
            if form:
                forms[script_id] = read_levels(form)
    return forms


# ------------------------------------------------------------------ the scenario


def _scenario(
    name: str, category: str, sheet: _Sheet, story: tuple[str, ...], levels: Mapping[str, int]
) -> Scenario:
    hopes = sheet.section("倾诉中想要获得的共情点")
    told = (sheet.section("故事的起因"), *story, sheet.section("想要找人倾诉的想法与内容"))
    points = {axis: _sentences(sheet.priorities.get(axis, (0, ""))[1]) for axis in AXES}
    return Scenario(
        id=name,
        category=category,
        persona=_persona(sheet),
        situation=" ".join(" ".join(part.split()) for part in told),
        needs=" ".join(filter(None, (hopes, sheet.section("人物共情阈值", needed=False)))),
        deficit=dict(levels),
        points={axis: points[axis] or _sentences(hopes) for axis in AXES},
        opening=sheet.section("聊天话题"),
        lines=dict.fromkeys(AXES, ()),
        hurt=(),
        relief=(),
    )


def _persona(sheet: _Sheet) -> Persona:
    age = re.search(r"\d+", sheet.section("年龄"))
    threshold = re.search(r"【\s*([低中高])", sheet.section("角色基础共情阈值"))
    if not age or not threshold:
        name = "角色基础共情阈值" if age else "年龄"
        expected = "name 【低】, 【中】 or 【高】" if age else "have a number of years"
        raise InputError(f"{sheet.path}: {name} must {expected}, got {sheet.section(name)[:40]!r}")
    about = (sheet.section("现在的情况", False), sheet.section("现在的人生主线目标", False))
    voice = (sheet.section("社交性格", False), sheet.section("内核性格", False))
    return Persona(
        name=sheet.section("姓名"),
        age=int(age[0]),
        about=" ".join(filter(None, about)) or sheet.section("故事的起因"),
        voice=" ".join(filter(None, voice)) or sheet.section("聊天话题"),
        threshold=_THRESHOLDS[threshold[1]],
    )


def _sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text, each once."""
    parts = re.split(r"(?<=[。！？!?；;])(?![”」』）)])|\n", text)
    return tuple(dict.fromkeys(whole for part in parts if (whole := " ".join(part.split()))))
