"""Document-level membership inference: was a document in a model's training set?"""

from vesicle.neurons.membership.attack import (
    ATTACKS,
    PLAINEST,
    PUBLISHED,
    attack_scores,
    infer_unknown,
    learnt_scores,
)
from vesicle.neurons.membership.auc import Area, auc, difference, estimate
from vesicle.neurons.membership.bag_of_words import bag_of_words_scores
from vesicle.neurons.membership.chance import chance, fold_aucs, other_splits
from vesicle.neurons.membership.classifier import Training, new_folds, out_of_fold
from vesicle.neurons.membership.corpus import Corpus, prepare
from vesicle.neurons.membership.documents import read_documents
from vesicle.neurons.membership.experiment import run_experiment, train_decoder
from vesicle.neurons.membership.features import AGGREGATIONS, NORMALISATIONS, features
from vesicle.neurons.membership.own_model import KnownDocuments, infer_membership
from vesicle.neurons.membership.precision import Lowered, Precision, lowered
from vesicle.neurons.membership.probabilities import TokenProbabilities, token_probabilities
from vesicle.neurons.membership.readers import reading, reading_by_engine
from vesicle.neurons.membership.settings import (
    Attacked,
    ExperimentSettings,
    attacked_of,
    settings_of,
)
from vesicle.neurons.membership.thresholds import threshold_scores

__all__ = [
    "AGGREGATIONS",
    "ATTACKS",
    "NORMALISATIONS",
    "PLAINEST",
    "PUBLISHED",
    "Area",
    "Attacked",
    "Corpus",
    "ExperimentSettings",
    "KnownDocuments",
    "Lowered",
    "Precision",
    "TokenProbabilities",
    "Training",
    "attack_scores",
    "attacked_of",
    "auc",
    "bag_of_words_scores",
    "chance",
    "difference",
    "estimate",
    "features",
    "fold_aucs",
    "infer_membership",
    "infer_unknown",
    "learnt_scores",
    "lowered",
    "new_folds",
    "other_splits",
    "out_of_fold",
    "prepare",
    "read_documents",
    "reading",
    "reading_by_engine",
    "run_experiment",
    "settings_of",
    "threshold_scores",
    "token_probabilities",
    "train_decoder",
]
