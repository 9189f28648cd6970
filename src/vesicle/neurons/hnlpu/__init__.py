"""What a Plan would cost with the model in the metal of a chip (HNLPU, Liu et al. 2026).

Arithmetic on published constants and on assumptions, never a measurement; `check` holds it against
all that was published.
"""

from vesicle.neurons.hnlpu.check import given_back, published_price, single_decisions
from vesicle.neurons.hnlpu.chip import PUBLISHED, Chip, check_bits
from vesicle.neurons.hnlpu.constants import GPT_OSS, Constant, constants
from vesicle.neurons.hnlpu.deployment import Deployment, DeploymentPrice, price_deployment
from vesicle.neurons.hnlpu.machines import GPU, WAFER, Machine, MachinePrice, price_on_machine
from vesicle.neurons.hnlpu.pricing import ChipPrice, price_on_hnlpu, share_on_published_chip
from vesicle.neurons.hnlpu.report import ChipReport, report, tables
from vesicle.neurons.hnlpu.scenarios import CAUTIOUS, HOPEFUL, MIDDLE, Estimate, Scenario
from vesicle.neurons.hnlpu.work import Work, cost_from

__all__ = [
    "CAUTIOUS",
    "GPT_OSS",
    "GPU",
    "HOPEFUL",
    "MIDDLE",
    "PUBLISHED",
    "WAFER",
    "Chip",
    "ChipPrice",
    "ChipReport",
    "Constant",
    "Deployment",
    "DeploymentPrice",
    "Estimate",
    "Machine",
    "MachinePrice",
    "Scenario",
    "Work",
    "check_bits",
    "constants",
    "cost_from",
    "given_back",
    "price_deployment",
    "price_on_hnlpu",
    "price_on_machine",
    "published_price",
    "report",
    "share_on_published_chip",
    "single_decisions",
    "tables",
]
