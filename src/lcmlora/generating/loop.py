"""Many pictures from rows: grouped by styles, resumable, one file each."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import pictures
from ..acceleration import kept, set_styles
from ..calls import parameters_of
from ..devices import device_of
from ..errors import CallError, DataError, LcmLoraError, PipelineError, brief
from ..parameters import spelled
from ..progress import one_bar
from ..sheets.sheet import Sheet
from ..transition.target import Style
from ..warn import warn
from ..writing import in_the_making, require_writable
from .overview import overview
from .processes import Processes
from .reading import Numbered, read
from .records import MadeBy
from .rows import Failed, Row, Rows, Styles, why_not

_TOLD = 3


@dataclasses.dataclass(frozen=True, repr=False)
class Generated:
    """What `generate` made.

    Attributes:
        out: the folder.
        files: every picture of the rows that is there now, in the rows' order.
        failed: the rows that were not drawn: each has its `row` (a number, from 1) and its `line` in a file of rows,
            its file's `name` (None where it has none), the `reason`, and whether it was `refused`. True: the row is at
            fault, and has to be mended. False: the pipe failed while it drew, and the same call tries it again.
        already: how many of the files were there before.
        interrupted: whether Ctrl-C stopped it before the last row.
    """

    out: Path
    files: tuple[Path, ...]
    failed: tuple[Failed, ...] = ()
    already: int = 0
    interrupted: bool = False

    def __repr__(self) -> str:
        there = f", {self.already} of them there already" * bool(self.already)
        failed = f", {_count(len(self.failed), 'picture')} not drawn" * bool(self.failed)
        stopped = ", interrupted" * self.interrupted
        return f"Generated({_count(len(self.files), 'picture')} in {self.out}{there}{failed}{stopped})"

    def sheet(self, title: str = "") -> Sheet:
        """The pictures on one contact sheet: a line for each prompt, a column for each setting that differs.

        Args:
            title: a line above the sheet.

        Returns:
            The sheet, to `save`, or to write as a page with `to_html`.

        Raises:
            DataError: a picture is not there any more, or there is none.
        """
        return overview(self.files, title)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "out": str(self.out),
            "files": [str(file) for file in self.files],
            "failed": [dict(zip(Failed.__annotations__, one, strict=True)) for one in self.failed],
            "already": self.already,
            "interrupted": self.interrupted,
        }


@spelled({"steps": "call={'steps': ...}", "guidance": "call={'guidance': ...}", "seed": "call={'seed': ...}"})
def generate(
    pipe: Any,
    rows: Iterable[Mapping[str, Any] | str] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    styles: Mapping[str, float | str | os.PathLike[str] | Style] | None = None,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> Generated:
    """Draw what rows say, each picture into a PNG file that tells what made it.

    All rows are read and checked before the first picture. A row that can't be drawn is warned of and left out.
    Stopped at any moment and started again, it goes on: each picture once. Pictures do not depend on each other: each
    has a CPU generator of its own. Rows of equal styles are drawn together, so that each set is merged once. Under
    `torchrun` or `accelerate launch` every process draws its part, and returns what all have drawn.

    Args:
        pipe: a pipeline, accelerated or not; it is drawn with as it is, and given back so.
        rows: dicts, or prompts alone, or a `.jsonl`, `.json`, `.csv`, `.tsv` or `.txt` file. A row's keys are the
            arguments of the pipe's call, and: "steps", "guidance", "negative" for the usual ones, "seed" (a number,
            or several: "1-8"; 0 by default), "size" ("512x768"), "styles" (as for `set_styles`, or text such as
            "ink:0.8,chalk"), "name" (of the file; "0001-0.png", row and seed, by default). Pictures ("image",
            "mask_image") are paths, relative to the file of rows.
        out: the folder for the pictures.
        styles: the styles of the rows that name none, as for `set_styles`. A row that names one of them takes its
            source from here, and its weight too where it gives none.
        call: arguments of every row that does not give them itself.
        batch_size: up to so many rows of equal settings are drawn in one call. A batch is always made of the same
            rows, however often the run was stopped; but its pictures may differ in the last bits from those drawn
            alone. Rows with pictures are drawn alone.
        resume: keep what is there already of the same settings; False draws it anew.
        overwrite: replace files that are there of other settings, or of other origin. Else such rows are left out.
        strict: refuse, or stop at, the first row that can't be drawn.
        progress: show a bar, where the pipe's own bars are not disabled.

    Returns:
        The files, and the rows that were not drawn. After Ctrl-C what is done so far, with a warning.

    Raises:
        PipelineError: the pipe can't draw single pictures from a seed.
        DataError: the rows can't be read, or the folder not be written to; when strict, the first bad row.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size={brief(batch_size)}: a whole number from 1 is expected.")
    _check_pipe(pipe)
    if styles is not None and (why := why_not(pipe, styles)):
        raise PipelineError(why)
    given, folder = read(rows)
    out = Path(out)
    require_writable(out)
    run = _Run(pipe, out, overwrite, strict, resume)
    run.plan(given, Rows(pipe, out, folder, call or {}, styles), batch_size)
    return run.draw(progress)


def _check_pipe(pipe: Any) -> None:
    """Refuse what does not draw single pictures from a generator."""
    takes = parameters_of(pipe)
    if "num_frames" in takes.defaults or hasattr(pipe, "motion_adapter"):
        raise PipelineError(
            f"{takes.owner} draws films, and generate writes single pictures: call the pipe itself, and "
            "diffusers.utils.export_to_gif(frames, path)."
        )
    if "generator" not in takes.defaults and not takes.open:
        raise PipelineError(f"{takes.owner}'s call takes no generator, so no seed tells its pictures.")


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A row with its settings and what tells them."""

    row: Row
    settings: Mapping[str, Any]
    key: str
    there: bool


class _Run:
    """One run of `generate`."""

    def __init__(self, pipe: Any, out: Path, overwrite: bool, strict: bool, resume: bool) -> None:
        self._pipe, self._out, self._overwrite, self._strict, self._resume = pipe, out, overwrite, strict, resume
        self._made_by = MadeBy(pipe)
        self._processes = Processes(device_of(pipe).type == "cpu")
        self._order: list[_Picture] = []
        self._batches: list[list[_Picture]] = []
        self._failed: list[Failed] = []
        self._done: set[str] = set()
        self._lines: list[int | None] = []

    def plan(self, given: Sequence[Numbered], checks: Rows, batch_size: int) -> None:
        """Decide what is to draw, in which groups and batches, and tell what is not."""
        for number, (line, one) in enumerate(given, 1):
            self._lines.append(line)
            rows, bad = checks.check(number, one)
            for row in rows:
                settings = self._made_by.settings(row, checks.takes)
                try:
                    self._order.append(self._looked_at(row, settings, self._made_by.key(row, settings)))
                except (LcmLoraError, OSError) as error:
                    bad.append(Failed(number, row.name, str(error)))
            bad = [Failed(one.row, one.name, one.reason, line=line) for one in bad]
            self._failed += bad
            if bad and self._strict:
                raise DataError(f"{bad[0].told}: {bad[0].reason}")
        if self._processes.first:
            _tell(self._failed, len(given))
        groups = _grouped(self._order, lambda picture: picture.row.styles)
        for _, group in sorted(groups, key=lambda group: group[0] is not None):  # first those as the pipe is now
            for settings, alike in _grouped(group, lambda one: _alike(one.row) if batch_size > 1 else None):
                size = 1 if settings is None else batch_size
                self._batches += [alike[i : i + size] for i in range(0, len(alike), size)]

    def _looked_at(self, row: Row, settings: Mapping[str, Any], key: str) -> _Picture:
        """Whether the picture is there. One of other settings is not replaced unless that was said."""
        path = self._out / row.name
        if not path.exists():
            return _Picture(row, settings, key, False)
        try:
            found = pictures.record_of(path)
        except DataError:
            found = {}
        same, unknown = found.get("key") == key, pictures.untold(row.call) if self._resume else []
        if same and not unknown:
            return _Picture(row, settings, key, self._resume)
        if self._overwrite:
            return _Picture(row, settings, key, False)
        what = "was made with other settings" if found else "is there and was not made by lcmlora"
        if same:
            what = f"is there, and nothing tells whether its {', '.join(unknown)} was the same"
        raise DataError(f"{path} {what}: give another folder or name, or overwrite=True.")

    def draw(self, progress: bool) -> Generated:
        """Draw what is missing of this process' part."""
        batches, interrupted = self._processes.share(self._batches), False
        self._remove_partials(batches)
        self._done = {one.row.name for batch in batches for one in batch if one.there}
        already = len(self._done)
        mine = [one for batch in batches for one in batch]
        shown = progress and self._processes.first
        styled = any(one.row.styles is not None and not one.there for one in mine)
        try:
            with (
                one_bar(self._pipe, len(mine), "pictures", already, not (mine and shown)) as bar,
                kept(self._pipe) if styled else nullcontext(),
            ):
                for styles, group in itertools.groupby(batches, key=lambda batch: batch[0].row.styles):
                    self._draw_group(styles, [batch for batch in group if not all(one.there for one in batch)], bar)
        except KeyboardInterrupt:
            interrupted = True
            warn(
                f"stopped by Ctrl-C: {len(self._done)} of {len(mine)} pictures are in {self._out}. The same call goes "
                "on from there."
            )
        done, failed, already = self._processes.together(self._done, self._failed, already, interrupted)
        files = tuple(self._out / one.row.name for one in self._order if one.row.name in done)
        return Generated(self._out, files, tuple(sorted(failed, key=lambda one: one.row)), already, interrupted)

    def _remove_partials(self, batches: Iterable[Sequence[_Picture]]) -> None:
        """Files that a killed run left in the making; those of this process' pictures alone."""
        names = {self._out / one.row.name for batch in batches for one in batch}
        for folder in {path.parent for path in names if path.parent.is_dir()}:
            for partial in folder.glob(".*.partial"):
                if folder / partial.name[1:].rsplit(".", 2)[0] in names and not in_the_making(partial):
                    partial.unlink(missing_ok=True)

    def _draw_group(self, styles: Styles, batches: Sequence[Sequence[_Picture]], bar: Any) -> None:
        """Pictures of equal styles."""
        if styles is not None and batches:
            try:
                set_styles(self._pipe, styles)
                self._made_by.look()
            except (LcmLoraError, OSError) as error:
                for batch in batches:
                    self._fail(batch, error, bar)
                return
        for batch in batches:
            try:
                self._draw_batch(batch, bar)
            except Exception as error:  # whatever a pipeline raises concerns this batch
                if isinstance(error, _SaveError):
                    raise DataError(str(error)) from error
                if len(batch) == 1:
                    self._fail(batch, error, bar)
                    continue
                self._draw_group(None, [[one] for one in batch if one.row.name not in self._done], bar)

    def _draw_batch(self, batch: Sequence[_Picture], bar: Any) -> None:
        images = drawn(self._pipe, [one.row for one in batch])
        for one, image in zip(batch, images, strict=True):
            if one.there:
                continue
            try:
                record = self._made_by.record(one.row, one.settings, len(batch), one.key)
                pictures.save(image, self._out / one.row.name, record)
            except DataError as error:
                raise _SaveError(f"{error} What is done is kept; the same call goes on from there.") from error
            self._done.add(one.row.name)
            bar.update()

    def _fail(self, batch: Sequence[_Picture], error: Exception, bar: Any) -> None:
        text = (str(error) or "no reason given").strip()
        reason = text if isinstance(error, LcmLoraError) else f"{type(error).__name__}: {text.splitlines()[0]}"
        for one in batch:
            if one.there:
                continue
            number, refused = one.row.number, isinstance(error, CallError | DataError)
            failed = Failed(number, one.row.name, reason, refused, self._lines[number - 1])
            if self._strict:
                raise DataError(f"{failed.told}: {reason}") from error
            self._failed.append(failed)
            warn(f"{failed.told} was not drawn: {reason}")
            bar.update()


class _SaveError(Exception):
    """No picture can be saved: the run ends."""


def drawn(pipe: Any, rows: Sequence[Row]) -> list[Image.Image]:
    """The pictures of one call, each from a CPU generator of its own, made anew.

    Raises:
        DataError: the pipe gives no pictures, or not as many.
    """
    generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    arguments = rows[0].arguments()
    if len(rows) == 1:
        arguments["generator"] = generators[0]
    else:
        arguments |= {name: [row.call[name] for row in rows] for name in _TEXTS if name in arguments}
        arguments["generator"] = generators
    images = list(getattr(pipe(**arguments), "images", ()))
    if len(images) != len(rows) or not all(isinstance(image, Image.Image) for image in images):
        raise DataError(f"{type(pipe).__name__} gave no picture for each of {_count(len(rows), 'prompt')}.")
    return images


_TEXTS = ("prompt", "negative_prompt")
"""The arguments in which the rows of a batch may differ."""


def _alike(row: Row) -> Any:
    """What rows of one batch have in common; None for a row that is drawn alone."""
    if row.files or not all(isinstance(value, str | int | float | bool) for value in row.call.values()):
        return None
    return {name: value if name not in _TEXTS else "" for name, value in row.call.items()}


def _grouped(things: Iterable[Any], key: Any) -> list[tuple[Any, list[Any]]]:
    """Things of equal keys together, in the order in which these come first. Keys need no hash."""
    groups: list[tuple[Any, list[Any]]] = []
    for thing in things:
        mine = key(thing)
        found = next((group for other, group in groups if other == mine), None)
        if found is None:
            groups.append((mine, [thing]))
        else:
            found.append(thing)
    return groups


def _tell(failed: Sequence[Failed], count: int) -> None:
    if failed:
        first = " ".join(f"{one.told.capitalize()}: {one.reason}" for one in failed[:_TOLD])
        more = f" And {len(failed) - _TOLD} more, see .failed of the result." if len(failed) > _TOLD else ""
        warn(f"{_count(len(failed), 'picture')} of {_count(count, 'row')} can't be drawn. {first}{more}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
