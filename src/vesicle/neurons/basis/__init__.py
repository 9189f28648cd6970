"""The Local Interaction Basis (Bushnaq et al. 2024), beside PCA and random rotations.

`local_interaction` finds bases from the last layer back, `interactions` the edges between the
features of adjacent layers, `sparsity` and `ablation` tell how few of them matter. `modular_study`
and `layer_study` do all of it, on networks for modular addition and on a language model.
"""

from vesicle.neurons.basis.ablation import fewest, keep_edges, keep_features, largest
from vesicle.neurons.basis.comparison import BasisReport, Compared, Estimate, compare, verdict
from vesicle.neurons.basis.coordinates import Basis, Moments, moments
from vesicle.neurons.basis.drawing import Graph, svg
from vesicle.neurons.basis.interactions import attributions, edges, residual_edges
from vesicle.neurons.basis.layer_bases import LayerStudy
from vesicle.neurons.basis.layer_study import study_layers
from vesicle.neurons.basis.local_interaction import (
    Section,
    activations,
    local_interaction,
    local_interaction_bases,
    sampled_jacobian,
    squared_jacobian,
)
from vesicle.neurons.basis.modular import ModularAdder, ModularConfig, trained_adder
from vesicle.neurons.basis.modular_study import ModularStudy, study_modular
from vesicle.neurons.basis.pca import principal_components
from vesicle.neurons.basis.rotated import random_rotation, scaled_components
from vesicle.neurons.basis.sparsity import Sparsity, sparsity

__all__ = [
    "Basis",
    "BasisReport",
    "Compared",
    "Estimate",
    "Graph",
    "LayerStudy",
    "ModularAdder",
    "ModularConfig",
    "ModularStudy",
    "Moments",
    "Section",
    "Sparsity",
    "activations",
    "attributions",
    "compare",
    "edges",
    "fewest",
    "keep_edges",
    "keep_features",
    "largest",
    "local_interaction",
    "local_interaction_bases",
    "moments",
    "principal_components",
    "random_rotation",
    "residual_edges",
    "sampled_jacobian",
    "scaled_components",
    "sparsity",
    "squared_jacobian",
    "study_layers",
    "study_modular",
    "svg",
    "trained_adder",
    "verdict",
]
