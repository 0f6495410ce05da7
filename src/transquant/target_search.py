"""From a target to a draft of the file: transforms and the best choice first, then the scalar c that meets the target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from transquant.allocation.search import Closest, largest_feasible, meet_size, slope_of
from transquant.choices import Choice
from transquant.distillation import SHARES_OF_CHANGE, Teacher, changed, learned_changes
from transquant.encoder import Draft, Encoder
from transquant.errors import InputError, TargetError
from transquant.grid import on_grid
from transquant.progressive import FROM as PROGRESSIVE_FROM
from transquant.progressive import progressive
from transquant.records import FloatArray
from transquant.refinement import refine
from transquant.stats import PairedNetworks, Reference, copy_model
from transquant.targets import Target
from transquant.transform_choice import ChosenTransform, choose_transforms, transforms_of
from transquant.tuning import LARGE, ROUGHER, SAME_SIZE, Tuner, choose

_log = logging.getLogger("transquant")

COARSEST = 2.0**100  # a scalar c at which every symbol is zero
FAITHFUL = Choice(rate=1.0, shrink=1.0)  # where the weights' own error is the metric, theory holds to the letter
PASSES = 5  # through all layers in execution order, at most, until the size is met
PROGRESSIONS = 3  # walks through all groups of rows, at most, until the size is met
HOPELESS = 1.5  # times the draft's distortion: a walk that is worse is the last, whatever its size
RELEARNED = 3  # drafts whose vectors learn, at most, until the size is met
NEARBY = 0.125  # octaves of c over which the slope of a large model's size is taken
ROUGH = 0.05  # of the target's size: near enough to choose transforms

Progress = Callable[[str, int, int], None]


class TargetSearch:
    """From a target to a draft: the best choice first, then the scalar c."""

    def __init__(
        self,
        encoder: Encoder,
        reference: Reference | None,
        module: nn.Module | None,
        target: Target,
        effort: int,
        say: Progress,
        paired: PairedNetworks | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.encoder, self.reference, self.module, self.target, self.say = encoder, reference, module, target, say
        self.paired = paired  # None: all layers are quantized at once, each for itself
        self.teacher = teacher  # None: vectors do not learn
        self.effort = effort
        self.progressive = False  # whether rows of the final draft were fixed group by group while the others learned
        self.distilled = False  # whether vectors of the final draft have learned
        self.in_order = paired is not None and target.kind != "bytes"  # whether layers of the final draft were quantized in order
        self.transforms: dict[str, ChosenTransform] = {}
        self._float_score: float | None = None
        self.scores: tuple[float, float] | None = None  # of the float model and of the final draft, for a target of that kind
        self.num_values = encoder.plan.num_weights
        self.sample = encoder.sampled()  # stands for the encoder where drafts are many
        self.smallest = 0  # bytes of its coarsest file
        self.slope = self.num_values / 10  # −d bytes / d log2 c; every search for a size corrects it for the next

    def run(self) -> tuple[Draft, Choice]:
        """The final draft and what was chosen for it."""
        choice = Choice() if self.reference else FAITHFUL
        if self.target.kind == "step":
            self._choose_transforms(self.target.value, choice)
            return self._distilled(self._draft(self.target.value, choice), choice)
        if self.target.kind == "bytes":
            start = self._start(self.target.value)
            self._choose_transforms(self._rough(choice, start), choice)
            choice, start = self._tuned(choice, self.target.value, start)
            return self._progressed(*self._distilled(*self._refined(*self._meet_bytes(choice, start))))
        draft = self._meet_quality(choice, self.encoder.first_guess(self.num_values / 4))
        self._choose_transforms(draft.c, choice)
        tuned, start = self._tuned(choice, self.size(draft), draft.c)
        same = tuned == choice and not self.transforms and self.paired is None
        return (draft if same else self._meet_quality(tuned, start, self._draft)), tuned

    def _choose_transforms(self, c: float, choice: Choice) -> None:
        """From here on the encoder uses the transforms that are best at c, or those that were asked for."""
        self.say("transforms", 0, 1)
        self.transforms = choose_transforms(self.encoder, c, choice, self.sample)
        transforms = transforms_of(self.transforms)
        whole = self.sample is self.encoder
        self.encoder = self.encoder.transformed(transforms)
        # of a sample there are only some rows: nothing can be said of a transform over them
        some = {name: t for name, t in transforms.items() if t.axis != "r"}
        self.sample = self.encoder if whole else self.sample.transformed(some)
        self.say("transforms", 1, 1)

    def _rough(self, choice: Choice, start: float) -> float:
        """A scalar c whose file is near the target."""
        target = self.target.value
        return meet_size(
            lambda c: self._expected(c, choice), (1 + ROUGH) * target, 2 * ROUGH * target, start,
            self.num_values / 10, max_steps=4,
        ).c  # fmt: skip

    def size(self, draft: Draft) -> int:
        """Bytes of a draft's file."""
        return len(self.encoder.encode(draft).data)

    def _start(self, target_bytes: float) -> float:
        """A first c; raises TargetError if even the coarsest file is larger than asked."""
        self.smallest = self._sample_size(COARSEST, Choice())
        if self.smallest > target_bytes:
            raise TargetError(f"a file of {target_bytes:.0f} bytes cannot be reached: the smallest takes {self.smallest} bytes")
        return self.sample.first_guess(max(target_bytes - self.smallest, 1) / self.sample.scale)

    def _sample_size(self, c: float, choice: Choice) -> int:
        return len(self.sample.encode(self.sample.draft(c, choice)).data)

    def _expected(self, c: float, choice: Choice) -> int:
        """Bytes of the file at c, of a large model from its sample: what the weights take grows with their number."""
        return round(self.smallest + (self._sample_size(c, choice) - self.smallest) * self.sample.scale)

    def _foreseen(self, choice: Choice, start: float) -> float:
        """Where to look for the c that meets the size, and how sizes fall with it; of a large model from its sample, so that the
        model itself is quantized once or twice."""
        if self.sample is self.encoder:
            return start
        c = meet_size(lambda c: self._expected(c, choice), self.target.value, 0.4 * self.target.slack, start, self.slope).c
        near = c * 2**NEARBY
        self.slope = max((self._expected(c, choice) - self._expected(near, choice)) / NEARBY, 1.0)
        return c

    def _tuned(self, choice: Choice, target_bytes: float, start: float) -> tuple[Choice, float]:
        if self.reference is None or self.effort < 3:
            return choice, start
        rough = ROUGHER if self.encoder.plan.work > LARGE else SAME_SIZE
        tuner = Tuner(self.encoder.draft, self.size, self._distortion, target_bytes, self.num_values, rough)
        trellis = self.encoder.method.state_bits > 0
        found = choose(tuner, start, self.encoder.plan.work, trellis, lambda done, total: self.say("tuning", done, total))
        self.slope = tuner.slope
        return found

    def _distortion(self, draft: Draft) -> float:
        return self.reference.distortion(draft.state()) if self.reference else draft.predicted

    def _meet_bytes(self, choice: Choice, start: float) -> tuple[Draft, Choice]:
        """The largest draft that fits, and the choice that it was made with."""
        closest: Closest[tuple[Draft, Choice]] = Closest(self.target.value)
        start = self._foreseen(choice, start)
        tries = 0

        def search(choice: Choice, start: float, max_steps: int) -> float:
            sizes: dict[float, float] = {}

            def size_of(c: float) -> float:
                nonlocal tries
                tries += 1
                self.say("search", tries, 0)
                draft = self.encoder.draft(c, choice)
                sizes[c] = closest.offer((draft, choice), self.size(draft))
                return sizes[c]

            found = meet_size(size_of, self.target.value, 0.4 * self.target.slack, start, self.slope, max_steps)
            self.slope = slope_of(sizes, self.slope)
            return found.c

        c = search(choice, start, 14)
        least = self.target.value - self.target.slack
        if not least <= closest.size <= self.target.value:
            # regularisation and offsets move with c, and step indices with them: sizes have gaps until they are held fast
            search(replace(choice, level=c), c, 24)
        if closest.item is None or closest.size > self.target.value:
            raise TargetError(
                f"a file of {self.target.value:.0f} bytes cannot be reached: the smallest found takes {closest.size} bytes"
            )
        if closest.size < least:
            _log.warning("the finest file has %d bytes; %d were allowed", closest.size, self.target.value)
        return closest.item

    def _draft(self, c: float, choice: Choice) -> Draft:
        """A draft whose layers make up for the errors of those before, where that is asked for."""
        if self.paired is None:
            return self.encoder.draft(c, choice)
        return refine(self.encoder, self.paired, c, choice, lambda done, total: self.say("layers", done, total))

    def _refined(self, draft: Draft, choice: Choice) -> tuple[Draft, Choice]:
        """The same size with layers in execution order, if the held-back samples agree that this is better."""
        if self.paired is None or self.reference is None:
            return draft, choice
        closest: Closest[Draft] = Closest(self.target.value)

        def size_of(c: float) -> float:
            found = self._draft(c, choice)
            return closest.offer(found, self.size(found))

        meet_size(size_of, self.target.value, 0.6 * self.target.slack, draft.c, self.slope, max_steps=PASSES)
        refined = closest.item
        if refined is None or not self.target.value - self.target.slack <= closest.size <= self.target.value:
            _log.info("layers in execution order met no file of the asked size")
            return draft, choice
        before, after = self._distortion(draft), self._distortion(refined)
        _log.info("measured distortion %.4g, with layers in execution order %.4g", before, after)
        self.in_order = after < before
        return (refined if self.in_order else draft), choice

    def _distilled(self, draft: Draft, choice: Choice) -> tuple[Draft, Choice]:
        """The same size with vectors that have learned, as far as the held-back samples agree."""
        if self.teacher is None or self.reference is None:
            return draft, choice
        changes = self._changes(self.teacher, draft)
        before = self._distortion(draft)
        after = {s: self._distortion(changed(self.encoder, draft, choice, changes, s)) for s in SHARES_OF_CHANGE if changes}
        _log.info("measured distortion %.4g; of what was learned a share, and with it: %s", before, after)
        share = min(after, key=lambda s: after[s], default=0.0)
        if not share or after[share] >= before:
            return draft, choice
        other = self._with_changes(self.teacher, draft, choice, changes, share)
        self.distilled = other is not None and self._distortion(other) < before
        return (other if other is not None and self.distilled else draft), choice

    def _changes(self, teacher: Teacher, draft: Draft) -> dict[str, FloatArray]:
        return learned_changes(teacher, draft, lambda done, total: self.say("distillation", done, total))

    def _with_changes(
        self, teacher: Teacher, draft: Draft, choice: Choice, changes: Mapping[str, FloatArray], share: float
    ) -> Draft | None:
        """A draft with a share of the changes that fits: vectors that have learned take more bytes, so weights get fewer. Changes
        make up for the errors of one draft, so those of another are learned again."""
        if self.target.kind != "bytes":
            return changed(self.encoder, draft, choice, changes, share)
        closest: Closest[Draft] = Closest(self.target.value)

        def size_of(c: float) -> float:
            if on_grid(c) == draft.c:
                base, learned = draft, changes
            else:
                base = self._draft(c, choice) if self.in_order else self.encoder.draft(c, choice)
                learned = self._changes(teacher, base)
            found = changed(self.encoder, base, choice, learned, share)
            return closest.offer(found, self.size(found))

        meet_size(size_of, self.target.value, 0.8 * self.target.slack, draft.c, self.slope, max_steps=RELEARNED)
        return closest.item if self.target.value - self.target.slack <= closest.size <= self.target.value else None

    def _progressed(self, draft: Draft, choice: Choice) -> tuple[Draft, Choice]:
        """The same size with rows that were fixed group by group, if the held-back samples agree that this is better."""
        if self.teacher is None or self.reference is None or self.effort < PROGRESSIVE_FROM:
            return draft, choice
        teacher, closest, before = self.teacher, Closest[Draft](self.target.value), self._distortion(draft)

        def size_of(c: float) -> float:
            found = progressive(self.encoder, teacher, c, choice, lambda done, total: self.say("progressive", done, total))
            if found is None or self._distortion(found) > HOPELESS * before:
                return self.target.value  # another walk would change little
            return closest.offer(found, self.size(found))

        meet_size(size_of, self.target.value, 0.4 * self.target.slack, draft.c, self.slope, max_steps=PROGRESSIONS)
        found = closest.item
        if found is None or not self.target.value - self.target.slack <= closest.size <= self.target.value:
            _log.info("progressive quantization gave no file of the asked size, or a far worse one")
            return draft, choice
        after = self._distortion(found)
        _log.info("measured distortion %.4g, with progressive quantization %.4g", before, after)
        if after >= before:
            return draft, choice
        self.progressive, self.in_order, self.distilled = True, False, False
        return found, choice

    def _meet_quality(self, choice: Choice, start: float, make: Callable[[float, Choice], Draft] | None = None) -> Draft:
        """The coarsest draft within the allowed distortion or drop; `make(c, choice)` makes drafts."""
        make = make or self.encoder.draft
        kept: list[Draft] = []  # the coarsest that is good enough: the search only goes on from there
        tries = 0

        def good_enough(c: float) -> bool:
            nonlocal tries
            tries += 1
            self.say("search", tries, 0)
            draft = make(c, choice)
            good = self._worse_by(draft) <= self.target.value
            if good:
                kept[:] = [draft]
            return good

        found = largest_feasible(good_enough, start, 0.02)
        if not found.feasible:
            least = self._worse_by(make(found.c, choice))
            raise TargetError(f"a {self.target.kind} of {self.target.value} cannot be reached: the smallest found is {least:.3g}")
        (draft,) = kept
        if self._float_score is not None:
            self.scores = self._float_score, self._float_score - self._worse_by(draft)
        return draft

    def _worse_by(self, draft: Draft) -> float:
        """Measured distortion, or how many points the caller's score falls."""
        if self.target.evaluate is None or self.module is None:
            return self._distortion(draft)
        if self._float_score is None:
            self._float_score = self._score({})
        return self._float_score - self._score(draft.state())

    def _score(self, state: Mapping[str, Tensor]) -> float:
        assert self.target.evaluate is not None
        assert self.module is not None
        evaluate, module = self.target.evaluate, self.module
        return self.encoder.pool.processes.once(lambda: _score(evaluate, module, state))  # it may not be the same everywhere


def _score(evaluate: Callable[[Any], float], module: nn.Module, state: Mapping[str, Tensor]) -> float:
    twin = copy_model(module)
    twin.load_state_dict(dict(state), strict=False)
    return score_of(evaluate, twin)


def score_of(evaluate: Callable[[Any], float], module: nn.Module) -> float:
    """What `evaluate` says of a module that is its own. Raises InputError where that is no number."""
    score = evaluate(module)
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number:
        raise InputError(f"evaluate returned {score!r}, allowed are numbers, higher is better")
    return number
