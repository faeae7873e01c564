"""Pairings of games and opponents, played side by side to see how good a model is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from normkit.errors import InputError
from normkit.rl.environment import Split
from normkit.rl.environments.games import GameConfig, GameSession, GameWorld
from normkit.rl.self_play import can_play
from normkit.rl.spiel import load_game


@dataclass(frozen=True)
class Pairing:
    """A game, who else plays, and the seat that is judged.

    Attributes:
        game: name of the game.
        opponent: a name of :func:`normkit.rl.self_play.player`; None for the model itself.
        seat: the judged seat; None where all are the model's.
    """

    game: str
    opponent: str | None
    seat: int | None

    def __str__(self) -> str:
        if self.opponent is None:
            return f"{self.game} with itself"
        return f"{self.game} against {self.opponent}, seat {self.seat}"


def pairings(
    games: Iterable[str], opponents: Sequence[str], itself: bool = True
) -> Iterator[Pairing]:
    """Every game with every opponent that can play it, in each seat.

    Games that are won together are played by the model with itself.

    Args:
        games: names of games.
        opponents: names of players.
        itself: whether the model may have several seats; else its partner plays at random.
    """
    for game in games:
        loaded = load_game(game)
        shared = loaded.get_type().utility.name == "IDENTICAL"
        if shared and itself:
            yield Pairing(game, None, None)
            continue
        for opponent in ("random",) if shared else opponents:
            if can_play(opponent, game):
                for seat in range(loaded.num_players()):
                    yield Pairing(game, opponent, seat)


class Arena(GameWorld):
    """A world whose tasks are pairings.

    Args:
        train: pairings of the training games.
        heldout: pairings of the held-out games.
        config: options.
    """

    def __init__(
        self,
        train: Iterable[Pairing],
        heldout: Iterable[Pairing] = (),
        config: GameConfig | None = None,
    ) -> None:
        chosen: dict[Split, list[Pairing]] = {"train": list(train), "heldout": list(heldout)}
        super().__init__(
            list(dict.fromkeys(p.game for p in chosen["train"])),
            list(dict.fromkeys(p.game for p in chosen["heldout"])),
            config=config,
        )
        self._pairings = {split: [str(p) for p in side] for split, side in chosen.items()}
        self._worlds = {
            str(p): (p.game, GameWorld([p.game], [], p.opponent, p.seat, config))
            for side in chosen.values()
            for p in side
        }

    def tasks(self, split: Split) -> Sequence[str]:
        """The pairings of a split, as text.

        Raises:
            InputError: for a split that does not exist.
        """
        if split not in self._pairings:
            raise InputError(f"split must be train or heldout, got {split!r}")
        return self._pairings[split]

    def start_seats(self, task: str, seed: int) -> list[GameSession]:
        """Deal a pairing's game.

        Raises:
            InputError: where there is no such pairing.
        """
        game, world = self._world(task)
        return world.start_seats(game, seed)

    def start(self, task: str, seed: int) -> GameSession:
        """Deal a pairing's game to a model in one seat (:meth:`GameWorld.start`).

        Raises:
            InputError: where there is no such pairing.
        """
        game, world = self._world(task)
        return world.start(game, seed)

    def _world(self, task: str) -> tuple[str, GameWorld]:
        if task not in self._worlds:
            raise InputError(f"task: there is no pairing {task!r} in this world")
        return self._worlds[task]
