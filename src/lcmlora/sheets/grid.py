"""The cells of a sheet, planned before the first is drawn."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .. import pictures
from ..acceleration import accelerate as accelerate_verb
from ..calls import plain
from ..errors import CallError, PipelineError, brief
from ..parameters import Parameters, near_match, refuse
from .axes import Place, call_of, labelled
from .sheet import Cell, Line, Sheet
from .states import State

_OURS = {
    "prompt": "the prompts of a sheet are its second argument",
    "generator": "every picture has a generator of its own: give seed",
    "num_images_per_prompt": "a cell is one picture: give several seeds, x={'seed': range(4)}",
    "return_dict": "a sheet needs the pipeline's own output",
}


class Wanted(NamedTuple):
    """A cell to draw."""

    line: int
    column: int
    prompt: str
    seed: int
    state: State
    call: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a sheet, planned: every setting is checked, and nothing was drawn."""

    pipe: Any
    takes: Parameters
    prompts: tuple[str, ...]
    columns: tuple[Place, ...]
    down: tuple[Place, ...]
    cells: tuple[Wanted, ...]

    @classmethod
    def of(
        cls,
        pipe: Any,
        prompts: str | Sequence[str],
        columns: tuple[Place, ...],
        down: tuple[Place, ...],
        seed: int,
        accelerate: Mapping[str, Any],
        call: Mapping[str, Any],
    ) -> Grid:
        """Plan a sheet.

        Raises:
            TypeError: `accelerate` or the pipeline takes no such argument.
            LcmLoraError: what a cell asks for can't be.
        """
        texts = (prompts,) if isinstance(prompts, str) or not isinstance(prompts, Iterable) else tuple(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise CallError(f"prompts={brief(prompts)}: one prompt or several are expected.")
        takes = _takes(pipe, [*(place.asked for place in (*columns, *down)), call], accelerate)
        states: dict[str, State] = {}
        cells = []
        for (line, (prompt, below)), (column, place) in itertools.product(
            enumerate(itertools.product(texts, down)), enumerate(columns)
        ):
            asked = {**call, **place.beside(below)}
            state = State.of(pipe, asked, accelerate)
            state = states.setdefault(pictures.key(dataclasses.asdict(state)), state)
            cells.append(Wanted(line, column, prompt, int(asked.get("seed", seed)), state, call_of(asked, takes)))
        for state in states.values():
            state.check(pipe)
        return cls(pipe, takes, texts, columns, down, tuple(cells))

    def by_state(self) -> Iterator[tuple[State, list[Wanted]]]:
        """The cells of each state: bringing a pipe to one may cost a merge, so a state is brought about once."""
        groups: dict[int, list[Wanted]] = {}
        for cell in self.cells:
            groups.setdefault(id(cell.state), []).append(cell)
        return ((group[0].state, group) for group in groups.values())

    def sheet(self, made: Mapping[tuple[int, int], Cell], title: str) -> Sheet:
        """The sheet of the cells that were drawn. Where something else ran than a place asks for, its label tells."""
        columns = [
            self._label(c, (cell for (_, at), cell in made.items() if at == i)) for i, c in enumerate(self.columns)
        ]
        lines = []
        for i, (prompt, place) in enumerate(itertools.product(self.prompts, self.down)):
            lines.append(Line(prompt, self._label(place, (cell for (at, _), cell in made.items() if at == i))))
        rows = [{"prompt": line.prompt, "line": line.label} for line in lines]
        cells = []
        for i, row in enumerate(rows):
            drawn = [(column, made.get((i, j))) for j, column in enumerate(columns)]
            cells.append([cell and Cell(cell.image, {**row, "column": at, **cell.row}) for at, cell in drawn])
        return Sheet(tuple(map(tuple, cells)), tuple(columns), tuple(lines), title)

    def _label(self, place: Place, cells: Iterator[Cell]) -> str:
        labels = {labelled(place.label, place.asked, cell.row, self.takes) for cell in cells}
        return labels.pop() if len(labels) == 1 else place.label


def _takes(pipe: Any, asked: Sequence[Mapping[str, Any]], accelerate: Mapping[str, Any]) -> Parameters:
    """What the pipe's call takes; refused is whatever nothing takes.

    Raises:
        PipelineError: the pipe can't be called. TypeError: an argument is nobody's. CallError: one is the sheet's own.
    """
    if not callable(pipe):
        raise PipelineError(f"{type(pipe).__name__} has no __call__ that draws.")
    takes = Parameters.of(plain(type(pipe)), "__call__")
    settings = inspect.signature(accelerate_verb).parameters
    for name in accelerate.keys() - settings.keys():
        refuse(name, "accelerate", near_match(name, settings))
    named = {name for one in asked for name in call_of(one, takes)}
    for name, why in _OURS.items():
        if name in named:
            raise CallError(f"{name}: {why}.")
    for name, near in takes.unknown({"prompt", "generator", *named}):
        refuse(name, f"{takes.owner}'s call", near)
    return takes
