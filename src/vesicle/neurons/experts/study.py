"""MoE-X against a dense FFN of equal active width, a wide one, and sparse autoencoders.

For each seed four decoders are trained on the same texts in the same order, and differ in their
FFNs alone:

- `dense`: the units that all others run for a token;
- `wide`: dense, with as many units as all experts have (a control: it costs M / k as much);
- `top-k`: experts with learnt scores;
- `sparsity`: experts with MoE-X's router;

then `converted`: the wide one, its units split into experts with a fitted router, trained on a
little; and two autoencoders of the dense one, on the residual stream and on what the FFN adds, with
as many features as all experts have units. Beside them stand `probe`, a linear read-out of the
residual stream for each property, as a ceiling; `untrained`, the dense decoder with random weights;
`inputs`, the newest tokens and the position; and what is always active.

Not reproduced: sizes, data and steps of the paper (16 million games of people; GPT-2 on FineWeb).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.folders import locked
from vesicle.neurons.experts.autoencoder import Autoencoder, fit_autoencoder
from vesicle.neurons.experts.conversion import fit_router, mlp_of, restricted, to_experts
from vesicle.neurons.experts.corpus import Corpus, chess_corpus, text_corpus
from vesicle.neurons.experts.decoder import (
    expert_layers,
    new_experts_decoder,
    new_router,
    put_ffns,
    training_loss,
)
from vesicle.neurons.experts.features import (
    SITES,
    Dictionary,
    Inputs,
    Neurons,
    Probe,
    Reader,
    vectors,
)
from vesicle.neurons.experts.features import ffn_inputs as inputs_of
from vesicle.neurons.experts.layer import ExpertFfn
from vesicle.neurons.experts.measures import Measures, kept, of_decoder, of_reader, of_routing
from vesicle.neurons.experts.regression import regression
from vesicle.neurons.experts.settings import Settings, claim
from vesicle.scratch import Recipe, fit

TRAINED = ("dense", "wide", "top-k", "sparsity")
READERS = (
    *TRAINED,
    "converted",
    "autoencoder residual",
    "autoencoder ffn",
    "probe",
    "untrained",
    "inputs",
)
"""All that is measured, a ceiling and controls last."""

Show = Callable[[int, str], None]
"""Told how many steps are done in all, and of what."""
Results = list[dict[str, Measures]]
"""Of each seed, what was measured of each of `READERS`, and of `conversion`."""


def run_comparison(
    out: Path,
    settings: Settings,
    n_seeds: int,
    source: str | Path | None = None,
    show: Show | None = None,
) -> tuple[Corpus, Results]:
    """Train and measure what `out` does not hold yet.

    Args:
        out: Folder of this comparison alone; more seeds may follow later.
        settings: Of the decoders.
        n_seeds: Seeds, from 0.
        source: Of text, as `corpus.text_corpus` takes it; none for chess.
        show: Told what is done.

    Returns:
        What was judged by, and what was measured.

    Raises:
        DataError: There is no such text, or too little of it.
        VesicleError: The folder is of another comparison, or another process writes to it.
    """
    if n_seeds < 1:
        raise VesicleError(f"seeds are {n_seeds}; allowed: 1 and above")
    tell = show or _silent
    with locked(out):
        corpus = _corpus(out, settings, source, tell)
        facts = claim(out, settings, corpus.digest)
        runs = [_Run(out, settings, corpus, facts, seed, tell) for seed in range(n_seeds)]
        return corpus, [run.all() for run in runs]


def readers_of(
    out: Path, settings: Settings, seed: int, source: str | Path | None = None
) -> tuple[Corpus, dict[str, Reader]]:
    """What one seed of a comparison trained, to be looked at by other analyses.

    Args:
        out: Folder of the comparison; what it lacks is trained first.
        settings: Of the decoders.
        seed: Which.
        source: Of text.

    Returns:
        The texts; and by name the neurons of each decoder, and the features of each autoencoder.

    Raises:
        VesicleError: As `run_comparison`.
    """
    with locked(out):
        corpus = _corpus(out, settings, source, _silent)
        facts = claim(out, settings, corpus.digest)
        run = _Run(out, settings, corpus, facts, seed, _silent)
        decoders = {name: run.trained(name) for name in TRAINED}
        decoders["converted"], _ = run.converted(decoders["wide"])
        found: dict[str, Reader] = {
            name: Neurons(model, settings.layer) for name, model in decoders.items()
        }
        for site in SITES:
            found[f"autoencoder {site}"], _ = run.dictionary(decoders["dense"], site)
        return corpus, found


def _silent(done: int, what: str) -> None:
    pass


def _corpus(out: Path, settings: Settings, source: str | Path | None, tell: Show) -> Corpus:
    if settings.task == "text":
        if source is None:
            raise VesicleError("a text is needed: give a file, a folder, or `sample`")
        return text_corpus(settings, source)
    if source is not None:
        raise VesicleError(f"data is {source}, but the games of task chess are made: leave it out")
    return chess_corpus(settings, out / "games", lambda n: tell(0, f"{n} games"))


class _Run:
    """One seed."""

    def __init__(
        self,
        out: Path,
        settings: Settings,
        corpus: Corpus,
        facts: dict[str, Any],
        seed: int,
        tell: Show,
    ) -> None:
        self.folder = out / f"seed-{seed}"
        self.settings, self.corpus, self.seed, self.tell = settings, corpus, seed, tell
        self.facts = {**facts, "training_seed": seed}
        self.done = seed * settings.steps_of_a_seed

    def all(self) -> dict[str, Measures]:
        """Train and measure everything."""
        decoders = {name: self.trained(name) for name in TRAINED}
        found = {name: self.decoder(name, model) for name, model in decoders.items()}
        converted, found["conversion"] = self.converted(decoders["wide"])
        found["converted"] = self.decoder("converted", converted)
        for site in SITES:
            found[f"autoencoder {site}"] = self.autoencoder(decoders["dense"], site)
        found["probe"] = self.probe(decoders["dense"])
        found["untrained"] = self.decoder("untrained", self.new("dense"))
        reader = Inputs(self.corpus.vocabulary, self.settings.length)
        found["inputs"] = self.measured("inputs", lambda: self.read(reader))
        return found

    def new(self, name: str) -> Any:
        """A decoder with random weights."""
        s, units = self.settings, self.settings.experts.all_units
        ffn = units if name == "wide" else s.ffn
        experts = s.dense(ffn) if name in ("dense", "wide") else s.experts
        size = s.decoder(self.corpus.vocabulary, ffn)
        router = "sparsity" if name == "sparsity" else "top-k"
        return new_experts_decoder(size, experts, router, self.seed)

    def trained(self, name: str) -> Any:
        """A decoder, trained or taken from the folder."""
        model = self.new(name)
        s = self.settings
        self.fit(name, model, s.recipe(s.steps), s.balance)
        return model

    def fit(self, name: str, model: Any, recipe: Recipe, balance: float) -> None:
        """Train a decoder in place."""
        s, corpus = self.settings, self.corpus
        loss_at = training_loss(
            model,
            corpus.train,
            corpus.train_scored,
            batch=s.batch,
            seed=self.seed,
            balance=balance,
        )
        show = self.show(name)
        fit(model, loss_at, recipe, self.folder / name, facts=self.facts, show=show)
        self.done += recipe.steps

    def show(self, name: str) -> Callable[[int, float], None]:
        """Tells steps of one training as steps of all."""
        before = self.done
        return lambda step, loss: self.tell(
            before + step, f"{name}, seed {self.seed}, loss {loss:.3f}"
        )

    def measured(self, name: str, measure: Callable[[], Measures]) -> Measures:
        """What the folder holds of something, or what is measured now."""
        self.tell(self.done, f"{name}, seed {self.seed}")
        place = self.folder / "measures" / name.replace(" ", "-")
        return kept(place, self.facts, measure)

    def read(self, reader: Reader) -> Measures:
        """Of features."""
        ours = isinstance(reader, Neurons | Dictionary)
        return of_reader(reader, self.corpus, self.settings.ffn if ours else None, self.seed)

    def decoder(self, name: str, model: Any) -> Measures:
        """Of a decoder and its neurons."""

        def measure() -> Measures:
            numbers, tensors = self.read(Neurons(model, self.settings.layer))
            if expert_layers(model)[0].size.n_experts > 1:
                numbers |= of_routing(model, self.settings.layer, self.corpus)
            return numbers, tensors | of_decoder(model, self.corpus)

        return self.measured(name, measure)

    def dictionary(self, model: Any, site: str) -> tuple[Dictionary, float]:
        """An autoencoder of a decoder, trained or taken, and the variance that it misses."""
        s, name = self.settings, f"autoencoder {site}"
        found = Autoencoder(s.width, s.experts.all_units, s.sae_active, self.seed)
        x = vectors(model, s.layer, site, self.corpus.train[: s.sae_texts])
        missed = fit_autoencoder(
            found,
            x,
            Recipe(steps=s.sae_steps, learning_rate=1e-3, weight_decay=0.0),
            self.folder / name.replace(" ", "-"),
            batch=1024,
            seed=self.seed,
            facts=self.facts,
            show=self.show(name),
        )
        self.done += s.sae_steps
        return Dictionary(model, s.layer, found, site), missed

    def autoencoder(self, model: Any, site: str) -> Measures:
        """Of an autoencoder of a decoder."""
        reader, missed = self.dictionary(model, site)

        def measure() -> Measures:
            numbers, tensors = self.read(reader)
            numbers["variance_missed"] = round(missed, 5)
            return numbers, tensors | of_decoder(model, self.corpus, reader.replacing())

        return self.measured(f"autoencoder {site}", measure)

    def probe(self, model: Any) -> Measures:
        """Of read-outs fitted on texts that are trained on."""
        s, corpus = self.settings, self.corpus

        def measure() -> Measures:
            x = vectors(model, s.layer, SITES[0], corpus.known)[corpus.known_where.flatten()]
            weight, bias = regression(x, corpus.known_values)
            return self.read(Probe(model, s.layer, SITES[0], weight, bias))

        return self.measured("probe", measure)

    def converted(self, wide: Any) -> tuple[Any, Measures]:
        """The wide decoder with experts, trained on; and what the conversion alone loses."""
        s, model = self.settings, self.new("wide")
        model.load_state_dict(wide.state_dict())
        sample = self.corpus.train[:32]
        ffns = [
            to_experts(mlp_of(wide, layer), s.n_experts, s.n_active, seed=self.seed)
            for layer in range(s.n_layers)
        ]
        for layer, ffn in enumerate(ffns):
            fit_router(ffn, inputs_of(wide, layer, sample))
        losses = self.measured("conversion", lambda: ({}, self.conversions(model, ffns)))
        put_ffns(model, ffns)
        for ffn in ffns:
            ffn.router.requires_grad_(False)  # gates of 1 give scores no gradient
        self.fit("converted", model, s.recipe(s.more_steps), balance=0.0)
        return model, losses

    def conversions(self, model: Any, ffns: list[ExpertFfn]) -> dict[str, Tensor]:
        """(M,) losses of the wide decoder as experts that were not trained, by who chooses."""
        s, fitted = self.settings, [ffn.router for ffn in ffns]
        fixed = list(range(s.n_active))
        found = {}
        for name in ("fitted", "sparsity", "densest", "same experts"):
            for ffn, own in zip(ffns, fitted, strict=True):
                if name == "fitted":
                    ffn.router = own
                elif name == "same experts":
                    ffn.router = restricted(ffn, fixed).router
                else:
                    ffn.router = new_router(name, s.experts, weighted=False)
            put_ffns(model, ffns)
            found[name] = of_decoder(model, self.corpus)["loss"]
        for ffn, own in zip(ffns, fitted, strict=True):
            ffn.router = own
        return found
