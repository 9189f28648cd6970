"""ItemRunner: runs the items of one task under methods, by whatever executor.

Windows of a text are run several in a pass where the executor can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation.execution.executor import Execution
from vesicle.evaluation.execution.items import Prepared
from vesicle.evaluation.run.progress import Tick
from vesicle.evaluation.run.subject import Subject
from vesicle.modulator import ModulatorMethod
from vesicle.phases import GENERATED
from vesicle.plan import Method
from vesicle.tasks.base import Task

Methods = Callable[[int], Method | None]
"""From an item's place to the method that decides on it."""


class ItemRunner:
    """Runs items; what it does is told to `tick`, in tokens, where it sets a method."""

    def __init__(self, task: Task, subject: Subject) -> None:
        """For items of `task` on `subject`."""
        self._task, self._subject = task, subject
        self.tick: Tick = lambda n: None

    def each(
        self, items: Sequence[Prepared], places: Sequence[int], methods: Methods, *, keeps: bool
    ) -> Iterator[tuple[int, Execution | VesicleError]]:
        """Run items one after another; what fails together is run alone.

        Args:
            items: Of the task.
            places: Of those to be run.
            methods: Who decides on each.
            keeps: Whether to keep released levels.

        Yields:
            A place, with what the item gave or why it cannot be run.
        """
        most = self._most
        for start in range(0, len(places), most):
            together = places[start : start + most]
            if len(together) > 1:
                windows = [items[i] for i in together]
                with suppress(VesicleError):
                    ran = self.losses(windows, [methods(i) for i in together], keeps=keeps)
                    yield from zip(together, ran, strict=True)
                    continue
            for i in together:
                try:
                    yield i, self.run(items[i], methods(i), keep_levels=keeps)
                except VesicleError as error:
                    yield i, error

    def losses(
        self, windows: Sequence[Prepared], methods: Sequence[Method | None], *, keeps: bool = False
    ) -> list[Execution]:
        """Windows of a text, each under its method, in one pass."""
        ids = [p.prompt.ids for p in windows]
        executor, context = self._subject.executor, windows[0].context
        ran = executor.losses(ids, methods, context=context, keep_levels=keeps)
        return [
            replace(found, output=replace(found.output, n_bytes=p.n_bytes))
            for p, found in zip(windows, ran, strict=True)
        ]

    def run(
        self, prepared: Prepared, method: Method | None, *, keep_levels: bool = False
    ) -> Execution:
        """One item."""
        subject, item = self._subject, prepared.item
        executor = subject.executor
        if self._task.kind == "loss":
            return self.losses([prepared], [method], keeps=keep_levels)[0]
        if self._task.kind == "choose":
            found = executor.choose(
                prepared.prompt, prepared.choices, method, keep_levels=keep_levels
            )
            sizes = tuple(len(c.strip().encode("utf-8")) for c in item.choices)
            output = replace(found.output, choice_bytes=sizes)
        else:
            found = executor.generate(
                prepared.prompt,
                method,
                subject.codec,
                max_new_tokens=item.max_new_tokens,
                stop=item.stop,
                ends=subject.ends,
                keep_levels=keep_levels,
            )
            output = found.output
        return replace(found, output=output)

    def share_on(
        self, items: Sequence[Prepared], counted: str
    ) -> Callable[[ModulatorMethod], float]:
        """What a method executes of the dense FLOPs on items, with answers of a few tokens.

        Args:
            items: To be run.
            counted: The tokens that count: `all`, or those of phase `generated`.
        """
        short = [
            replace(p, item=replace(p.item, max_new_tokens=min(8, p.item.max_new_tokens)))
            for p in items
        ]
        most = self._most

        def run(together: list[Prepared], method: ModulatorMethod) -> list[Execution]:
            if len(together) > 1:
                return self.losses(together, [method] * len(together))
            return [self.run(together[0], method)]

        def share(method: ModulatorMethod) -> float:
            executed = dense = 0
            for start in range(0, len(short), most):
                together = short[start : start + most]
                with for_the_row():
                    ran = run(together, method)
                for found in ran:
                    spans, cost = found.spans, found.prefill.flops_total + found.decode.flops_total
                    if counted == GENERATED:
                        spans = tuple(span.behind(found.prompt) for span in spans)
                        cost = found.generated.flops_total
                    executed += cost
                    dense += self._subject.executor.dense(spans).flops_total
                self.tick(sum(p.n_tokens for p in together))
            return executed / dense

        return share

    def nats_of_right_answers(self, method: Method, selection: Sequence[Prepared]) -> float:
        """Loss of the right answers of items, in nats per token."""
        nats, tokens = 0.0, 0
        codec, executor = self._subject.codec, self._subject.executor
        if self._task.kind == "loss":
            ran = self.losses(selection, [method] * len(selection))
            self.tick(sum(p.n_tokens for p in selection))
            return sum(e.output.nats for e in ran) / sum(e.output.n_tokens for e in ran)
        for prepared in selection:
            item = prepared.item
            if self._task.kind == "choose":
                assert item.answer is not None
                right = prepared.choices[item.answer]
            else:
                answer = " " + item.references[0] if item.references else ""
                right = codec.encode(answer, control_tokens=False, continues=True)[:64]
            if right:
                output = executor.choose(prepared.prompt, [right], method).output
                nats, tokens = nats - output.choice_nats[0], tokens + len(right)
        if not tokens:
            raise BudgetError(
                f"{self._task.name} has no right answers by which a method could be selected"
            )
        return nats / tokens

    @property
    def _most(self) -> int:
        """Items that are run at once."""
        return self._subject.executor.batch if self._task.kind == "loss" else 1


@contextmanager
def for_the_row() -> Iterator[None]:
    """While a method is set: what an item cannot do then, no item of the row can have."""
    try:
        yield
    except VesicleError as error:
        raise BudgetError(str(error)) from error
