"""``normkit evaluate``: one or several chat models on benchmarks and in held-out tasks of worlds.

::

    normkit evaluate smollm2 runs/mapo/2026-11-24_10-00-00 --world empathy
    normkit evaluate smollm2 runs/st-ppo/2026-11-25_22-00-00 --world search
    normkit evaluate Qwen/Qwen2.5-0.5B-Instruct --emobench EmoBench/data --likelihood
    normkit evaluate MODEL --url http://localhost:8000 --eqbench eq_bench_v2_questions_171.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from normkit.errors import InputError
from normkit.files import check_file, finite, write_json
from normkit.rl.environment import HELDOUT_SEED, Environment, Split, evaluation_tasks
from normkit.rl.evaluation.dialogues import score_dialogues
from normkit.rl.evaluation.emobench import Item, ask_emobench, read_emobench, weigh_emobench
from normkit.rl.evaluation.eqbench import ask_eqbench, read_eqbench
from normkit.rl.evaluation.measure import Measure, Outcome, Report
from normkit.rl.evaluation.players import LocalPlayer, Player, ServedPlayer
from normkit.rl.models import DtypeName, cache_folder
from normkit.rl.rollout import RolloutConfig
from normkit.statistics import Interval

Benchmark: TypeAlias = Callable[[Player, Report], Outcome]


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``normkit evaluate``: score chat models on benchmarks and in worlds.

    Attributes:
        models: "smollm2", names or folders of chat models of transformers, runs of normkit; with
            ``--url``, the names that the server knows its models by. The others are compared with
            the first.
        url: address of an OpenAI-compatible server that has the models (key: OPENAI_API_KEY).
        emobench: folder with EA.jsonl and EU.jsonl of EmoBench.
        eqbench: question file of EQ-Bench v2.
        world: world whose tasks are played: "empathy", "tools", "search" or "games".
        scenarios: a scenario file of your own for "empathy", split as in ``normkit run``.
        corpus: what "search" searches: "land" (invented, shipped), "wordnet", or a file of
            passages.
        questions: a file of questions of your own for "search", the last third held out.
        opponents: who is played against in "games", in each game that they can play and each seat:
            "random", "mcts" (100 simulations), "mcts-N", "cfr", "minimax".
        split: tasks to play.
        judge: what scores the replies: "embedding", "llm" (local chat model) or "openai" (server).
        judge_model: the judge's model.
        judge_url: address of the judge's server.
        language: questions of EmoBench in this language alone.
        likelihood: take the choice of EmoBench that the model finds likeliest, not one it writes.
        repeats: times that each question of EmoBench is asked, and each task is sampled.
        limit: play and ask only the first so many tasks and questions, for a trial.
        max_turns: a dialogue ends here; the world's own limit in training if not given. Games end
            by their rules.
        min_turns: neither success nor failure is declared earlier ("empathy").
        max_new_tokens: length limit of a reply in a dialogue; as in training if not given.
        temperature: of the sampled dialogues; everything else is greedy.
        max_tokens: length limit of an answer; 64 for EmoBench and 600 for EQ-Bench by default.
        batch_size: questions that a local model answers together.
        dtype: dtype of a local model.
        seed: of shuffling, sessions and sampling.
        out: file to write the figures and everything that was said to, as JSON.
        json: print JSON instead of tables.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    url: str = ""
    emobench: Path | None = None
    eqbench: Path | None = None
    world: str = ""
    scenarios: Path | None = None
    corpus: str = "land"
    questions: Path | None = None
    opponents: tuple[str, ...] = ("random", "mcts", "cfr")
    split: Split = "heldout"
    judge: Literal["embedding", "llm", "openai"] = "embedding"
    judge_model: str = ""
    judge_url: str = ""
    language: Literal["all", "en", "zh"] = "all"
    likelihood: bool = False
    repeats: int = 3
    limit: int | None = None
    max_turns: int | None = None
    min_turns: int = 12
    max_new_tokens: int | None = None
    temperature: float = 0.7
    max_tokens: int | None = None
    batch_size: int = 16
    dtype: DtypeName = "auto"
    seed: int = HELDOUT_SEED
    out: Path | None = None
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    """Run ``normkit evaluate``."""
    options = tyro.cli(EvaluateOptions, args=arguments, prog="normkit evaluate")
    _check(options)
    # Files are read first: a wrong one should not cost the loading of a model.
    benchmarks = _benchmarks(options)
    outcomes: dict[str, dict[str, Outcome]] = {}
    console = Console(stderr=True)
    for name in options.models:
        with console.status(f"loading {name}"):
            player = _player(name, options)
        outcomes[name] = {}
        for benchmark, run in benchmarks.items():
            with _progress(f"{name}: {benchmark}", console) as report:
                outcomes[name][benchmark] = run(player, report)
        if options.out is not None:
            write_json(options.out, _document(options, outcomes, records=True))
    if options.json:
        print(json.dumps(finite(_document(options, outcomes)), indent=2, ensure_ascii=False))
    else:
        _print(outcomes, Console())


def _check(options: EvaluateOptions) -> None:
    if not options.models:
        raise InputError("name at least one model: normkit evaluate MODEL --world empathy")
    if len(set(options.models)) < len(options.models):
        raise InputError("models must be different, got one of them twice")
    if options.emobench is None and options.eqbench is None and not options.world:
        raise InputError("choose what to evaluate on: --emobench DIR, --eqbench FILE or --world")
    if options.world not in ("", *WORLDS):
        raise InputError(f"world must be one of {', '.join(WORLDS)}, got {options.world!r}")
    for name in ("repeats", "limit", "max_turns", "max_new_tokens", "max_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if options.likelihood and options.url:
        raise InputError("likelihood needs models on this machine; leave out --url or --likelihood")
    if options.likelihood and options.emobench is None:
        raise InputError("likelihood is a way to score EmoBench; give its folder with --emobench")
    if options.out is not None:
        check_file(options.out)


def _player(name: str, options: EvaluateOptions) -> Player:
    if options.url:
        return ServedPlayer(name, options.url, cache_folder() / "answers")
    return LocalPlayer(name, options.dtype, options.batch_size)


# ---------------------------------------------------------------------- what is run


def _benchmarks(options: EvaluateOptions) -> dict[str, Benchmark]:
    chosen: dict[str, Benchmark] = {}
    if options.emobench is not None:
        chosen["EmoBench"] = _emobench(options, options.emobench)
    if options.eqbench is not None:
        chosen["EQ-Bench v2"] = _eqbench(options, options.eqbench)
    if options.world:
        chosen[options.world] = _dialogues(options)
    return chosen


def _emobench(options: EvaluateOptions, folder: Path) -> Benchmark:
    parts: dict[tuple[str, str], list[Item]] = {}
    for item in read_emobench(folder):
        if options.language in ("all", item.language):
            parts.setdefault((item.task, item.language), []).append(item)
    items = [item for part in parts.values() for item in part[: options.limit]]
    if not items:
        raise InputError(f"emobench: {folder} has no question in language {options.language!r}")

    def run(player: Player, report: Report) -> Outcome:
        how = (items, options.repeats, options.seed, report)
        if options.likelihood:
            return weigh_emobench(player.likelihood(), *how)
        return ask_emobench(player.chat(options.max_tokens or 64), *how)

    return run


def _eqbench(options: EvaluateOptions, path: Path) -> Benchmark:
    items = read_eqbench(path)[: options.limit]
    return lambda player, report: ask_eqbench(player.chat(options.max_tokens or 600), items, report)


# ---------------------------------------------------------------------- worlds


def _empathy(options: EvaluateOptions, max_turns: int) -> Environment[Any]:
    from normkit.recipes.mapo import Config, make_environment

    config = Config(
        judge=options.judge,
        judge_model=options.judge_model,
        judge_url=options.judge_url,
        scenarios=options.scenarios,
        max_turns=max_turns,
        min_turns=options.min_turns,
    )
    return make_environment(config, cache_folder() / "evaluate")


def _tools(_: EvaluateOptions, max_turns: int) -> Environment[Any]:
    from normkit.rl.environments.tools import ToolWorld, ToolWorldConfig

    return ToolWorld(ToolWorldConfig(max_turns=max_turns))


def _search(options: EvaluateOptions, max_turns: int) -> Environment[Any]:
    from normkit.data.searchable import open_world
    from normkit.recipes.st_ppo import HITS
    from normkit.rl.environments.search import SearchWorldConfig

    config = SearchWorldConfig(max_turns=max_turns, hits=HITS)
    return open_world(config, options.corpus, options.questions)


def _games(options: EvaluateOptions, _: int) -> Environment[Any]:
    from normkit.rl.environments.arena import Arena, pairings
    from normkit.rl.environments.games import HELDOUT, TRAIN

    if options.max_turns is not None:
        raise InputError("max_turns must be left out: games end by their rules")
    # A dialogue is one seat's: in games that are won together the partner plays at random.
    train, heldout = (list(pairings(g, options.opponents, False)) for g in (TRAIN, HELDOUT))
    return Arena(train, heldout)


@dataclass(frozen=True)
class World:
    """A world to play in.

    Attributes:
        build: makes it, given the options and the most turns of a dialogue.
        metrics: which of its metrics are shown, by what to call them.
        max_turns: most turns in training.
        max_new_tokens: length limit of a reply in training.
    """

    build: Callable[[EvaluateOptions, int], Environment[Any]]
    metrics: Mapping[str, str]
    max_turns: int
    max_new_tokens: int


WORLDS: Mapping[str, World] = {
    "empathy": World(
        _empathy, {"EPM-Q": "score", "distance closed": "closed", "success": "success"}, 4, 48
    ),
    "tools": World(_tools, {"solve-F1": "score", "answer F1": "answer", "calls": "calls"}, 7, 64),
    "search": World(
        _search, {"exact match": "score", "F1": "f1", "passages found": "found"}, 4, 40
    ),
    "games": World(_games, {"return": "score", "won": "won", "illegal": "illegal"}, 42, 16),
}


def _dialogues(options: EvaluateOptions) -> Benchmark:
    world = WORLDS[options.world]
    environment = world.build(options, options.max_turns or world.max_turns)
    rounds = [
        evaluation_tasks(environment, options.split, options.seed, repeat, options.limit)
        for repeat in range(options.repeats)
    ]
    sampled = RolloutConfig(
        max_new_tokens=options.max_new_tokens or world.max_new_tokens,
        temperature=options.temperature,
        batch_size=64,
    )
    plan = [("greedy", replace(sampled, greedy=True), rounds[0], 0)]
    plan += [("sampled", sampled, tasks, i) for i, tasks in enumerate(rounds)]

    def run(player: Player, report: Report) -> Outcome:
        played: dict[str, list[Any]] = {}
        for number, (mode, speech, tasks, i) in enumerate(plan):

            def part(done: int, total: int, number: int = number) -> None:
                report(number * total + done, len(plan) * total)

            dialogues = player.play(environment, tasks, speech, options.seed + i, part)
            played.setdefault(mode, []).extend(dialogues)
        return score_dialogues(options.world, played, world.metrics)

    return run


# ---------------------------------------------------------------------- what is shown


def _document(
    options: EvaluateOptions, outcomes: Mapping[str, Mapping[str, Outcome]], records: bool = False
) -> dict[str, Any]:
    """Everything that was found, JSON-ready; what was said only with ``records``."""
    first = _measures(next(iter(outcomes.values())))
    document: dict[str, Any] = {
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(options).items()
        },
        "models": {
            name: {
                "measures": {
                    measure.name: _numbers(measure.interval()) for measure in _measures(found)
                },
                "counts": {benchmark: dict(o.counts) for benchmark, o in found.items()},
                "notes": [note for o in found.values() for note in o.notes],
            }
            for name, found in outcomes.items()
        },
        "differences": {
            name: {
                measure.name: _numbers(measure.gain_over(base))
                for measure, base in zip(_measures(found), first, strict=True)
            }
            for name, found in list(outcomes.items())[1:]
        },
    }
    if records:
        for name, found in outcomes.items():
            said = {benchmark: list(o.records) for benchmark, o in found.items()}
            document["models"][name]["records"] = said
    return document


def _measures(found: Mapping[str, Outcome]) -> list[Measure]:
    return [measure for outcome in found.values() for measure in outcome.measures]


def _numbers(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)


def _print(outcomes: Mapping[str, Mapping[str, Outcome]], console: Console) -> None:
    """Print the figures of all models side by side, then the paired differences to the first."""
    names = list(outcomes)
    columns = [_measures(found) for found in outcomes.values()]
    table = Table("mean [95% interval]", "n", *names)
    for row in zip(*columns, strict=True):
        intervals = [measure.interval() for measure in row]
        size = "/".join(dict.fromkeys(str(i.n if i else 0) for i in intervals))
        table.add_row(row[0].name, size, *(_cell(i, "") for i in intervals))
    console.print(table)
    if len(names) > 1:
        table = Table(f"paired difference to {names[0]}", *names[1:])
        for first, *others in zip(*columns, strict=True):
            table.add_row(first.name, *(_cell(o.gain_over(first), "+") for o in others))
        console.print(table)
    for name, found in outcomes.items():
        for outcome in found.values():
            for note in outcome.notes:
                console.print(f"{name}: {note}", markup=False, highlight=False)


def _cell(interval: Interval | None, sign: str) -> str:
    if interval is None:
        return "none"
    number = f"{sign}.2f"
    low, high = format(interval.low, number), format(interval.high, number)
    return f"{format(interval.mean, number)} \\[{low}, {high}]"


@contextmanager
def _progress(description: str, console: Console) -> Iterator[Report]:
    """Show a progress bar while the block runs."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
