"""The cells of a sheet, planned before the first is drawn."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .. import pictures
from ..acceleration import accelerate as accelerate_verb
from ..calls import parameters_of
from ..errors import CallError, LcmLoraWarning, brief, near_match
from ..parameters import Parameters, is_text, refuse, whole
from ..policy import Policy
from .axes import STATE, Place, call_of, check_given_once, labelled
from .sheet import Cell, Line, Sheet
from .states import State

_OURS = {
    "prompt": "the prompts of a sheet are its second argument",
    "generator": "every picture has a generator of its own: give seed",
    "num_images_per_prompt": "a cell is one picture: give several seeds, x={'seed': range(4)}",
    "prompt_embeds": "the prompts of a sheet are texts",
    "return_dict": "a sheet needs the pipeline's own output",
    "size": "give width and height: x={'64 x 64': {'width': 64, 'height': 64}}",
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
        if not texts or not all(map(is_text, texts)):
            raise CallError(f"prompts={brief(prompts)}: one prompt or several are expected.")
        takes = _takes(pipe, [*(place.asked for place in (*columns, *down)), call], accelerate)
        check_given_once(
            columns, down, {**call, **{name: accelerate[name] for name in accelerate.keys() & STATE}}, takes
        )
        states: dict[str, State] = {}
        cells = []
        for (line, (prompt, below)), (column, place) in itertools.product(
            enumerate(itertools.product(texts, down)), enumerate(columns)
        ):
            asked = {**call, **place.beside(below)}
            state = State.of(pipe, asked, accelerate)
            state = states.setdefault(pictures.key({"state": state}, id), state)
            own = call_of(asked, takes)
            own |= takes.numbers(own)
            cells.append(Wanted(line, column, prompt, whole("seed", asked.get("seed", seed), 0), state, own))
        grid = cls(pipe, takes, texts, columns, down, tuple(cells))
        for state, of_it in grid.by_state():
            _check_calls(state.check(pipe), of_it, grid)
        return grid

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


def _check_calls(policy: Policy | None, cells: Iterable[Wanted], grid: Grid) -> None:
    """Refuse what the calls of an accelerated pipe would refuse, and calls of the plain one in which no step is left.

    Raises:
        CallError: there is such a call.
    """
    if policy is None:
        for cell in cells:
            steps = cell.call.get(grid.takes.steps or "", grid.takes.defaults.get(grid.takes.steps or ""))
            strength = grid.takes.strength_of(cell.call)
            if strength is not None and isinstance(steps, int) and not int(steps * strength):
                raise CallError(
                    f"strength={strength:g} leaves none of {steps} steps of the pipe without the LCM-LoRA."
                )
        return
    policy = dataclasses.replace(policy)  # one that has told nothing: the calls warn themselves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LcmLoraWarning)
        for cell in cells:
            policy.complete(grid.takes, grid.pipe, (), {"prompt": cell.prompt, **cell.call}, [])


def _takes(pipe: Any, asked: Sequence[Mapping[str, Any]], accelerate: Mapping[str, Any]) -> Parameters:
    """What the pipe's call takes; refused is whatever nothing takes.

    Raises:
        PipelineError: the pipe can't be called. TypeError: an argument is nobody's. CallError: one is the sheet's own.
    """
    takes = parameters_of(pipe)
    settings = inspect.signature(accelerate_verb).parameters
    for name in accelerate.keys() - settings.keys():
        refuse(name, "accelerate", near_match(name, settings))
    named = {name for one in asked for name in call_of(one, takes)}
    for name, why in _OURS.items():
        if name in named:
            raise CallError(f"{name}: {why}.")
    for name, near in takes.unknown({"prompt", "generator", *named}, ("seed", *settings)):
        takes.refuse(name, near)
    return takes
